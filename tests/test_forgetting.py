"""Biased memory normalisation: rows of length one, where they go, and how fast."""

import math

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


def test_by_default_forgetting_is_slow():
    """A hundredth of a slot's length a segment; the paper's form is one argument away."""
    assert BiasedMemoryNorm(3, 4).strength == 0.01
    assert BiasedMemoryNorm(3, 4, strength=1.0).strength == 1.0


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
    norm = BiasedMemoryNorm(3, 4, strength=1.0).to(dtype)
    memory = -norm.bias.detach()[None]
    out = norm(memory.requires_grad_())
    assert not out.any()
    out.sum().backward()
    assert not memory.grad.isnan().any()


@given(seed=seeds, strength=strengths, **sizes)
def test_a_row_of_zeros_goes_to_its_terminal_state(seed, strength, batch, slots, dim):
    torch.manual_seed(seed)
    norm, memory = norm_for(slots, dim, strength), randn(batch, slots, dim)
    memory[:, 0] = 0
    out = norm(memory)
    close(out[:, 0], norm.terminal()[0].expand(batch, dim))
    close(out.norm(dim=-1), torch.ones(batch, slots).double())


@given(seed=seeds, **sizes, more=st.sampled_from([(1, 0), (0, 1), (2, 3)]))
def test_another_number_of_slots_or_another_width_is_refused(seed, batch, slots, dim, more):
    """Also where broadcasting would have made something of it."""
    norm = norm_for(slots, dim)
    for shape in ((batch, slots + more[0], dim + more[1]), (batch, 1, dim + 1), (dim + 1,)):
        with pytest.raises(ValueError, match="slots, width"):
            norm(randn(*shape))
    if slots > 1:
        with pytest.raises(ValueError, match="slots, width"):
            norm(randn(batch, 1, dim))


@given(seed=seeds, strength=strengths, **sizes)
def test_the_gradient_of_the_bias_is_strength_times_that_of_v(
    seed, strength, batch, slots, dim
):
    """Along both paths: as what is added, and as where slots start."""
    torch.manual_seed(seed)
    norm, weights = norm_for(slots, dim, strength), randn(batch, slots, dim)
    memory = randn(batch, slots, dim)
    v = (strength * norm.bias).detach().requires_grad_()

    def loss(start, step):
        return (step(memory + step(start)) * weights).sum()

    loss(norm.initial(batch), norm).backward()

    def by_hand(m):
        moved = m + v
        return moved / moved.norm(dim=-1, keepdim=True)

    loss((v / v.norm(dim=-1, keepdim=True)).expand(batch, -1, -1), by_hand).backward()
    torch.testing.assert_close(norm.bias.grad, strength * v.grad, rtol=1e-7, atol=1e-9)


@given(
    seed=seeds,
    angle=st.floats(0.2, 2.5),
    strength=st.floats(0.01, 2.0),
    steps=st.integers(1, 12),
    dim=st.integers(3, 6),
)
def test_an_idle_slot_hands_back_as_much_gradient_as_it_keeps_content(
    seed, angle, strength, steps, dim
):
    """‖∂m_T/∂m_0‖ = sin θ_T / sin θ_0, in the directions in which a unit slot can move."""
    torch.manual_seed(seed)
    norm = BiasedMemoryNorm(1, dim, strength=strength).double()
    with torch.no_grad():
        norm.bias.copy_(torch.nn.functional.normalize(norm.bias, dim=-1))
    home = norm.bias.detach()[0]
    aside = torch.nn.functional.normalize((v := randn(dim)) - (v @ home) * home, dim=0)
    start = math.cos(angle) * home + math.sin(angle) * aside

    def idle(m):
        m = m.view(1, 1, dim)
        for _ in range(steps):
            m = norm(m)
        return m.flatten()

    jacobian = torch.autograd.functional.jacobian(idle, start)
    across = torch.eye(dim).double() - torch.outer(start, start)
    sizes = torch.linalg.svdvals(jacobian @ across)
    end = drift_angle(torch.tensor(angle, dtype=torch.float64), strength, steps)
    ratio = torch.sin(end) / math.sin(angle)
    torch.testing.assert_close(sizes[: dim - 1].max(), ratio, rtol=1e-6, atol=1e-9)


def test_a_float32_bias_keeps_the_memory_in_float32():
    norm = BiasedMemoryNorm(3, 4, strength=0.01)
    assert norm(torch.randn(2, 3, 4).bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(torch.randn(2, 3, 4))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 3))
