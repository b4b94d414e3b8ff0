import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.response_norm import ResponseNorm, use_fast_response_norm


def pair(channels_last: bool = True) -> tuple[GlobalResponseNorm, GlobalResponseNorm]:
    """timm's layer, and the fast one with the same weights."""
    torch.manual_seed(0)
    theirs, ours = (
        GlobalResponseNorm(16, channels_last=channels_last),
        GlobalResponseNorm(16, channels_last=channels_last),
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    use_fast_response_norm(ours)
    assert type(ours) is ResponseNorm
    return theirs, ours


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_response_norm__timm(scale: float, channels_last: bool) -> None:
    norms = pair(channels_last)
    x, factors = torch.randn(2, 9, 7, 16) * scale, torch.randn(2, 9, 7, 16)
    x[..., 3] = 0  # a channel without any response
    if not channels_last:
        x, factors = x.permute(0, 3, 1, 2), factors.permute(0, 3, 1, 2)
    inputs = [x.clone().requires_grad_() for _ in norms]
    expected, found = (norm(given) for norm, given in zip(norms, inputs, strict=True))
    for output in (expected, found):
        (output * factors).sum().backward()

    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    for got, wanted in ((inputs[1], inputs[0]), *zip(norms[1].parameters(), norms[0].parameters(), strict=True)):
        assert got.grad.isfinite().all()
        assert (got.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm()


def test_response_norm__timm_for_other_dtypes() -> None:
    theirs, ours = pair()
    x = torch.randn(1, 5, 4, 16) * 300  # whose squares float16 cannot hold

    assert torch.equal(ours.half()(x.half()), theirs.half()(x.half()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.float()(x), theirs.float()(x))


def test_timm_pyramid__normalises_responses_fast() -> None:
    kinds = {type(m) for m in TimmPyramid("convnextv2_atto").modules() if isinstance(m, GlobalResponseNorm)}
    assert kinds == {ResponseNorm}
