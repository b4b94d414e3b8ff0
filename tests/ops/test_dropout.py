from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_convnext_det.ops.dropout import Dropout, relu_dropout

SHAPE = (3, 500, 257)  # several blocks, the last of which is not whole


def dropped(probability: float, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Which of some ones become zero."""
    torch.manual_seed(seed)
    return Dropout(probability)(torch.ones(shape)) == 0


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_dropout__share_and_mean(probability: float) -> None:
    torch.manual_seed(0)
    output = Dropout(probability)(torch.ones(1000, 1000))
    deviation = (probability * (1 - probability) / output.numel()) ** 0.5
    assert abs(float((output == 0).float().mean()) - probability) < 4 * deviation
    assert abs(float(output.double().mean()) - 1) < 4 * deviation / (1 - probability)
    kept = output[output != 0]
    assert kept.unique().numel() == 1
    assert float(kept[0]) == pytest.approx(1 / (1 - probability), rel=1e-4)


def test_dropout__elements_and_calls_are_independent() -> None:
    torch.manual_seed(0)
    layer = Dropout(0.5)
    first, second = (layer(torch.ones(1 << 20)) - 1 for _ in range(2))  # -1 or 1
    limit = 4 / len(first) ** 0.5
    for distance in (1, 2, 3, 4, 8, 1 << 17):  # neighbours of one draw, draws after one another, blocks
        assert abs(float((first[:-distance] * first[distance:]).mean())) < limit * 1.1
    assert abs(float((first * second).mean())) < limit


def test_dropout__each_row_has_its_share() -> None:
    counts = dropped(0.1, shape=(2000, 2000)).sum(1).double()
    assert float(counts.mean()) == pytest.approx(200, abs=4 * (180 / 2000) ** 0.5)
    assert float(counts.var()) == pytest.approx(180, rel=0.15)  # of a binomial distribution


def test_dropout__follows_torchs_generator() -> None:
    assert torch.equal(dropped(0.1, seed=1), dropped(0.1, seed=1))
    assert not torch.equal(dropped(0.1, seed=1), dropped(0.1, seed=2))
    layer, ones = Dropout(0.1), torch.ones(100)
    layer(ones)
    state = torch.get_rng_state()
    follows = layer(ones)
    torch.set_rng_state(state)
    assert torch.equal(layer(ones), follows)


def test_dropout__gradient_is_that_of_the_mask() -> None:
    x, factors = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    torch.manual_seed(3)
    output = Dropout(0.2)(x)
    output.backward(factors)
    scale = torch.where(dropped(0.2, 3), 0.0, 65536 / (65536 - round(0.2 * 65536)))
    torch.testing.assert_close(output, x * scale)
    torch.testing.assert_close(x.grad, factors * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_dropout__equals_both_in_turn(dtype: torch.dtype) -> None:
    given = torch.randn(SHAPE, dtype=dtype)
    factors = torch.randn(SHAPE, dtype=dtype)
    outputs, gradients = [], []
    for fused in (False, True):
        torch.manual_seed(5)
        x = given.clone().requires_grad_()
        layer = Dropout(0.3)
        output = relu_dropout(x * 1, layer) if fused else layer((x * 1).relu())
        output.backward(factors)
        outputs.append(output)
        gradients.append(x.grad)
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(gradients[1], gradients[0])


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_dropout__nothing_or_all(probability: float) -> None:
    x = torch.randn(10, 10)
    assert torch.equal(Dropout(probability)(x), x * (probability < 1) / (1 - probability or 1))
    assert torch.equal(relu_dropout(x.clone(), Dropout(0.0)), x.relu())


def test_dropout__evaluation_and_other_layouts() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(relu_dropout(x.clone(), Dropout(0.5).eval()), x.relu())
    for output in (Dropout(0.5)(x.T), relu_dropout(x.clone().T, Dropout(0.5))):
        assert output.shape == (6, 4)
    assert Dropout(0.5)(torch.zeros(0, 3)).shape == (0, 3)


def test_dropout__under_torch_compile_is_torchs() -> None:
    compiled = torch.compile(nn.Sequential(Dropout(0.5)), backend="eager", fullgraph=True)
    torch.manual_seed(0)
    found = compiled(torch.ones(50))
    torch.manual_seed(0)
    assert torch.equal(found, nn.Dropout(0.5)(torch.ones(50)))


@pytest.mark.parametrize("layer", [Dropout(0.5), lambda x: relu_dropout(x + 0, Dropout(0.5))], ids=["dropout", "relu"])
def test_dropout__under_torch_func_is_torchs(layer: Callable[[Tensor], Tensor]) -> None:
    gradient = torch.func.grad(lambda x: layer(x).sum())
    assert set(gradient(torch.ones(100)).tolist()) == {0.0, 2.0}
    masks = torch.func.vmap(layer, randomness="different")(torch.ones(3, 100))
    assert len({tuple(mask) for mask in masks.tolist()}) == 3
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(layer)(torch.ones(3, 100))
