import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_convnext_det.modules.fused_step import secure_fused_step


def create_optimizer(channels_last: bool = False, fused: bool = True) -> AdamW:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kernels = [nn.Parameter(torch.randn(shape).to(memory_format=layout)) for shape in ((4, 3, 5, 2), (6, 1, 7, 7))]
    optimizer = AdamW([{"params": [*kernels, nn.Parameter(torch.randn(9))], "fused": fused}], lr=0.1)
    secure_fused_step(optimizer)
    return optimizer


def train(optimizer: AdamW, steps: range, as_parameters: bool = True) -> list[Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    for step in steps:
        torch.manual_seed(step)
        for parameter in parameters:
            grad = torch.randn(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(grad) if as_parameters else grad
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def resume(optimizer: AdamW, source: AdamW) -> None:
    pairs = zip(optimizer.param_groups[0]["params"], source.param_groups[0]["params"], strict=True)
    for parameter, trained in pairs:
        parameter.data.copy_(trained.data)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))


@pytest.mark.parametrize("as_parameters", [True, False], ids=["own_layout", "contiguous"])
def test_secure_fused_step__gradients_of_any_layout(as_parameters: bool) -> None:
    found = train(create_optimizer(channels_last=True), range(5), as_parameters)
    expected = train(create_optimizer(fused=False), range(5))

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_secure_fused_step__resumed_in_another_layout() -> None:
    first, second = create_optimizer(channels_last=True), create_optimizer()
    train(first, range(3))
    resume(second, first)

    for one, other in zip(train(second, range(3, 5)), train(first, range(3, 5)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_secure_fused_step__resumes_to_the_bit() -> None:
    first, second = create_optimizer(), create_optimizer()
    train(first, range(3))
    resume(second, first)

    assert all(map(torch.equal, train(second, range(3, 5)), train(first, range(3, 5))))


def test_secure_fused_step__a_checkpoint_chooses_where_its_step_runs() -> None:
    fused, plain = create_optimizer(), create_optimizer(fused=False)
    train(fused, range(1))
    plain.load_state_dict(fused.state_dict())
    assert plain.param_groups[0]["fused"] is True

    elsewhere = AdamW([nn.Parameter(torch.zeros(p.shape, device="meta")) for p in fused.param_groups[0]["params"]])
    secure_fused_step(elsewhere)
    elsewhere.load_state_dict(fused.state_dict())
    assert elsewhere.param_groups[0]["fused"] is None
