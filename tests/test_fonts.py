from pathlib import Path

import pytest
import torch
from PIL import ImageFont

from lightning_convnext_det import fonts
from lightning_convnext_det.fonts import font_for, load_font
from lightning_convnext_det.visualization import draw_detections

pytest.importorskip("matplotlib")  # whose font has Latin, Greek and Cyrillic


def ink(font: str | None, text: str) -> bytes:
    return bytes(load_font(font, 20).getmask(text))


def test_font_for__other_scripts_than_ascii() -> None:
    font = font_for(["naïve café", "кошка", "γάτα"])
    assert font is not None
    assert len({ink(font, letter) for letter in "éïкшγά"}) == 6
    assert {ink(None, letter) for letter in "éкγ"} == {ink(None, "\U0010ffff")}  # why it is needed
    assert font_for(["cat", "traffic\u202flight", ""]) is None


def test_font_for__what_no_font_has_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fonts, "_warned", set())
    for _ in range(2):
        font_for(["\ue123", "é"])  # private use
    assert caplog.text.count("no font here can write '\ue123' in drawings") == 1


def test_draw_detections__names_beyond_ascii() -> None:
    image, box = torch.zeros(3, 240, 240, dtype=torch.uint8), [[20.0, 40.0, 200.0, 200.0]]
    colors = dict.fromkeys(("é", "ü"), (255, 255, 255))
    assert draw_detections(image, box, ["é"], None, colors) != draw_detections(image, box, ["ü"], None, colors)


def test_load_font__wrong_file(tmp_path: Path) -> None:
    assert isinstance(load_font(None, 12), ImageFont.FreeTypeFont)
    with pytest.raises(ValueError, match="cannot be used"):
        load_font(str(tmp_path / "none.ttf"), 12)
