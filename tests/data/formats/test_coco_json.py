import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_convnext_det.data.formats import coco_json as json_stream
from lightning_convnext_det.data.formats.coco_json import iterate_members
from lightning_convnext_det.errors import DataError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def collected(path: Path, block: int = 1 << 20) -> dict[str, object]:
    """The outermost object, put together again."""
    content: dict[str, object] = {}
    for key, index, value in iterate_members(path, block):
        if index is None:
            content[key] = value
        else:
            elements = content.setdefault(key, [])
            assert isinstance(elements, list)
            assert index == len(elements)
            elements.append(value)
    return content


@settings(max_examples=40)
@given(content=st.dictionaries(st.text(), VALUES), indent=st.sampled_from([None, 2]), block=st.integers(1, 200))
def test_iterate_members__equals_json_loads(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object], indent: int | None, block: int
) -> None:
    """Whatever the window's edge cuts through."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_MARGIN", 400)
        assert collected(path, block) == content


def test_iterate_members__real_file(shared_data: Path) -> None:
    path = shared_data / "coco_mini" / "annotations" / "instances_train2017.json"

    assert collected(path, block=5000) == json.loads(path.read_text())


def test_iterate_members__byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}\n')

    assert collected(tmp_path / "a.json") == {"a": [1]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"LCD-D004.*line 1 column 1: no JSON: the file is empty"),
        (b"  \n", r"LCD-D004.*line 2 column 1: no JSON: the file is empty"),
        (b"[]", r"LCD-D001.*expected an object with 'images', 'annotations', 'categories'; found a list"),
        (b"3", r"LCD-D001.*found something else"),
        (b"null", r"LCD-D001"),
        (b'"text"', r"LCD-D001.*found a string"),
        (b'{"a": [{"b": 1}, {"b": ', r"LCD-D004.*line 1 column 24: no JSON: expecting value"),
        (b'{"a": [1,\n 2 3]}', r"line 2 column 4: no JSON: expected ',' or '\]'"),
        (b'{"a": [1, ]}', r"line 1 column 11: no JSON: "),
        (b'{"a": 1, }', r"line 1 column 10: no JSON: "),
        (b'{"a" 1}', r"line 1 column 6: no JSON: expected ':'"),
        (b"{1: 1}", r"no JSON: expected a name in quotation marks"),
        (b'{"a": 1} x', r"no JSON: text after the end"),
        (b'{"a": [' + b"[" * 100_000, r"LCD-D004.*nested too deep"),
        (b'{"a": ' + b'{"a":' * 100_000, r"LCD-D004.*nested too deep"),
        (b'{"a": [' + b"9" * 5000 + b"]}", r"LCD-D004.*a number is too long"),
        (b'{"a": [{"id": 1, "id": 2}]}', r"LCD-D004.*the key 'id' appears twice in one object"),
        (b'{"a": [], "a": [1]}', r"LCD-D004.*the key 'a' appears twice in one object"),
        ('{"a": "é"}'.encode("latin-1"), r"LCD-D004.*not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), r"LCD-D004.*not UTF-8"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_iterate_members__refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.json").write_bytes(content)

    with pytest.raises(DataError, match=match) as error:
        collected(tmp_path / "a.json")
    assert "a.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_iterate_members__error_far_into_a_file_names_its_line(tmp_path: Path) -> None:
    lines = [f'{{"id": {number}}},' for number in range(3000)]
    (tmp_path / "a.json").write_text('{"a": [\n' + "\n".join(lines) + "\n  {'id': 1}]}")

    with pytest.raises(DataError, match="line 3002 column 4"):
        collected(tmp_path / "a.json", block=1000)


def test_iterate_members__missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"LCD-D004.*a.json: cannot be read \(No such file"):
        collected(tmp_path / "a.json")
