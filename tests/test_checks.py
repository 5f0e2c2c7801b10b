"""What the mechanism refuses: the kind of error, the value in the message, what is allowed."""

import math

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memformer.checks import (
    MemoryOverflowError,
    check_at_least_one,
    check_heads,
    check_mask,
    check_memory,
    check_self_weight,
    check_state,
    check_strength,
    check_temperature,
    check_tokens,
)
from memformer.model import MemformerState
from memformer.modes import evaluating

seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-9, 9) | st.sampled_from([math.nan, math.inf, -math.inf])


def refusal(check, *args, **options):
    """The error that a check raises, or None."""
    try:
        check(*args, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        return error
    return None


# --- numbers --------------------------------------------------------------------------------


@given(dim=st.integers(-3, 12), heads=st.integers(-3, 6))
def test_heads_divide_the_width(dim, heads):
    error = refusal(check_heads, dim, heads)
    assert (error is None) == (dim > 0 and heads > 0 and dim % heads == 0)
    if error:
        assert f"dim is {dim} and num_heads is {heads}" in str(error)


@given(first=st.integers(-3, 3), second=st.integers(-3, 3))
def test_counts_are_at_least_one_and_the_first_wrong_one_is_named(first, second):
    error = refusal(check_at_least_one, slots=first, dim=second)
    assert (error is None) == (first >= 1 and second >= 1)
    if error:
        named = f"slots is {first}" if first < 1 else f"dim is {second}"
        assert str(error) == f"{named}; it must be at least 1"


@given(value=numbers)
def test_what_a_temperature_a_strength_and_a_self_weight_may_be(value):
    positive = math.isfinite(value) and value > 0
    for check, name, fine in (
        (check_temperature, "temperature", positive),
        (check_strength, "strength", positive),
        (check_self_weight, "self_weight", 0 < value < 1),
    ):
        error = refusal(check, value)
        assert (error is None) == fine
        if error:
            assert isinstance(error, ValueError)
            assert f"{name} is {value}; it must be" in str(error)


# --- masks and tokens -----------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8]),
)
def test_a_mask_is_boolean_and_of_its_rows(shape, dtype):
    error = refusal(check_mask, torch.ones(shape, dtype=dtype), 2, 3)
    assert (error is None) == (dtype == torch.bool and tuple(shape) == (2, 3))
    if error:
        assert f"mask is {dtype} {tuple(shape)}; torch.bool (2, 3)" in str(error)


@given(seed=seeds, batch=st.integers(0, 3), length=st.integers(0, 9), most=st.integers(1, 9))
def test_good_tokens_are_taken_and_a_shape_is_refused(seed, batch, length, most):
    torch.manual_seed(seed)
    tokens = torch.randint(11, (batch, length))
    error = refusal(check_tokens, tokens, 11, most)
    assert (error is None) == (batch > 0 and 0 < length <= most)
    if batch and length > most:
        assert f"{length} tokens, the model takes {most}" in str(error)
        assert "split_segments" in str(error)
    elif error:
        assert f"{(batch, length)}; (batch, time), neither 0" in str(error)


@given(bad=st.integers(-99, -1) | st.integers(11, 99), place=st.integers(0, 5))
def test_an_id_outside_the_vocabulary_is_named(bad, place):
    tokens = torch.randint(11, (2, 3))
    tokens.view(-1)[place] = bad
    with pytest.raises(ValueError, match=rf"id {bad}; ids must be in \[0, 11\)"):
        check_tokens(tokens, 11, 5)


@pytest.mark.parametrize("tokens", [[1, 2, 3], None, "abc", 4, randn(2, 3).numpy()])
def test_what_is_no_tensor_is_no_tokens(tokens):
    with pytest.raises(TypeError, match=rf"type {type(tokens).__name__}.*torch\.tensor"):
        check_tokens(tokens, 11, 5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32])
def test_tokens_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=rf"{dtype}; torch\.int64"):
        check_tokens(torch.zeros(2, 3, dtype=dtype), 11, 5)


