"""Reading against torch's attention module with the same weights."""

from itertools import pairwise

import pytest
import torch
from helpers import close, far, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memformer.cache import KeyValueCache
from memformer.reader import MemoryReader

seeds = st.integers(0, 2**32 - 1)
sizes = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 5),
    "slots": st.integers(1, 6),
    "heads": st.integers(1, 3),
    "width": st.integers(1, 4),
}


def reader_for(heads, width, normalise):
    reader = MemoryReader(heads * width, heads, normalise=normalise).double().eval()
    if normalise:
        nn.init.normal_(reader.norm.weight)
        nn.init.normal_(reader.norm.bias)
    return reader


def reference(reader, x, memory):
    """`Q = x W_Q; K, V = M W_K, M W_V; softmax(Q Kᵀ / √d) V`, by torch."""
    dim, ours = x.shape[-1], reader.attention
    theirs = nn.MultiheadAttention(dim, ours.num_heads, bias=False, batch_first=True)
    theirs = theirs.double().eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((ours.query.weight, ours.key_value.weight)))
        theirs.out_proj.weight.copy_(ours.output.weight)
    if isinstance(reader.norm, nn.LayerNorm):
        mean = memory.mean(dim=-1, keepdim=True)
        spread = (memory.var(dim=-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        memory = (memory - mean) / spread * reader.norm.weight + reader.norm.bias
    return theirs(x, memory, memory, average_attn_weights=False)


@given(seed=seeds, normalise=st.booleans(), **sizes)
def test_reading_is_attention_over_slots(seed, normalise, batch, length, slots, heads, width):
    torch.manual_seed(seed)
    reader = reader_for(heads, width, normalise)
    x, memory = randn(batch, length, heads * width), randn(batch, slots, heads * width)
    expected, expected_weights = reference(reader, x, memory)
    read, weights = reader(x, memory, return_weights=True)
    close(read, expected)
    close(weights, expected_weights)
    close(weights.sum(dim=-1), torch.ones(batch, heads, length).double())
    assert torch.equal(reader(x, memory), read)


def test_the_reference_notices_a_missing_layer_norm():
    reader = reader_for(2, 3, normalise=True)
    x, memory = randn(2, 4, 6), randn(2, 5, 6)
    expected, _ = reference(reader, x, memory)
    reader.norm = nn.Identity()
    assert far(reader(x, memory), expected)


@given(seed=seeds, normalise=st.booleans(), **sizes)
def test_the_order_of_slots_means_nothing(seed, normalise, batch, length, slots, heads, width):
    torch.manual_seed(seed)
    reader = reader_for(heads, width, normalise)
    x, memory = randn(batch, length, heads * width), randn(batch, slots, heads * width)
    order = torch.randperm(slots)
    read, weights = reader(x, memory, return_weights=True)
    permuted, permuted_weights = reader(x, memory[:, order], return_weights=True)
    close(permuted, read)
    close(permuted_weights, weights[..., order])


def test_a_token_reads_for_itself_and_every_slot_is_read():
    reader = reader_for(2, 3, normalise=True)
    x, memory = randn(2, 4, 6).requires_grad_(), randn(2, 5, 6).requires_grad_()
    wrt_x, wrt_memory = torch.autograd.grad(reader(x, memory)[0, 2].sum(), (x, memory))
    assert wrt_x[0, 2].any()
    wrt_x[0, 2] = 0
    assert not wrt_x.any()
    assert wrt_memory[0].abs().sum(dim=-1).all()
    assert not wrt_memory[1].any()


@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_by_finite_differences(normalise):
    reader = reader_for(2, 2, normalise)
    x, memory = randn(1, 2, 4).requires_grad_(), randn(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(reader, (x, memory))


def test_dropout_acts_in_training_only():
    reader = MemoryReader(6, 2, dropout=0.5).double().eval()
    x, memory = randn(2, 4, 6), randn(2, 5, 6)
    assert torch.equal(reader(x, memory), reader(x, memory))
    reader.train()
    assert far(reader(x, memory), reader(x, memory))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reading_in_half_precision_is_near_and_of_that_dtype(dtype):
    reader = reader_for(2, 4, normalise=True)
    x, memory = randn(2, 4, 8).to(dtype), torch.nn.functional.normalize(randn(2, 5, 8), dim=-1)
    exact, exact_weights = reader(x.double(), memory.to(dtype).double(), return_weights=True)
    read, weights = reader.to(dtype)(x, memory.to(dtype), return_weights=True)
    assert read.dtype == weights.dtype == dtype
    torch.testing.assert_close(read.double(), exact, rtol=0.1, atol=0.15)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=0.1, atol=0.05)


def test_under_autocast_a_float32_memory_is_read_and_gets_a_float32_gradient():
    reader = reader_for(2, 4, normalise=True).float()
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 5, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        read = reader(x, memory)
    read.float().square().sum().backward()
    assert memory.grad.dtype == torch.float32
    assert memory.grad.isfinite().all()
    torch.testing.assert_close(read.float(), reader(x, memory), rtol=0.1, atol=0.15)


# --- a cache, and how a reader starts -------------------------------------------------------


@given(
    seed=seeds,
    normalise=st.booleans(),
    cuts=st.sets(st.integers(1, 8)),
    **(sizes | {"length": st.integers(1, 9)}),
)
def test_reading_in_pieces_with_a_cache_is_reading_at_once(
    seed, normalise, cuts, batch, length, slots, heads, width
):
    torch.manual_seed(seed)
    reader = reader_for(heads, width, normalise)
    x, memory = randn(batch, length, heads * width), randn(batch, slots, heads * width)
    expected, expected_weights = reader(x, memory, return_weights=True)
    cache, borders = KeyValueCache(slots), sorted({0, length, *(c for c in cuts if c < length)})
    with torch.no_grad():
        for begin, end in pairwise(borders):
            piece = x[:, begin:end]
            read, weights = reader(piece, memory, return_weights=True, cache=cache)
            close(read, expected[:, begin:end])
            close(weights, expected_weights[:, :, begin:end])
            assert cache.filled == slots  # the keys of the memory, once


def test_a_cached_reader_computes_keys_once_and_another_memory_needs_a_cleared_cache():
    reader, cache = reader_for(2, 3, normalise=True), KeyValueCache(5)
    x, one, other = randn(2, 4, 6), randn(2, 5, 6), randn(2, 5, 6)
    with torch.no_grad():
        first = reader(x, one, cache=cache)
        assert torch.equal(reader(x, other, cache=cache), first)  # as it was told to
        _, shown = reader(x, other, return_weights=True, cache=cache)
        close(shown, reader(x, one, return_weights=True)[1])  # of what was read
        cache.clear()
        close(reader(x, other, cache=cache), reader(x, other))
    assert far(reader(x, one), reader(x, other))


@given(seed=seeds, start=st.floats(0, 3), heads=st.integers(1, 3), width=st.integers(1, 4))
def test_a_reader_can_start_silent_or_softly(seed, start, heads, width):
    """`output_start` scales what an untrained reader adds, and nothing else."""
    loud, soft = [], []
    for found, size in ((loud, 1.0), (soft, start)):
        torch.manual_seed(seed)
        reader = MemoryReader(heads * width, heads, output_start=size).double()
        x, memory = randn(2, 3, heads * width), randn(2, 4, heads * width)
        found += reader(x, memory, return_weights=True)
    torch.testing.assert_close(soft[0], start * loud[0], rtol=1e-5, atol=1e-7)
    assert torch.equal(soft[1], loud[1])


def test_a_silent_reader_is_learned_from_its_output_on():
    reader = MemoryReader(6, 2, output_start=0.0).double()
    x, memory = randn(2, 3, 6), randn(2, 4, 6)
    assert not reader(x, memory).any()
    (reader(x, memory) * randn(2, 3, 6)).sum().backward()
    assert reader.attention.output.weight.grad.any()
    assert (
        not reader.attention.key_value.weight.grad.any()
    )  # behind the silence nothing is felt yet


def test_by_default_slots_are_normalised_before_they_are_read():
    assert isinstance(MemoryReader(6, 2).norm, nn.LayerNorm)
    assert isinstance(MemoryReader(6, 2, normalise=False).norm, nn.Identity)
