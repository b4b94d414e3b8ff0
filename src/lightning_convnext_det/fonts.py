"""Fonts of drawings: Pillow's own, which has ASCII only, and others where names need them."""

import functools
import logging
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from lightning_convnext_det.errors import ArgumentError

_logger = logging.getLogger(__name__)
_KNOWN = (  # of Linux, macOS and Windows; Pillow finds them by name
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc",
    "PingFang.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf",
)  # fmt: skip
_ABSENT = "\U0010ffff"  # a character of no font, which is drawn as a box
_warned: set[str] = set()  # characters that this process has warned of


@functools.cache
def load_font(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    """Load a font in pixels; None for Pillow's own.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        font = ImageFont.truetype(path, size) if path is not None else ImageFont.load_default(size)
    except OSError as error:
        raise ArgumentError(
            f"font '{path}' cannot be used ({error}); give the path of a TrueType or OpenType file"
        ) from None
    assert isinstance(font, ImageFont.FreeTypeFont)  # all wheels of Pillow have FreeType
    return font


def font_for(texts: Iterable[str]) -> str | None:
    """The first font that can write some texts: None for Pillow's own, else the name or path of one that is installed.

    A warning names the characters that none of them has, once.

    >>> font_for(["cat", "traffic light"]) is None
    True
    """
    needed = "".join(sorted({character for text in texts for character in text if not character.isspace()}))
    if needed.isascii():
        return None
    font, missing = _best_font(needed)
    if unseen := [character for character in missing if character not in _warned]:
        _warned.update(unseen)
        _logger.warning(
            "no font here can write '%s' in drawings: give the path of one that can, as output.font or font=",
            "".join(unseen),
        )
    return font


@functools.cache
def _best_font(characters: str) -> tuple[str | None, str]:
    """The font that has most of some characters, and those that it lacks."""
    best, least = None, characters
    for font in (None, *_KNOWN, *_of_matplotlib()):
        missing = _missing(font, characters)
        if len(missing) < len(least):
            best, least = font, missing
        if not least:
            break
    return best, least


def _missing(font: str | None, characters: str) -> str:
    """The characters that a font lacks; all of them if it is not installed."""
    try:
        loaded = load_font(font, 20)
    except ValueError:
        return characters
    absent = loaded.getmask(_ABSENT)
    drawn = ((character, loaded.getmask(character)) for character in characters)
    return "".join(c for c, mask in drawn if mask.size == absent.size and bytes(mask) == bytes(absent))


def _of_matplotlib() -> list[str]:
    """The font that matplotlib carries, if it is installed: Latin, Greek, Cyrillic and more."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return []
    return [str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")]
