"""Our Adam is torch's AdamW behind Apex's interface."""

import megatron.core.optimizer
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_adapt.engine import adam
from megatron_adapt.engine.adam import FusedAdam, round_randomly


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


BF16 = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}


def make_generator():
    return torch.Generator().manual_seed(7)


def round_to_nearest(values_N, generator):
    return values_N.to(torch.bfloat16)


def repeat(value):
    return torch.full((1 << 16,), value)


@given(value=st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126))
@example(value=2.0**-149)
@settings(deadline=None, max_examples=50)
def test_rounding_gives_a_neighbour_and_the_value_on_average(value):
    rounded = round_randomly(repeat(value), make_generator()).double()
    exact = torch.tensor(value)
    # The upper half of the bits, and one more: the neighbours on either side, or the value itself.
    bits = exact.view(torch.int32) & -(1 << 16)
    nearer, farther = (neighbour.view(torch.float32).double() for neighbour in (bits, bits + (1 << 16)))
    assert ((rounded == nearer) | ((rounded == farther) & (exact != nearer))).all()
    # Six standard deviations of a mean of 2^16 draws.
    assert (rounded.mean() - exact).abs() <= (farther - nearer).abs() / 2 * 6 / 256


def test_values_of_bf16_stay_what_they_are():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = round_randomly(every.float(), make_generator())
    assert torch.equal(rounded.isnan(), every.isnan())
    known = ~every.isnan()
    assert torch.equal(rounded[known].view(torch.int16), every[known].view(torch.int16))


@pytest.mark.parametrize("num_values", [1, 3, 4, 5])
def test_any_number_of_values_is_rounded(num_values):
    values = torch.linspace(1, 2, num_values)
    rounded = round_randomly(values.clone(), make_generator())
    assert torch.allclose(rounded.float(), values, atol=2**-7, rtol=0)


@pytest.mark.parametrize(("beta2", "noise"), [(0.95, 0.013), (0.999, 0.09)])
def test_moments_in_bf16_follow_gradients_that_grow_and_shrink(beta2, noise):
    parameter = torch.nn.Parameter(torch.zeros(1024))
    optimizer = FusedAdam([parameter], lr=0.0, betas=(0.9, beta2), **BF16)
    exact = 0.0
    for gradient, num_steps in ((1e-3, 1000), (2e-3, 1000), (3e-4, 4000)):
        parameter.grad = torch.full_like(parameter, gradient)
        for _ in range(num_steps):
            optimizer.step()
        exact = gradient**2 + (exact - gradient**2) * beta2**num_steps
        first, second = (optimizer.state[parameter][name].double() for name in ("exp_avg", "exp_avg_sq"))
        assert float(first.mean()) == pytest.approx(gradient, rel=0.002)
        assert float(second.mean()) == pytest.approx(exact, rel=noise / 6)
        assert float((second / exact).std()) < noise


def test_rounded_to_the_nearest_value_a_second_moment_would_not_fall(monkeypatch):
    """What random rounding is for; when this fails, the kernel below has changed."""
    monkeypatch.setattr(adam, "round_randomly", round_to_nearest)
    parameter = torch.nn.Parameter(torch.zeros(8))
    optimizer = FusedAdam([parameter], lr=0.0, betas=(0.9, 0.999), **BF16)
    optimizer.load_state_dict(
        {**optimizer.state_dict(), "state": {0: {name: torch.ones(8) for name in ("exp_avg", "exp_avg_sq")}}}
    )
    parameter.grad = torch.zeros(8)
    for _ in range(100):
        optimizer.step()
    moments = optimizer.state[parameter]
    assert moments["exp_avg"].max() < 1e-4
    assert (moments["exp_avg_sq"] == 1).all()


@pytest.mark.parametrize("dtypes", [BF16, {"exp_avg_dtype": torch.bfloat16}, {"exp_avg_sq_dtype": torch.bfloat16}])
def test_steps_with_moments_in_bf16_stay_near_those_in_fp32(dtypes):
    ours, theirs = make_parameters(), make_parameters()
    narrow, lr, num_steps = FusedAdam(ours, lr=1e-2, weight_decay=0.1, **dtypes), 1e-2, 20
    step_with(narrow, ours, num_steps)
    step_with(torch.optim.AdamW(theirs, lr=lr, weight_decay=0.1), theirs, num_steps)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=0.05 * lr * num_steps)
        found = {f"{name}_dtype": moment.dtype for name, moment in narrow.state[one].items()}
        assert {name: found[name] for name in dtypes} == dtypes
        assert sum(dtype == torch.float32 for dtype in found.values()) == 2 - len(dtypes)


def test_moments_in_bf16_continue_exactly_also_through_fp32():
    """A checkpoint of the distributed optimizer holds them in fp32."""
    straight, resumed = make_parameters(), make_parameters()
    step_with(FusedAdam(straight, **BF16), straight, 5)
    first = FusedAdam(resumed, **BF16)
    step_with(first, resumed, 2)
    saved = first.state_dict()
    saved["state"] = {
        number: {name: moment.float() for name, moment in moments.items()}
        for number, moments in saved["state"].items()
    }  # fmt: skip
    second = FusedAdam(resumed, **BF16)
    second.load_state_dict(saved)
    step_with(second, resumed, 3, first=2)
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("chunk_values", [1, 2, 7, 38, 39, 40])
def test_it_does_not_matter_how_many_values_are_stepped_at_once(chunk_values, monkeypatch):
    """But for what is drawn."""
    monkeypatch.setattr(adam, "round_randomly", round_to_nearest)
    whole, cut = make_parameters(), make_parameters()
    step_with(FusedAdam(whole, **BF16), whole, 3)
    monkeypatch.setattr(adam, "_CHUNK_VALUES", chunk_values)
    step_with(FusedAdam(cut, **BF16), cut, 3)
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one, other)


def test_what_has_no_gradient_keeps_every_bit_beside_moments_in_bf16():
    parameter = torch.nn.Parameter(torch.randn(64, generator=make_generator()))
    before = parameter.detach().clone()
    optimizer = FusedAdam([parameter], lr=0.1, **BF16)
    for _ in range(10):
        parameter.grad = torch.ones(64)
        parameter.grad[::2] = 0
        optimizer.step()
    assert torch.equal(parameter[::2], before[::2])
    assert not torch.equal(parameter[1::2], before[1::2])


def test_another_optimizer_that_was_found_keeps_fp32_moments_only(monkeypatch):
    """Transformer Engine's rounds to the nearest value, so moments in bf16 are ours."""
    found = type("FoundAdam", (), {})
    monkeypatch.setattr(adam, "_FOUND", found)
    for module, name in ((megatron.core.optimizer, "Adam"), (adam._DISTRIBUTED, "Adam")):
        monkeypatch.setattr(module, name, found)
    adam.install(torch.bfloat16)
    (parameter,) = torch.nn.Linear(1, 1, bias=False).parameters()
    made = megatron.core.optimizer.Adam([parameter])
    assert isinstance(made, adam._DISTRIBUTED.Adam)
    parameter.grad = torch.ones(1, 1)
    made.step()
    assert [moment.dtype for moment in made.state[parameter].values()] == [torch.bfloat16, torch.float32]
    adam.install()
    assert megatron.core.optimizer.Adam is adam._DISTRIBUTED.Adam is found
