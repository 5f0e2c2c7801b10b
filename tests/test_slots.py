"""How slots start, and the two numbers that say whether they differ."""

import math

import pytest
import torch
from helpers import close, randn
from hypothesis import given
from hypothesis import strategies as st

from memformer.slots import effective_slots, separate_slots, slot_similarity, unit_rows

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, slots=st.integers(1, 20), dim=st.integers(1, 9))
def test_slots_start_orthogonal_as_far_as_the_width_allows(seed, slots, dim):
    start = separate_slots(slots, dim, torch.Generator().manual_seed(seed)).double()
    assert start.shape == (slots, dim)
    for first in range(0, slots, dim):
        group = start[first : first + dim]
        torch.testing.assert_close(
            group @ group.T, torch.eye(len(group)).double(), rtol=0, atol=1e-5
        )


@given(seed=seeds, slots=st.integers(2, 8), dim=st.integers(2, 8))
def test_a_generator_fixes_the_slots(seed, slots, dim):
    first, again, other = (
        separate_slots(slots, dim, torch.Generator().manual_seed(s))
        for s in (seed, seed, seed + 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(seed=seeds, batch=st.integers(1, 3), slots=st.integers(1, 5), dim=st.integers(2, 6))
def test_similarity_is_the_cosine_of_each_pair(seed, batch, slots, dim):
    torch.manual_seed(seed)
    memory = randn(batch, slots, dim)
    similarity = slot_similarity(memory)
    for b in range(batch):
        for i in range(slots):
            for j in range(slots):
                one, other = memory[b, i], memory[b, j]
                cosine = float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))
                assert float(similarity[b, i, j]) == pytest.approx(cosine, abs=1e-10)


@given(seed=seeds, batch=st.integers(1, 3), slots=st.integers(1, 6), dim=st.integers(1, 6))
def test_effective_slots_lie_between_one_and_the_rank(seed, batch, slots, dim):
    torch.manual_seed(seed)
    worth = effective_slots(randn(batch, slots, dim))
    assert worth.shape == (batch,)
    assert (worth > 1 - 1e-4).all()
    assert (worth < min(slots, dim) + 1e-4).all()


@given(seed=seeds, groups=st.integers(1, 4), copies=st.integers(1, 3))
def test_copies_of_a_slot_count_once(seed, groups, copies):
    """Orthogonal directions, each held by the same number of slots, at any lengths."""
    generator = torch.manual_seed(seed)
    directions = separate_slots(groups, 6, generator).repeat(copies, 1)
    lengths = 0.5 + torch.rand(groups * copies, 1, generator=generator)
    memory = (directions * lengths)[torch.randperm(groups * copies, generator=generator)]
    assert float(effective_slots(memory[None])) == pytest.approx(groups, abs=1e-3)


def test_effective_slots_is_the_entropy_of_the_energies():
    memory = randn(1, 4, 7)
    unit = memory[0] / memory[0].norm(dim=-1, keepdim=True)
    energy = torch.linalg.eigvalsh(unit @ unit.T).clamp(min=0)  # squared singular values
    share = energy / energy.sum()
    entropy = -sum(float(p) * math.log(float(p)) for p in share)
    assert float(effective_slots(memory)) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_permuting_slots_changes_neither():
    memory, order = randn(2, 5, 8), torch.randperm(5)
    close(slot_similarity(memory[:, order]), slot_similarity(memory)[:, order][:, :, order])
    torch.testing.assert_close(effective_slots(memory[:, order]), effective_slots(memory))


@given(seed=seeds, sets=st.integers(1, 4), dim=st.integers(1, 8))
def test_more_slots_than_the_width_are_worth_the_width(seed, sets, dim):
    torch.manual_seed(seed)
    start = separate_slots(sets * dim, dim).double()
    assert float(effective_slots(start[None])) == pytest.approx(dim, abs=1e-4)


def test_slots_of_width_one_have_both_signs():
    slots = separate_slots(200, 1)
    assert set(slots.flatten().tolist()) == {-1.0, 1.0}  # alike in one run of 2 ** 199


def test_sets_beyond_the_width_are_uniform_and_independent():
    """The cosine between sets has the mean 0 and the variance 1 / D of random vectors."""
    dim, sets = 4, 2000
    slots = separate_slots(sets * dim, dim).double().view(sets, dim, dim)
    assert (slots.mean(dim=0).abs() < 6 / (sets * dim) ** 0.5).all()  # six deviations
    between = (slots[0::2] * slots[1::2]).sum(dim=-1)  # slot i of a set with slot i of the next
    assert (between.mean(dim=0).abs() < 6 / (sets / 2 * dim) ** 0.5).all()
    assert between.square().mean() == pytest.approx(1 / dim, abs=0.04)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_memories_are_measured_in_32_bits(dtype):
    memory = (200 * randn(3, 6, 9)).to(dtype)  # squares overflow in 16 bits
    worth, similarity = effective_slots(memory), slot_similarity(memory)
    assert worth.dtype == similarity.dtype == torch.float32
    expected = effective_slots(memory.double()).float()
    torch.testing.assert_close(worth, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        similarity, slot_similarity(memory.double()).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_memory_of_zeros_is_finite(dtype):
    memory = torch.zeros(2, 4, 8, dtype=dtype)
    assert effective_slots(memory).tolist() == [0.0, 0.0]  # worth no slot at all
    assert not slot_similarity(memory).any()
    memory[1, 2, 5] = 3
    assert effective_slots(memory).tolist() == pytest.approx([0.0, 1.0])
    memory[1, 2, 5] = 0
    memory[:, :2] = torch.eye(8, dtype=dtype)[:2]
    assert effective_slots(memory).tolist() == pytest.approx([2.0, 2.0])


@given(seed=seeds, batch=st.integers(1, 3), slots=st.integers(1, 5), dim=st.integers(1, 6))
def test_unit_rows_divide_each_row_by_its_own_length(seed, batch, slots, dim):
    torch.manual_seed(seed)
    x = randn(batch, slots, dim) * 10 ** (4 * torch.rand(batch, slots, 1) - 2).double()
    unit = unit_rows(x)
    for b in range(batch):
        for i in range(slots):
            length = math.sqrt(sum(float(v) ** 2 for v in x[b, i]))
            close(unit[b, i], x[b, i] / length)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_of_zeros_has_no_direction(dtype):
    """Nor NaN in the gradient; a row shorter than the guard is divided by the guard."""
    x = torch.zeros(2, 3, dtype=dtype)
    x[1, 0] = 1e-7
    unit = unit_rows(x.requires_grad_())
    assert not unit[0].any()
    assert unit[1].tolist() == pytest.approx([0.1, 0, 0], rel=0.3)  # as 16 bits round it
    unit.sum().backward()
    assert not x.grad.isnan().any()
    assert dtype == torch.float16 or x.grad.isfinite().all()  # 1e6 is too large for 16 bits
