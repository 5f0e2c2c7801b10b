"""Biased memory normalisation: rows of length one, where they go, and how fast."""

import pytest
import torch
from helpers import close, far, randn
from hypothesis import given
from hypothesis import strategies as st

from memformer.forgetting import BiasedMemoryNorm, drift_angle

seeds = st.integers(0, 2**32 - 1)
strengths = st.floats(1e-3, 5.0)
sizes = {"batch": st.integers(1, 3), "slots": st.integers(1, 6), "dim": st.integers(2, 8)}


def norm_for(slots, dim, strength=1.0):
    """With biases of unequal lengths, as after training."""
    norm = BiasedMemoryNorm(slots, dim, strength=strength).double()
    with torch.no_grad():
        norm.bias.mul_(0.3 + torch.rand(slots, 1))
    return norm


@given(seed=seeds, strength=strengths, **sizes)
def test_it_adds_v_and_divides_by_the_length(seed, strength, batch, slots, dim):
    torch.manual_seed(seed)
    norm, memory = norm_for(slots, dim, strength), randn(batch, slots, dim)
    out = norm(memory)
    for b in range(batch):
        for i in range(slots):
            moved = memory[b, i] + strength * norm.bias[i]
            close(out[b, i], moved / (moved @ moved).sqrt())
    close(out.norm(dim=-1), torch.ones(batch, slots).double())


@given(seed=seeds, strength=strengths, **sizes)
def test_the_start_is_the_fixed_point(seed, strength, batch, slots, dim):
    torch.manual_seed(seed)
    norm = norm_for(slots, dim, strength)
    start = norm.initial(batch)
    assert start.shape == (batch, slots, dim)
    close(start, norm.terminal().expand_as(start))
    close(start.norm(dim=-1), torch.ones(batch, slots).double())
    close(norm(start), start)
    assert (torch.einsum("bkd,kd->bk", start, norm.bias) > 0).all()  # v̂, and not −v̂


@given(seed=seeds, slots=st.integers(1, 6), dim=st.integers(2, 8))
def test_slots_left_alone_end_there(seed, slots, dim):
    torch.manual_seed(seed)
    norm = norm_for(slots, dim)
    memory = norm(randn(2, slots, dim))
    assert far(memory, norm.initial(2))
    for _ in range(400):
        memory = norm(memory)
    torch.testing.assert_close(memory, norm.initial(2), rtol=0, atol=1e-8)


@given(seed=seeds, strength=strengths, steps=st.integers(0, 12), dim=st.integers(2, 8))
def test_drift_angle_is_the_angle_that_the_module_makes(seed, strength, steps, dim):
    torch.manual_seed(seed)
    norm = BiasedMemoryNorm(3, dim, strength=strength).double()
    memory = torch.nn.functional.normalize(randn(1, 3, dim), dim=-1)
    length = strength * norm.bias.norm(dim=-1)

    def angle(m):
        along = (m[0] * norm.terminal()).sum(dim=-1)
        across = (m[0] - along[:, None] * norm.terminal()).norm(dim=-1)
        return torch.atan2(across, along)

    expected = drift_angle(angle(memory), length, steps)
    for _ in range(steps):
        memory = norm(memory)
    torch.testing.assert_close(angle(memory), expected, rtol=0, atol=1e-7)


@given(angle=st.floats(0.01, 3.1), strength=st.floats(0.01, 3.0))
def test_a_stronger_bias_forgets_faster_and_the_angle_only_shrinks(angle, strength):
    start = torch.tensor(angle, dtype=torch.float64)
    weak, strong = drift_angle(start, strength, 1), drift_angle(start, 1.5 * strength, 1)
    assert 0 < float(strong) < float(weak) < angle


@given(seed=seeds, strength=strengths, **sizes)
def test_permuting_slots_with_their_biases_permutes_the_result(
    seed, strength, batch, slots, dim
):
    torch.manual_seed(seed)
    norm, memory = norm_for(slots, dim, strength), randn(batch, slots, dim)
    order = torch.randperm(slots)
    expected = norm(memory)[:, order]
    with torch.no_grad():
        norm.bias.copy_(norm.bias[order].clone())
    close(norm(memory[:, order]), expected)


def test_permuting_slots_without_their_biases_does_not():
    norm, memory = norm_for(4, 6), randn(2, 4, 6)
    order = torch.tensor([1, 2, 3, 0])
    assert far(norm(memory[:, order]), norm(memory)[:, order])


def test_no_slot_sees_another():
    norm, memory = norm_for(4, 5), randn(1, 4, 5)
    jacobian = torch.autograd.functional.jacobian(norm, memory)[0, :, :, 0]  # (K, D, K, D)
    for i in range(4):
        assert jacobian[i, :, i].any()
        jacobian[i, :, i] = 0
    assert not jacobian.any()


def test_gradients_by_finite_differences():
    norm, memory = norm_for(3, 4, 0.7), randn(2, 3, 4).requires_grad_()

    def both(m, bias):
        out = torch.func.functional_call(norm, {"bias": bias}, (m,))
        start = torch.nn.functional.normalize(bias, dim=-1)
        return out, start

    assert torch.autograd.gradcheck(both, (memory, norm.bias))


def test_the_start_is_learned():
    norm = norm_for(3, 4)
    (norm.initial(2) * randn(2, 3, 4)).sum().backward()
    assert norm.bias.grad.abs().sum(dim=-1).all()


@pytest.mark.parametrize("strength", [0.03, 1.0])
def test_the_bias_starts_as_unit_vectors_and_strength_is_the_length_of_v(strength):
    norm = BiasedMemoryNorm(5, 6, strength=strength)
    torch.testing.assert_close(norm.bias.norm(dim=-1), torch.ones(5))
    zero = torch.zeros(1, 5, 6)
    moved = torch.full((1, 5, 6), 2.0)
    pull = norm(moved) * (moved + strength * norm.bias).norm(dim=-1, keepdim=True) - moved
    torch.testing.assert_close(
        pull.norm(dim=-1), torch.full((1, 5), strength), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(norm(zero)[0], norm.terminal(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_slot_that_the_bias_cancels_is_zero_and_not_nan(dtype):
    norm = BiasedMemoryNorm(3, 4).to(dtype)
    memory = -norm.bias.detach()[None]
    out = norm(memory.requires_grad_())
    assert not out.any()
    out.sum().backward()
    assert not memory.grad.isnan().any()
