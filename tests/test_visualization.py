import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from lightning_convnext_det.visualization import class_colors, contact_sheet, draw_detections

GREY = (128, 128, 128)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def covered(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Where a colour stands, bool [H, W]."""
    return (pixels(image) == color).all(-1)


def ink(image: Image.Image) -> np.ndarray:
    """Where black text stands, bool [H, W]; small text is grey at its edges."""
    return np.asarray(image).sum(-1, dtype=np.int16) < 120


def test_draw_detections__frame_lies_on_the_edges_of_the_box() -> None:
    image = Image.new("RGB", (300, 300), GREY)
    drawn = draw_detections(image, torch.tensor([[50.0, 100.0, 150.0, 200.0]]), ["a"], colors={"a": (255, 0, 0)})
    red = covered(drawn, (255, 0, 0))
    assert red[199, 50:150].all()
    assert red[150:200, 50].all()
    assert red[150:200, 149].all()
    assert not red[200:].any()
    assert not red[:, :50].any()
    assert (pixels(drawn)[110:190, 60:140] == GREY).all()


def test_draw_detections__label_is_a_plate_above_the_box_with_text_of_contrast() -> None:
    image = Image.new("RGB", (300, 300), GREY)
    for color, text in (((255, 255, 0), (0, 0, 0)), ((0, 0, 160), (255, 255, 255))):
        drawn = draw_detections(image, [[50, 100, 150, 200]], ["cat"], [0.9], colors={"cat": color})
        above = drawn.crop((50, 85, 105, 100))
        assert covered(above, color).mean() > 0.3
        assert (np.abs(pixels(above) - text).sum(-1) < 120).sum() > 20


def test_draw_detections__no_boxes_returns_an_equal_copy() -> None:
    image = Image.new("RGB", (301, 303), GREY)
    drawn = draw_detections(image, torch.zeros(0, 4), [], torch.zeros(0))
    assert drawn is not image
    assert ImageChops.difference(drawn, image).getbbox() is None


def test_draw_detections__leaves_image_and_boxes_alone() -> None:
    boxes = torch.tensor([[5.0, 5.0, 250.0, 250.0]])
    image, tensor = Image.new("RGB", (300, 300), GREY), torch.full((3, 300, 300), 128, dtype=torch.uint8)
    for given in (image, tensor, tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        drawn = draw_detections(given, boxes, ["a"], [0.5])
        assert not (pixels(drawn) == GREY).all()
    assert (pixels(image) == GREY).all()
    assert tensor.eq(128).all()
    assert boxes.tolist() == [[5, 5, 250, 250]]


def test_draw_detections__tensor_and_image_give_the_same(photos: list[torch.Tensor]) -> None:
    photo = photos[0]
    image = Image.fromarray(photo.permute(1, 2, 0).numpy())
    expected = pixels(draw_detections(image, [[10, 10, 200, 200]], ["a"], [0.5]))
    for tensor in (photo, photo.float() / 255):
        assert (pixels(draw_detections(tensor, [[10, 10, 200, 200]], ["a"], [0.5])) == expected).all()


def test_draw_detections__stronger_lies_on_top_in_any_order() -> None:
    image = Image.new("RGB", (300, 300), GREY)
    colors = {"weak": (255, 0, 0), "strong": (0, 255, 0)}
    box = [100.0, 100.0, 200.0, 200.0]
    for names, scores in ((["weak", "strong"], [0.1, 0.9]), (["strong", "weak"], [0.9, 0.1])):
        drawn = draw_detections(image, [box, box], names, torch.tensor(scores), colors)
        assert covered(drawn, (0, 255, 0))[199, 100:200].all()
        # the stronger also takes the place above the box
        assert covered(drawn.crop((100, 80, 160, 100)), (0, 255, 0)).any()
        assert not covered(drawn.crop((100, 80, 160, 100)), (255, 0, 0)).any()


def test_draw_detections__plates_of_one_box_do_not_hide_each_other() -> None:
    image = Image.new("RGB", (640, 480), GREY)
    names = ["one", "two", "three", "four"]
    apart = [draw_detections(image, [[200, 150, 420, 380]], [name], [0.5], class_colors(names)) for name in names]
    drawn = draw_detections(image, [[200, 150, 420, 380]] * 4, names, [0.5] * 4, class_colors(names))
    for name, alone in zip(names, apart, strict=True):
        color = class_colors(names)[name]
        plate = covered(alone, color)
        plate[150:] = False  # above the box there is only the plate
        assert covered(drawn, color).sum() >= 0.9 * plate.sum()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("size", "scale"),
    [
        pytest.param((64, 64), 4, id="tiny"),
        pytest.param((64, 300), 2, id="small portrait"),
        pytest.param((239, 239), 2, id="just too small"),
        pytest.param((240, 240), 1, id="just large enough"),
        pytest.param((2000, 40), 1, id="strip"),
        pytest.param((6000, 4000), 1, id="huge"),
    ],
)
def test_draw_detections__label_stays_inside_and_scales_with_the_image(size: tuple[int, int], scale: int) -> None:
    width, height = size
    image, colors = Image.new("RGB", size, GREY), {"platelets": (255, 0, 0)}
    corner = [0.9 * width, 0.0, float(width), float(height)]  # no room above it, at its right or below
    middle = [0.2 * width, 0.5 * height, 0.3 * width, 0.6 * height]
    drawn = draw_detections(image, [corner], ["platelets"], [0.87], colors)
    assert drawn.size == (width * scale, height * scale)
    rows = np.flatnonzero(ink(drawn).any(1))
    assert rows[-1] - rows[0] >= max(7, 0.01 * min(drawn.size))
    assert ink(drawn).sum() == ink(draw_detections(image, [middle], ["platelets"], [0.87], colors)).sum()  # all letters


def test_draw_detections__a_label_wider_than_the_image_keeps_its_score() -> None:
    image = Image.new("RGB", (240, 240), GREY)
    name, box = "a very long name of a class " * 5, [0, 100, 200, 200]
    low, high = (pixels(draw_detections(image, [box], [name], [score])) for score in (0.11, 0.88))
    columns = np.flatnonzero((low != high).any((0, 2)))
    assert columns.size >= 5
    assert columns.min() > 200
    assert (low[95, :5] != GREY).any(), "the name begins at the left"


def test_draw_detections__crowd_keeps_the_strongest_label_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 400
    boxes = torch.cat([corners, corners + 20 + 60 * torch.rand(60, 2, generator=generator)], 1)
    scores = torch.linspace(0.01, 0.9, 60)
    names = ["cell"] * 59 + ["strongest"]
    colors = {"cell": (255, 255, 255), "strongest": (255, 255, 0)}
    drawn = draw_detections(Image.new("RGB", (500, 500), GREY), boxes, names, scores, colors)
    yellow = covered(drawn, (255, 255, 0))
    x, y = (round(v) for v in boxes[59, :2].tolist())
    rows = np.flatnonzero(yellow[:, max(0, x)])
    assert rows[0] < y  # a plate above the box, not covered by any of the 59 others
    plate = drawn.crop((x, rows[0], x + 40, y))
    assert not covered(plate, (255, 255, 255)).any()


def test_draw_detections__boxes_of_an_enlarged_image_grow_with_it() -> None:
    drawn = draw_detections(Image.new("RGB", (60, 60), GREY), [[10, 20, 50, 55]], ["a"], colors={"a": (255, 0, 0)})
    rows, columns = np.nonzero(covered(drawn, (255, 0, 0)))
    assert (columns.min(), columns.max() + 1, rows.max() + 1) == (40, 200, 220)


def test_draw_detections__text_shrinks_in_a_crowd() -> None:
    heights = []
    for number in (1, 40):
        boxes = torch.tensor([[10.0, 100.0, 60.0, 200.0]]).repeat(number, 1)
        boxes[1:] += torch.tensor([300.0, 0, 300, 0]) + 8 * torch.arange(1, number)[:, None]
        names = ["the first"] + ["another long name"] * (number - 1)
        colors = {"the first": (255, 255, 0), "another long name": (0, 0, 255)}
        drawn = draw_detections(Image.new("RGB", (1000, 600), GREY), boxes, names, None, colors)
        above = np.flatnonzero(covered(drawn, (255, 255, 0))[:100, 10:30].any(1))
        heights.append(above.max() - above.min() + 1)
    assert 12 <= heights[1] < 0.9 * heights[0]


@pytest.mark.heavy
def test_draw_detections__small_box_is_not_filled_by_its_frame() -> None:
    drawn = draw_detections(Image.new("RGB", (4000, 4000), GREY), [[2000, 2000, 2012, 2012]], ["a"], None)
    assert (pixels(drawn)[2002:2010, 2002:2010] == GREY).all()


@pytest.mark.parametrize(
    "box",
    [
        pytest.param([-50.0, -50.0, 20.0, 20.0], id="overhanging"),
        pytest.param([500.0, 500.0, 600.0, 600.0], id="outside"),
        pytest.param([10.0, 10.0, 10.0, 10.0], id="no area"),
        pytest.param([90.0, 90.0, 10.0, 10.0], id="corners swapped"),
    ],
)
def test_draw_detections__odd_boxes_are_drawn_inside(box: list[float]) -> None:
    drawn = draw_detections(Image.new("RGB", (300, 300), GREY), [box], ["a"], [1.0], {"a": (255, 0, 0)})
    assert covered(drawn, (255, 0, 0)).any()


def test_draw_detections__half_precision_boxes() -> None:
    image = Image.new("RGB", (300, 300), GREY)
    boxes, scores = torch.tensor([[16.0, 32.0, 64.0, 128.0]]), torch.tensor([0.5])
    expected = pixels(draw_detections(image, boxes, ["a"], scores))
    assert (pixels(draw_detections(image, boxes.bfloat16(), ["a"], scores.bfloat16())) == expected).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_draw_detections__image_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (400, 300), GREY).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        drawn = draw_detections(image, [[0, 0, 10, 10]], ["a"])
    assert drawn.size == ((300, 400) if orientation in (6, 8) else (400, 300))


@pytest.mark.parametrize("mode", ["L", "1", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_draw_detections__any_mode_of_8_bits(mode: str) -> None:
    drawn = draw_detections(Image.new(mode, (300, 300)), [[50, 50, 200, 200]], ["a"], [0.5])
    assert (drawn.mode, drawn.size) == ("RGB", (300, 300))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_draw_detections__modes_that_pillow_would_spoil_are_refused(mode: str) -> None:
    with pytest.raises(TypeError, match=f"mode {mode}; convert it"):
        draw_detections(Image.new(mode, (300, 300)), [[50, 50, 200, 200]], ["a"])


@pytest.mark.parametrize(
    ("boxes", "names", "scores", "message"),
    [
        pytest.param([[1, 2, 3]], ["a"], None, r"boxes has shape \[1, 3\]; expected \[N, 4\]", id="three corners"),
        pytest.param([1, 2, 3, 4], ["a"], None, r"boxes has shape \[4\]", id="one box without its dimension"),
        pytest.param([[1, 2, 3, 4]], ["a", "b"], None, "2 names for 1 boxes", id="names"),
        pytest.param([[1, 2, 3, 4]], ["a"], [0.1, 0.2], "1 names and 2 scores for 1 boxes", id="scores"),
        pytest.param([[1, 2, 3, float("nan")]], ["a"], None, "not finite", id="nan"),
    ],
)
def test_draw_detections__wrong_input(boxes: list, names: list[str], scores: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_detections(Image.new("RGB", (300, 300)), boxes, names, scores)


def test_draw_detections__wrong_tensor() -> None:
    with pytest.raises(TypeError, match=r"\[300, 300, 3\] of torch.uint8; expected \[1, 3 or 4, height, width\]"):
        draw_detections(torch.zeros(300, 300, 3, dtype=torch.uint8), [[1, 2, 3, 4]], ["a"])


def test_draw_detections__missing_font_is_named() -> None:
    with pytest.raises(ValueError, match=r"font 'no/such.ttf' cannot be used .*; give the path"):
        draw_detections(Image.new("RGB", (300, 300)), [[1, 2, 30, 40]], ["a"], font="no/such.ttf")


def test_draw_detections__another_font_is_used() -> None:
    font = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    image = Image.new("RGB", (300, 300), GREY)
    plain, drawn = (pixels(draw_detections(image, [[50, 50, 200, 200]], ["cat"], font=f)) for f in (None, str(font)))
    assert (plain != drawn).any()


@pytest.mark.heavy
def test_draw_detections__color_of_a_name_is_the_same_in_every_process() -> None:
    program = (
        "from PIL import Image; from lightning_convnext_det.visualization import draw_detections as d; import zlib;"
        "x = d(Image.new('RGB', (300, 300)), [[50, 50, 200, 200], [80, 80, 150, 150]], ['cat', 'dog'], [0.5, 0.6]);"
        "print(zlib.crc32(x.tobytes()))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env={"PYTHONHASHSEED": seed, **ENV})
        for seed in ("1", "2")
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert outputs[0] == outputs[1] != b""


ENV = {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize("number", [1, 3, 20, 80])
def test_class_colors__all_differ(number: int) -> None:
    colors = np.array(list(class_colors([str(i) for i in range(number)]).values()))
    assert colors.shape == (number, 3)
    assert len(np.unique(colors, axis=0)) == number
    if number in (3, 20):
        distance = np.abs(colors[:, None] - colors[None]).sum(-1)
        assert distance[~np.eye(number, dtype=bool)].min() > (250 if number == 3 else 50)


def test_class_colors__a_class_added_at_the_end_changes_no_other() -> None:
    few, many = class_colors(["a", "b"]), class_colors(["a", "b", "c"])
    assert {name: many[name] for name in few} == few


def test_class_colors__more_classes_than_colors() -> None:
    assert len(class_colors([str(i) for i in range(1203)])) == 1203  # LVIS


def test_contact_sheet__images_stand_in_rows_and_keep_their_proportions() -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    sizes = [(200, 100), (50, 100), (1000, 1000)]
    sheet = contact_sheet((Image.new("RGB", s, c) for s, c in zip(sizes, colors, strict=True)), 2, tile_size=100)
    found = []
    for color in colors:
        rows, columns = np.nonzero(covered(sheet, color))
        found.append((columns.max() - columns.min() + 1, rows.max() - rows.min() + 1, rows.min(), columns.min()))
    assert [f[:2] for f in found] == [(100, 50), (50, 100), (100, 100)]
    assert found[0][2] == found[1][2] < found[2][2]
    assert found[0][3] == found[2][3] < found[1][3]
    assert sheet.width < 220


def test_contact_sheet__captions_are_below_their_images() -> None:
    images = [Image.new("RGB", (100, 100), GREY)] * 3
    plain = contact_sheet(images, 2, tile_size=100)
    sheet = contact_sheet(images, 2, tile_size=100, captions=["one", "", "a caption much wider than its tile"])
    assert sheet.height >= plain.height + 2 * 8
    assert sheet.width == plain.width
    rows, columns = np.nonzero(ink(sheet))
    assert rows.min() > 100
    assert columns.max() < 110  # the long one is shortened to its tile
    assert len(np.flatnonzero(np.diff(np.unique(rows)) > 50)) == 1  # two lines of captions


def test_contact_sheet__a_line_of_pixels() -> None:
    assert contact_sheet([Image.new("RGB", (2000, 2))], tile_size=100).width > 100


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        pytest.param([], {}, "at least one image", id="none"),
        pytest.param([Image.new("RGB", (9, 9))], {"columns": 0}, "at least 1, got 0 and 400", id="columns"),
        pytest.param([Image.new("RGB", (9, 9))], {"captions": ["a", "b"]}, "2 captions for 1 images", id="captions"),
    ],
)
def test_contact_sheet__wrong_input(images: list[Image.Image], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(images, **arguments)


def test_draw_detections__real_annotations_of_a_crowded_street(shared_data: Path) -> None:
    content = json.loads((shared_data / "coco_mini" / "annotations" / "instances_val2017.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    objects = [a for a in content["annotations"] if a["image_id"] == 296649]
    boxes = torch.tensor([a["bbox"] for a in objects])
    boxes[:, 2:] += boxes[:, :2]
    with Image.open(shared_data / "coco_mini" / "val2017" / "000000296649.jpg") as image:
        drawn = draw_detections(
            image, boxes, [names[a["category_id"]] for a in objects], None, class_colors(names.values())
        )
        changed = (pixels(drawn) != pixels(image)).any(-1)
    assert len(boxes) == 26
    assert 0.03 < changed.mean() < 0.25  # boxes are there, and the street is still to be seen
