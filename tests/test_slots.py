"""How slots start, and the two numbers that say whether they differ."""

import math

import pytest
import torch
from helpers import close, randn
from hypothesis import given
from hypothesis import strategies as st

from memformer.slots import effective_slots, separate_slots, slot_similarity

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
