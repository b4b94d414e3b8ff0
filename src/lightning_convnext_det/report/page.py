"""The HTML page of a report: one file that loads nothing, for wide screens and phones."""

import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

from lightning_convnext_det.report.drawings import ErrorCrop, WorstImage
from lightning_convnext_det.report.plots import Plot

Cell = str | float | int
_KINDS = {
    "missing": "not annotated", "class": "other class", "box": "box misplaced", "nothing": "never found",
}  # fmt: skip


class Tile(NamedTuple):
    """A number that stands out."""

    name: str
    value: str
    detail: str = ""


class Section(NamedTuple):
    """A part of the page with its anchor."""

    anchor: str
    title: str
    intro: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Join sections to a page."""
    here = files("lightning_convnext_det.report")
    style, script = (here.joinpath(name).read_text() for name in ("style.css", "sort.js"))
    links = "".join(f'<a href="#{part.anchor}">{_text(part.title)}</a>' for part in sections)
    body = "".join(
        f'<section id="{part.anchor}"><h2>{_text(part.title)}</h2><p class="note">{_text(part.intro)}</p>'
        f"{part.body}</section>"
        for part in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{_text(title)}</h1><p>{_text(subtitle)}</p></header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main><script>{script}</script></body></html>\n'
    )


def tiles(values: Sequence[Tile]) -> str:
    """Numbers in a row."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{_text(tile.name)}</span><b>{_text(tile.value)}</b>'
            f"<small>{_text(tile.detail)}</small></div>"
            for tile in values
        )
        + "</div>"
    )


def plots(drawn: Mapping[str, Plot]) -> str:
    """Plots with their titles, beside each other where there is room."""
    return (
        '<div class="grid">'
        + "".join(
            f'<figure class="card"><h3>{_text(title)}</h3>{_named(plot.svg, title)}</figure>'
            for title, plot in drawn.items()
        )
        + "</div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], sortable: bool = True, text: Sequence[int] = ()) -> str:
    """A table; numbers are sorted by value, nan shows as a dash."""
    name = ' class="sortable"' if sortable else ""
    title = "".join(
        f'<th scope="col"{_align(i, text)}>{f"<button>{_text(name)}</button>" if sortable else _text(name)}</th>'
        for i, name in enumerate(head)
    )
    body = "".join("<tr>" + "".join(_cell(cell, i, text) for i, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table{name}><thead><tr>{title}</tr></thead><tbody>{body}</tbody></table></div>'


def worst_images(worst: Sequence[WorstImage]) -> str:
    """Annotations and detections side by side."""
    if not worst:
        return "<p>No image costs any mAP.</p>"
    return f'<div class="grid worst">{"".join(map(_worst_image, worst))}</div>'


def _worst_image(one: WorstImage) -> str:
    name = _text(one.file_name)
    sides = (
        ("annotated", one.annotated, f"annotated objects of {name}"),
        ("found", one.found, f"detections in {name}"),
    )
    pair = "".join(
        f'<div><span>{title}</span><img loading="lazy" src="{image}" alt="{alt}"></div>' for title, image, alt in sides
    )
    caption = f"<b>{name}</b> (id {one.image_id}): {one.summary}; costs {100 * one.loss:.2f} points of mAP"
    return f'<figure class="card"><div class="pair">{pair}</div><figcaption>{caption}</figcaption></figure>'


def label_errors(crops: Sequence[ErrorCrop], most_listed: int) -> str:
    """Crops of the surest ones, and a table of more."""
    if not crops:
        return "<p>None found.</p>"
    shown = "".join(_error_crop(one) for one in crops if one.crop)
    rows = [
        (one.file_name, one.image_id, "" if one.annotation_id is None else one.annotation_id,
         _KINDS[one.error.kind], one.text, round(one.error.suspicion, 3))
        for one in crops[:most_listed]
    ]  # fmt: skip
    listing = table(("file", "image id", "annotation id", "kind", "what", "suspicion"), rows, text=(0, 3, 4))
    rest = f", the first {most_listed} of {len(crops)}" if len(crops) > most_listed else ""
    return f'<div class="grid crops">{shown}</div><details><summary>As a table{rest}</summary>{listing}</details>'


def _error_crop(one: ErrorCrop) -> str:
    annotation = "" if one.annotation_id is None else f", annotation {one.annotation_id}"
    return (
        f'<figure class="card"><img loading="lazy" src="{one.crop}" alt="{_text(one.text)} in {_text(one.file_name)}">'
        f'<figcaption><span class="tag">{_KINDS[one.error.kind]}</span> <b>{_text(one.text)}</b><br>'
        f"{_text(one.file_name)}{annotation}</figcaption></figure>"
    )


def image_grid(images: Sequence[str], name: str) -> str:
    """Small images beside each other."""
    return (
        '<div class="grid crops">'
        + "".join(
            f'<figure class="card"><img loading="lazy" src="{image}" alt="{_text(name)} {i}"></figure>'
            for i, image in enumerate(images, 1)
        )
        + "</div>"
    )


def percent(value: float) -> str:
    """A share as a number of points, with one decimal."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"  # noqa: RUF001  # the dash of tables


def bounds(limits: tuple[float, float]) -> str:
    """An interval in points."""
    return "" if math.isnan(limits[0]) else f"{100 * limits[0]:.1f} to {100 * limits[1]:.1f}"


def share_bounds(limits: tuple[float, float]) -> str:
    """An interval beside shares from 0 to 1, as the tables of classes have them."""
    return "–" if math.isnan(limits[0]) else f"{limits[0]:.3f} to {limits[1]:.3f}"  # noqa: RUF001  # the dash of tables


def _cell(cell: Cell, column: int, text: Sequence[int]) -> str:
    if isinstance(cell, float):
        shown, value = ("–", "") if math.isnan(cell) else (f"{cell:.3f}", repr(cell))  # noqa: RUF001
        return f'<td data-value="{value}">{shown}</td>'
    return f"<td{_align(column, text)}>{_text(str(cell))}</td>"


def _align(column: int, text: Sequence[int]) -> str:
    return ' class="text"' if column in text else ""


def _named(svg: str, title: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_text(title)}" ', 1)


def _text(text: str) -> str:
    return html.escape(text)
