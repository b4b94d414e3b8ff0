import pytest
import torch
import torch._dynamo
from torch import nn

from lightning_convnext_det import DINO, FasterRCNN
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.modules.compiled import compile_parts
from lightning_convnext_det.types import Target

SIZES = [(64, 80), (64, 112), (80, 64), (70, 90)]
TARGET = Target(boxes=torch.tensor([[4.0, 4.0, 30.0, 40.0]]), labels=torch.tensor([1]))
SMALL = {"num_queries": 8, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}
DETECTORS = {
    "faster": lambda: FasterRCNN(2, "test_convnext", min_size=64, max_size=128, fpn_channels=32, box_head_features=32),
    "dino": lambda: DINO(2, "test_convnext", min_size=64, max_size=128, **SMALL),
}


def compute_loss(detector: nn.Module, size: tuple[int, int]) -> float:
    height, width = size
    shorter = (height - 8, width) if height > width else (height, width - 8)  # so padded, but in the same frame
    images = [torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) for shape in (size, shorter)]
    torch.manual_seed(0)  # of sampling and denoising
    loss: torch.Tensor = sum(detector(images, [TARGET, TARGET]).values())
    loss.backward()
    return loss.item()


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it by itself
@pytest.mark.parametrize("name", DETECTORS)
def test_compile_parts__one_graph_for_each_part_and_none_after_the_third_size(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    detector = DETECTORS[name]()
    keys = list(detector.state_dict())
    expected = [compute_loss(detector, size) for size in SIZES]
    compile_parts(detector, backend="eager")  # what is compiled, and how often, does not depend on the compiler
    graphs = []
    for size, loss in zip(SIZES, expected, strict=True):
        assert compute_loss(detector, size) == pytest.approx(loss, rel=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == len(detector.compiled_parts)
    assert graphs[2] == graphs[-1]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(detector.state_dict()) == keys


def test_compile_parts__a_detector_that_names_none() -> None:
    with pytest.raises(ArgumentError, match="Linear has no compiled_parts"):
        compile_parts(nn.Linear(2, 2))
