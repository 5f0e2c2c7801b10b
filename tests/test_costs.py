"""Costs that are counted are counted right."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memformer.lab.costs import SavedBytes, cache_bytes, seconds, slot_bytes

sizes = st.integers(1, 50)


@given(tokens=sizes, layers=sizes, dim=sizes, width=st.sampled_from([1, 2, 4]))
def test_a_cache_is_a_key_and_a_value_per_token_and_layer(tokens, layers, dim, width):
    cache = sum(2 * dim * width for _ in range(layers) for _ in range(tokens))
    assert cache_bytes(tokens, layers, dim, width) == cache
    assert cache_bytes(2 * tokens, layers, dim, width) == 2 * cache


@given(slots=sizes, dim=sizes)
def test_slots_are_one_vector_each_however_long_the_past(slots, dim):
    assert slot_bytes(slots, dim) == torch.zeros(slots, dim).untyped_storage().nbytes()


@given(rows=sizes, columns=sizes)
def test_saved_bytes_counts_what_backward_needs(rows, columns):
    x = torch.randn(rows, columns, requires_grad=True)
    with SavedBytes() as saved:
        y = x.exp()  # keeps its result
    assert saved.total == 4 * rows * columns
    with SavedBytes() as saved:
        y = x * x.detach().clone()  # keeps the other factor only: x's gradient needs it
    assert saved.total == 4 * rows * columns
    with SavedBytes() as saved:
        y = x + 1  # keeps nothing
    assert saved.total == 0
    assert y.requires_grad


def test_a_storage_counts_once_however_many_views_are_saved():
    x = torch.randn(6, 4, requires_grad=True)
    factor = torch.randn(4, 6)
    with SavedBytes() as saved:
        x * factor.T
        x * factor.T
        x[:3] * factor[:, :3].T
    assert saved.total == factor.untyped_storage().nbytes()
    with SavedBytes() as saved:
        x * factor.T
        x * factor.T.clone()
    assert saved.total == 2 * factor.untyped_storage().nbytes()


def test_parameters_can_be_left_out():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(3, 8, requires_grad=True)
    with SavedBytes() as everything:
        layer(x)
    with SavedBytes(layer.weight) as without:
        layer(x)
    assert everything.total - without.total == 4 * 8 * 8


def test_counting_stops_at_the_end_of_the_block_and_after_an_error():
    x = torch.randn(5, requires_grad=True)
    with SavedBytes() as saved:
        x.exp()
    x.exp()
    assert saved.total == 20
    with pytest.raises(RuntimeError, match="broken"), SavedBytes() as saved:
        raise RuntimeError("broken")
    x.exp()
    assert saved.total == 0


def test_a_saved_graph_still_differentiates():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with SavedBytes():
        y = x.exp().sum()
    y.backward()
    torch.testing.assert_close(x.grad, x.detach().exp())


@given(repeats=st.integers(1, 9))
def test_seconds_calls_once_more_than_it_counts(repeats):
    calls = []
    assert seconds(lambda: calls.append(0), repeats) >= 0
    assert len(calls) == repeats + 1


@pytest.fixture
def without_collector():
    """Only reference counts free anything: a cycle is a leak."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_a_count_and_what_it_holds_are_freed_at_once():
    x = torch.randn(5, requires_grad=True)
    with SavedBytes(x) as saved:
        y = x.exp()
    never = SavedBytes()
    entered, unused, result = weakref.ref(saved), weakref.ref(never), weakref.ref(y)
    del saved, y, never
    assert entered() is None
    assert unused() is None
    assert result() is None  # if its own node held it, both would stay


@given(rows=sizes, columns=sizes)
def test_of_nested_counts_the_inner_one_counts(rows, columns):
    x = torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)
    with SavedBytes() as outer:
        x.exp()
        with SavedBytes() as inner:
            x.exp() + x.sin()  # the result of one, the argument of the other
        x.exp()
    size = 8 * rows * columns
    assert inner.total == 2 * size
    assert outer.total == 2 * size
