from pathlib import Path

import pytest

from lightning_convnext_det.data.formats.voc_xml import MAX_DEPTH
from tests.data.reading import WriteImage, WriteXml, read_root

OBJECT = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>"
MALFORMED = [
    ("empty", b"", "no XML: no element found"),
    ("text", b"nothing", "no XML: syntax error"),
    ("unclosed", b"<annotation><object>", "no XML: no element found"),
    ("other_root", b"<a/>", "expected <annotation>, found <a>"),
    ("latin_1", "<annotation><a>é</a></annotation>".encode("latin-1"), "no XML: not well-formed"),
    ("utf_16", "<annotation/>".encode("utf-16"), "UTF-16"),
    ("strange_encoding", b'<?xml version="1.0" encoding="klingon"?><annotation/>', "klingon"),
    ("doctype", b"<!DOCTYPE a><annotation/>", "document types, entities"),
    (
        "laughs",
        b'<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>',
        "document types, entities",
    ),
    (
        "external",
        b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hosts">]><annotation>&b;</annotation>',
        "document types",
    ),
    ("deep", b"<annotation>" + b"<a>" * 1_000_000, f"nested more than {MAX_DEPTH} deep"),
    ("long", b"<annotation>" + b" " * (10 << 20) + b"</annotation>", "larger than 10 MiB"),
    ("size_text", b"<annotation><size><width>x</width><height>4</height></size></annotation>", "<size>/<width> is 'x'"),
    ("size_below_0", b"<annotation><size><width>3</width><height>-4</height></size></annotation>", "<size>/<height>"),
    (
        "size_half",
        b"<annotation><size><width>3.5</width><height>4</height></size></annotation>",
        "<size>/<width> is '3.5'",
    ),
    (
        "size_nan",
        b"<annotation><size><width>nan</width><height>4</height></size></annotation>",
        "<size>/<width> is 'nan'",
    ),
]


@pytest.mark.parametrize(("content", "reason"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_read_xml__unusable_file(
    flat: Path, write_image: WriteImage, write_xml: WriteXml, content: bytes, reason: str
) -> None:
    write_image(flat / "b.png")
    write_xml(flat / "a.xml", [("cat", 5, 5, 9, 9)])
    (flat / "b.xml").write_bytes(content)
    table = read_root(flat)

    (problem,) = table.problems
    assert (problem.code, problem.file, problem.action) == ("LCD-D005", "b.xml", "refused")
    assert reason in problem.reason
    assert [table.path(0).name, len(table)] == ["a.png", 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("<xmax>3</xmax>", ""), "<bndbox>/<xmax> missing"),
        (("bndbox", "box"), "<bndbox>/<xmin> missing"),
        (("<name>cat</name>", ""), "<name> missing"),
        (("cat", " "), "<name> missing"),
        ((">4<", ">four<"), "<bndbox>/<ymax> is 'four'; expected a number"),
        (("<name>", "<difficult>2</difficult><name>"), "<difficult> is '2'; expected 0 or 1"),
    ],
)
def test_read_xml__malformed_object(flat: Path, change: tuple[str, str], reason: str) -> None:
    (flat / "a.xml").write_text(f"<annotation>{OBJECT}{OBJECT.replace(*change)}</annotation>")
    table = read_root(flat)

    assert [(p.code, p.file, p.record, p.reason, p.action) for p in table.problems] == [
        ("LCD-D005", "a.xml", "object 2", reason, "refused")
    ]
    assert len(table.boxes) == 1


def test_read_xml__parts_of_an_object_are_no_objects(flat: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    (flat / "a.xml").write_text(f"<annotation>{OBJECT.replace('</object>', part + '</object>')}</annotation>")

    assert read_root(flat, collect=False).class_names == ("cat",)
