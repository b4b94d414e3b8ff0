import copy

import pytest
import torch
from timm.layers.mlp import GlobalResponseNormMlp, Mlp
from torch import Tensor, nn

from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.deformable_detr.transformer import FeedForward
from lightning_convnext_det.models.mlp import BlockMlp, BlockResponseNormMlp, use_fast_mlps
from lightning_convnext_det.models.response_norm import use_fast_response_norm
from lightning_convnext_det.ops import token_blocks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_blocks, "_MIN_HIDDEN", 0)
    monkeypatch.setattr(token_blocks, "_BLOCK", 0)
    monkeypatch.setattr(token_blocks, "_MIN_TOKENS", 4)


def count_calls(module: nn.Module, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note how many tokens each call of a layer takes, without a hook."""
    forward = type(module).forward

    def counted(self: nn.Module, x: Tensor) -> Tensor:
        if self is module:
            calls.append(x.numel() // x.shape[-1])
        return forward(self, x)

    monkeypatch.setattr(type(module), "forward", counted)


@pytest.mark.parametrize("kind", [Mlp, GlobalResponseNormMlp])
def test_use_fast_mlps__timm(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = kind(8, 32).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = nn.ModuleList([copy.deepcopy(theirs)])
    use_fast_response_norm(ours)
    use_fast_mlps(ours)
    calls: list[int] = []
    count_calls(ours[0].fc1, calls, monkeypatch)
    x = torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        found = ours[0](x)
        assert max(calls) == 4
        assert sum(calls) == 30
        torch.testing.assert_close(found, theirs(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours[0](x), theirs(x), rtol=1e-2, atol=1e-1)


def test_use_fast_mlps__convolutions_and_subclasses_stay() -> None:
    class Own(Mlp):
        pass

    layers = nn.ModuleList([Mlp(8, use_conv=True), Own(8), Mlp(8, norm_layer=nn.BatchNorm1d)])
    use_fast_mlps(layers)
    assert [type(layer) for layer in layers] == [BlockMlp, Own, Mlp]
    with torch.no_grad():
        assert layers[0].eval()(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize(("name", "kind"), [("test_convnext2", BlockMlp), ("convnextv2_atto", BlockResponseNormMlp)])
def test_timm_pyramid__has_mlps_in_blocks(name: str, kind: type[nn.Module]) -> None:
    modules = list(TimmPyramid(name).modules())
    assert {type(module) for module in modules if isinstance(module, Mlp | GlobalResponseNormMlp)} == {kind}


def test_feed_forward__in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, calls = FeedForward(8, 32, 0.1).eval(), torch.randn(2, 9, 8), []
    whole = layer(x)  # gradients may be asked for
    count_calls(layer.linear1, calls, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole, rtol=0, atol=1e-6)
    assert calls == [4, 4, 4, 4, 2]
