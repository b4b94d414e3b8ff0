import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_convnext_det import DeformableDETR

SIZES = [(64, 64), (64, 96), (96, 128), (128, 160), (160, 96)]


@pytest.mark.heavy
def test_predict__compiles_to_one_graph_for_all_sizes_after_the_third() -> None:
    torch.manual_seed(0)
    detector = DeformableDETR(
        3, backbone="test_convnext", hidden_dim=32, encoder_layers=1, decoder_layers=1, num_queries=10
    ).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(detector.predict, backend=counter, fullgraph=True)  # an error where the graph breaks
    graphs = []
    with torch.no_grad():
        for size in SIZES:
            batch = torch.randn(2, 3, *size)
            for found, expected in zip(compiled(batch).decoder, detector.predict(batch).decoder, strict=True):
                assert torch.equal(found, expected)
            graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[2:] == [graphs[2]] * 3  # a size of each kind, then both sides free
    assert graphs[2] <= 3
