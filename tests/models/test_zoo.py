import pytest
import torch

from lightning_convnext_det.models.zoo import create_detector, list_detectors

# FPN-256, three anchors per level, 91 logits; Deformable DETR as on the model card
PARAMETERS = [
    ("fasterrcnn_convnext_tiny_fpn", 45_504_566),
    ("fasterrcnn_convnext_small_fpn", 67_139_126),
    ("fasterrcnn_convnext_base_fpn", 105_373_270),
    ("fasterrcnn_convnextv2_tiny_fpn", 45_550_934),
    # the published 85,930,578 and 145,800,242, less the mask branch's 7,929,840 and the output norms, and with 10 more
    # classes and background's boxes in three stages
    ("cascadercnn_convnext_tiny_fpn", 85_930_578 - 7_929_840 - 2 * 1440 + 3 * (10 * 5 + 4) * 1025),
    ("cascadercnn_convnext_base_fpn", 145_800_242 - 7_929_840 - 2 * 1920 + 3 * (10 * 5 + 4) * 1025),
    # detrex's checkpoints, with 10 more classes: seven heads and the label embedding
    ("dino_convnext_tiny", 48_494_124 + 10 * (7 * 257 + 256)),
    ("dino_convnext_large", 219_019_020 + 10 * (7 * 257 + 256)),
    ("deformable_detr_boxref_convnextv2_tiny", 39_992_252 - 6 * 257),  # 90 of the model card's 91 slots
]
WITHOUT_BACKBONE = [
    "fasterrcnn_fpn",
    "cascadercnn_fpn",
    "deformable_detr",
    "deformable_detr_boxref",
    "deformable_detr_two_stage",
    "dino",
]
SMALL = [
    *WITHOUT_BACKBONE,
    "fasterrcnn_convnextv2_atto_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnext50_32x4d_fpn",
]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "parameters"), PARAMETERS, ids=[name for name, _ in PARAMETERS])
def test_create_detector__parameter_count(name: str, parameters: int) -> None:
    with torch.device("meta"):
        detector = create_detector(name, num_classes=90)
    assert sum(p.numel() for p in detector.parameters()) == parameters


def train_one_step(name: str) -> None:
    options: dict[str, object] = {"backbone": "test_convnext"} if name in WITHOUT_BACKBONE else {}
    if "rcnn" in name:
        options |= {"box_batch_size_per_image": 32, "rpn_post_nms_top_n": (100, 100)}
    detector = create_detector(name, 2, **options)
    detector.transform.min_sizes, detector.transform.max_size = [64], 96
    losses = detector(
        [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}]
    )
    loss = sum(losses.values())
    assert loss.isfinite()
    loss.backward()
    assert [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.heavy
@pytest.mark.parametrize("name", SMALL)
def test_create_detector__trains_one_step(name: str) -> None:
    train_one_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in list_detectors() if n not in SMALL])
def test_create_detector__large_ones_train_one_step(name: str) -> None:
    train_one_step(name)


def test_list_detectors__pattern() -> None:
    assert list_detectors("fasterrcnn_convnext_*") == [
        f"fasterrcnn_convnext_{size}_fpn" for size in ("base", "large", "small", "tiny", "xlarge")
    ]
    assert len(list_detectors("*convnextv2*fpn")) == 8
    assert list_detectors("nothing*") == []


def test_create_detector__overrides_reach_the_constructor() -> None:
    detector = create_detector("fasterrcnn_fpn", 2, backbone="test_convnext", detections_per_image=7, fpn_channels=16)
    assert detector.detections_per_image == 7
    assert detector.backbone.out_channels == 16


def test_create_detector__mistakes() -> None:
    with pytest.raises(ValueError, match="did you mean 'fasterrcnn_convnext_tiny_fpn'"):
        create_detector("fasterrcnn_convnext_tinny_fpn", 2)
    with pytest.raises(TypeError, match=r"has no argument 'score_treshold'; did you mean 'score_threshold'"):
        create_detector("fasterrcnn_resnet50_fpn", 2, score_treshold=0.5)
    with pytest.raises(TypeError, match="needs the timm name of its backbone"):
        create_detector("fasterrcnn_fpn", 2)
