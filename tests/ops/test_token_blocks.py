from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_convnext_det.ops import token_blocks
from lightning_convnext_det.ops.token_blocks import is_worthwhile, map_tokens


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_blocks, "_MIN_HIDDEN", 5 * 32 * 4)
    monkeypatch.setattr(token_blocks, "_BLOCK", 2 * 32 * 4)
    monkeypatch.setattr(token_blocks, "_MIN_TOKENS", 1)


def create_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 6)).eval()


@pytest.mark.parametrize("shape", [(7, 8), (1, 8), (2, 3, 8), (2, 3, 5, 8)])
def test_map_tokens__whole_map(shape: tuple[int, ...]) -> None:
    layers, x, sizes = create_layers(), torch.randn(shape), []

    def count(block: torch.Tensor) -> torch.Tensor:
        sizes.append(len(block))
        return layers(block)

    with torch.no_grad():
        torch.testing.assert_close(map_tokens(count, x, 32), layers(x), rtol=0, atol=1e-6)
    assert max(sizes) <= 2
    assert sum(sizes) == x.numel() // 8


def test_map_tokens__columns_that_are_not_contiguous() -> None:
    layers, x = create_layers(), torch.randn(2, 8, 3, 5).permute(0, 2, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(map_tokens(layers, x, 32), layers(x), rtol=0, atol=1e-6)


def test_map_tokens__autocast() -> None:
    layers, x = create_layers(), torch.randn(9, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = map_tokens(layers, x, 32)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, layers(x), rtol=0, atol=1e-2)


def test_is_worthwhile__from_the_size_of_the_hidden_map() -> None:
    layers = create_layers()
    with torch.no_grad():
        assert is_worthwhile(torch.zeros(5, 8), layers, layers[0])
        assert not is_worthwhile(torch.zeros(4, 8), layers, layers[0])
        assert not is_worthwhile(torch.zeros(0, 8), layers, layers[0])
        with torch.autocast("cpu", torch.bfloat16):  # elements of half the size
            assert not is_worthwhile(torch.zeros(9, 8), layers, layers[0])
            assert is_worthwhile(torch.zeros(10, 8), layers, layers[0])


def with_hook(layers: nn.Sequential) -> nn.Module:
    layers[1].register_forward_hook(lambda *_: None)
    return layers


def with_other_layer(layers: nn.Sequential) -> nn.Module:
    layers[0] = nn.Sequential(layers[0])  # such as an adapter around it
    return layers


@pytest.mark.parametrize("change", [with_hook, with_other_layer, nn.Module.train])
def test_is_worthwhile__no(change: Callable[[nn.Sequential], nn.Sequential]) -> None:
    layers, x = create_layers(), torch.zeros(50, 8)
    assert not is_worthwhile(x, layers, layers[0])  # gradients may be asked for
    with torch.no_grad():
        assert is_worthwhile(x, layers, layers[0])
        layers = change(layers)
        assert not is_worthwhile(x, layers, layers[0])


def test_is_worthwhile__not_under_torch_func() -> None:
    layers = create_layers()
    seen: list[bool] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_worthwhile(x, layers, layers[0]))
        return layers(x)

    with torch.no_grad():
        torch.func.vmap(call)(torch.zeros(3, 50, 8))
    assert seen == [False]
