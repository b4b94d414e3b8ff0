from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.ops.depthwise_conv import DepthwiseConv2d, use_fast_depthwise


def _gradients(conv: nn.Module, x: Tensor, factors: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (conv(x) * factors).sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in conv.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("size", "kernel"), [((2, 3, 9, 7), (7, 7)), ((1, 4, 1, 6), (5, 7)), ((3, 2, 2, 2), (11, 5))], ids=str
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_depthwise_conv__has_the_gradients_of_conv2d(
    size: tuple[int, int, int, int], kernel: tuple[int, int], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    channels, padding = size[1], (kernel[0] // 2, kernel[1] // 2)
    fast = DepthwiseConv2d(channels, channels, kernel, padding=padding, groups=channels, dtype=torch.float64)
    plain = nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels, dtype=torch.float64)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(size, dtype=torch.float64).contiguous(memory_format=memory_format)
    factors = torch.randn(size, dtype=torch.float64)
    for got, wanted in zip(_gradients(fast, x, factors), _gradients(plain, x, factors), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_depthwise_conv__is_as_close_to_float64_as_conv2d(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = nn.Conv2d(6, 6, 7, padding=3, groups=6, dtype=torch.float64)
    x, factors = torch.randn(2, 6, 12, 10, dtype=torch.float64), torch.randn(2, 6, 12, 10, dtype=torch.float64)
    wanted = _gradients(deepcopy(exact), x, factors)
    fast = deepcopy(exact)
    use_fast_depthwise(fast)
    assert type(fast) is DepthwiseConv2d
    got = _gradients(fast.to(dtype), x.to(dtype), factors.to(dtype))
    rounding = 4 * torch.finfo(dtype).eps
    for one, other in zip(got, wanted, strict=True):
        assert float((one.double() - other).abs().max() / other.abs().max()) < rounding


def test_depthwise_conv__under_autocast_gives_gradients_in_the_weights_precision() -> None:
    conv, x = DepthwiseConv2d(3, 3, 5, padding=2, groups=3), torch.randn(1, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        convolved = conv(x)
        reference = nn.Conv2d.forward(conv, x)
    assert convolved.dtype == torch.bfloat16
    torch.testing.assert_close(convolved, reference)
    convolved.float().sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


def test_depthwise_conv__passes_gradcheck_twice() -> None:
    conv = DepthwiseConv2d(2, 2, 5, padding=2, groups=2, dtype=torch.float64)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv, (x,))
    assert torch.autograd.gradgradcheck(conv, (x,))


def test_depthwise_conv__gives_torch_func_the_gradients_of_each_image() -> None:
    torch.manual_seed(0)
    fast = DepthwiseConv2d(3, 3, 5, padding=2, groups=3, dtype=torch.float64)
    plain = nn.Conv2d(3, 3, 5, padding=2, groups=3, dtype=torch.float64)
    plain.load_state_dict(fast.state_dict())
    images = torch.randn(4, 1, 3, 6, 5, dtype=torch.float64)

    def gradients(conv: nn.Module) -> dict[str, Tensor]:
        weights = {name: parameter.detach() for name, parameter in conv.named_parameters()}
        loss = lambda weights, x: torch.func.functional_call(conv, weights, (x,)).square().sum()  # noqa: E731
        found: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)
        return found

    for name, wanted in gradients(plain).items():
        torch.testing.assert_close(gradients(fast)[name], wanted)


def test_use_fast_depthwise__takes_only_what_it_computes() -> None:
    kinds = {
        "depthwise": nn.Conv2d(4, 4, 7, padding=3, groups=4),
        "small": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "strided": nn.Conv2d(4, 4, 7, stride=2, padding=3, groups=4),
        "dilated": nn.Conv2d(4, 4, 5, padding=4, dilation=2, groups=4),
        "shrinking": nn.Conv2d(4, 4, 7, groups=4),
        "named padding": nn.Conv2d(4, 4, 7, padding="same", groups=4),
        "reflecting": nn.Conv2d(4, 4, 7, padding=3, groups=4, padding_mode="reflect"),
        "dense": nn.Conv2d(4, 4, 7, padding=3),
        "multiplying": nn.Conv2d(4, 8, 7, padding=3, groups=4),
    }
    use_fast_depthwise(nn.ModuleDict(kinds))
    assert [name for name, conv in kinds.items() if type(conv) is DepthwiseConv2d] == ["depthwise"]


def test_timm_pyramid__learns_by_fast_depthwise_convolutions() -> None:
    pyramid = TimmPyramid("test_convnext")
    depthwise = [m for m in pyramid.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise
    assert {type(m) for m in depthwise} == {DepthwiseConv2d}
