import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from lightning_convnext_det.data.formats.coco_json import CocoFile, decode_json, read_coco_file
from lightning_convnext_det.errors import DataError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
LISTS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("images", "annotations", "categories", "info"), st.lists(VALUES))
)


def decoded(file: CocoFile, path: Path) -> dict[str, object]:
    lists = {key: getattr(file, key) for key in file.__struct_fields__}
    return {key: [decode_json(one, path) for one in records] for key, records in lists.items() if records is not UNSET}


@settings(max_examples=60)
@given(content=LISTS, indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_read_coco_file__equals_json_loads(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object], indent: int | None, ascii_only: bool
) -> None:
    """Also NaN, infinity and halves of surrogate pairs, which msgspec does not accept."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8")
    expected = {key: value for key, value in json.loads(text).items() if key != "info"}

    assert repr(decoded(read_coco_file(path), path)) == repr(
        {k: expected[k] for k in CocoFile.__struct_fields__ if k in expected}
    )


def test_read_coco_file__real_file(shared_data: Path) -> None:
    path = shared_data / "coco_mini" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())

    assert decoded(read_coco_file(path), path) == {key: content[key] for key in CocoFile.__struct_fields__}


def test_read_coco_file__byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"images": [1]}\n')

    assert decoded(read_coco_file(tmp_path / "a.json"), tmp_path) == {"images": [1]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"LCD-D004.*line 1 column 1: no JSON: the file is empty"),
        (b"  \n", r"LCD-D004.*line 2 column 1: no JSON: the file is empty"),
        (b"[]", r"LCD-D001.*expected an object with 'images', 'annotations', 'categories'; found a list"),
        (b"3", r"LCD-D001.*found an integer"),
        (b"null", r"LCD-D001.*found null"),
        (b'"text"', r"LCD-D001.*found a string"),
        (b'{"images": {}}', r"LCD-D001.*images: expected a list, found an object"),
        (b'{"images": NaN}', r"LCD-D001.*images: expected a list, found nan"),
        (b'{"images": [{"b": 1}, {"b": ', r"LCD-D004.*line 1 column 29: no JSON: the file ends too early"),
        (b'{"images": [1,\n 2 3]}', r"line 2 column 4: no JSON: expecting ',' delimiter"),
        (b'{"images": [1, ]}', r"line 1 column 1[46]: no JSON: "),
        (b'{"a": 1, }', r"line 1 column (8|10): no JSON: "),
        (b'{"a" 1}', r"line 1 column 6: no JSON: expecting ':' delimiter"),
        (b"{1: 1}", r"no JSON: expecting property name enclosed in double quotes"),
        (b'{"a": 1} {}', r"no JSON: extra data"),
        (b'{"images": [' + b"[" * 100_000, r"LCD-D004.*nested too deep"),
        (b'{"a": ' + b'{"a":' * 100_000, r"LCD-D004.*nested too deep"),
        ('{"a": "é"}'.encode("latin-1"), r"LCD-D004.*not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), r"LCD-D004.*not UTF-8"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_read_coco_file__refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.json").write_bytes(content)

    with pytest.raises(DataError, match=match) as error:
        read_coco_file(tmp_path / "a.json")
    assert "a.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_read_coco_file__error_far_into_a_file_names_its_line(tmp_path: Path) -> None:
    lines = [f'{{"id": {number}}},' for number in range(3000)]
    (tmp_path / "a.json").write_text('{"images": [\n' + "\n".join(lines) + "\n  {'id': 1}]}")

    with pytest.raises(DataError, match="line 3002 column 4"):
        read_coco_file(tmp_path / "a.json")


def test_read_coco_file__missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"LCD-D004.*a.json: cannot be read \(No such file"):
        read_coco_file(tmp_path / "a.json")


def test_decode_json__integer_of_5000_digits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"LCD-D004.*a.json: no JSON: a number is too long"):
        decode_json(Raw(b"9" * 5000), tmp_path / "a.json")
