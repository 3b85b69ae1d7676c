"""Our Adam is torch's AdamW behind Apex's interface."""

import pytest
import torch

from megatron_adapt.engine.adam import FusedAdam


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,), (1, 1))]


def step_with(optimizer, parameters, num_steps, first=0):
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_equal_torch(weight_decay):
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    ours, theirs = make_parameters(), make_parameters()
    step_with(FusedAdam(ours, **settings), ours, 5)
    step_with(torch.optim.AdamW(theirs, **settings), theirs, 5)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_restored_state_continues_exactly():
    straight, resumed = make_parameters(), make_parameters()
    step_with(FusedAdam(straight), straight, 4)
    first = FusedAdam(resumed)
    step_with(first, resumed, 2)
    second = FusedAdam(resumed)
    second.load_state_dict(first.state_dict())
    step_with(second, resumed, 2, first=2)
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one, other)


def test_parameter_without_gradient_stays():
    parameters = make_parameters()
    before = parameters[0].detach().clone()
    optimizer = FusedAdam(parameters, weight_decay=0.5)
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[0], before)
    assert optimizer.param_groups[0]["step"] == 1