def test_tokens_come_with_a_mask_of_their_own_shape():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    check_tokens(tokens, 11, 5, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.bool \(2, 3\)"):
        check_tokens(tokens, 11, 5, torch.zeros(2, 4, dtype=torch.bool))


def test_on_a_device_ids_are_not_looked_at():
    """Looking would make the device wait; the meta device could not even answer."""
    check_tokens(torch.zeros(2, 3, dtype=torch.int64, device="meta"), 11, 5)


# --- memories and states --------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, (), [[0.0]], 1.5])
def test_no_tensor_is_no_memory(memory):
    with pytest.raises(TypeError, match=rf"{type(memory).__name__};.*initial_state"):
        check_memory(memory, 1, 1, torch.zeros(1))


@given(batch=st.integers(1, 3), slots=st.integers(1, 4), dim=st.integers(1, 4))
def test_a_memory_has_the_shape_of_its_model(batch, slots, dim):
    like = randn(11, 3)
    error = refusal(check_memory, randn(batch, slots, dim), 2, 3, like)
    assert (error is None) == ((batch, slots, dim) == (2, 3, 3))
    if error:
        assert f"{(batch, slots, dim)}; (batch, slots, width) = (2, 3, 3)" in str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_a_memory_has_the_dtype_of_its_model(dtype):
    with pytest.raises(TypeError, match=rf"{dtype}, the model torch\.float64"):
        check_memory(torch.zeros(2, 3, 4, dtype=dtype), 2, 3, randn(4))


def test_a_memory_is_on_the_device_of_its_model():
    with pytest.raises(RuntimeError, match="on meta, the model on cpu"):
        check_memory(randn(2, 3, 4).to("meta"), 2, 3, randn(4))


@given(
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    places=st.sets(st.integers(0, 23), min_size=1, max_size=9),
)
def test_an_overflowed_memory_has_an_error_of_its_own(value, places):
    """A `ValueError` too, so that old handlers still catch it; the count is told."""
    memory = randn(2, 3, 4)
    check_memory(memory, 2, 3, randn(4))
    memory.view(-1)[list(places)] = value
    with pytest.raises(MemoryOverflowError, match=f"{len(places)} values.*restart"):
        check_memory(memory, 2, 3, randn(4))
    assert issubclass(MemoryOverflowError, ValueError)


def test_only_overflow_is_an_overflow():
    for wrong in (randn(2, 3, 5), randn(1, 3, 4)):
        assert type(refusal(check_memory, wrong, 2, 3, randn(4))) is ValueError


@pytest.mark.parametrize("state", [None, 3, "memory", torch.zeros(1), (torch.zeros(1),) * 3])
def test_what_is_no_state_of_an_encoder_decoder(state):
    with pytest.raises(TypeError, match=rf"{type(state).__name__};.*initial_state"):
        check_state(state, 1)


def test_a_state_is_one_and_of_as_many_streams():
    state = MemformerState(randn(1, 2, 3), torch.zeros(1, 4).long(), torch.ones(1, 4).bool())
    check_state(state, 1)
    with pytest.raises(ValueError, match=r"of 1 streams, the tokens of 3.*initial_state"):
        check_state(state, 3)


# --- looking without changing ---------------------------------------------------------------


def test_evaluating_gives_every_module_its_own_mode_back():
    net = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)))
    net.train()
    net[1][0].eval()  # frozen, as in fine-tuning
    before = {name: module.training for name, module in net.named_modules()}
    with evaluating(net):
        assert not any(module.training for module in net.modules())
        assert not net(torch.ones(2, 3)).requires_grad
    assert before == {name: module.training for name, module in net.named_modules()}
    assert torch.is_grad_enabled()
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert before == {name: module.training for name, module in net.named_modules()}
    assert torch.is_grad_enabled()


def test_evaluating_what_is_no_module_only_stops_gradients():
    weight = torch.ones(1, requires_grad=True)
    with evaluating(lambda x: x):
        assert not (weight * 2).requires_grad
    assert (weight * 2).requires_grad
