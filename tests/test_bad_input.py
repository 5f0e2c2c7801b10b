"""Bad input is refused with a message that names the value and what is allowed."""

import math
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from helpers import MODELS, SEGMENT_MODELS, build, memory_in, randn, small_config, tokens_for
from hypothesis import given
from hypothesis import strategies as st

from memformer.attention import MultiHeadAttention
from memformer.forgetting import BiasedMemoryNorm, drift_angle
from memformer.lab.costs import seconds
from memformer.lab.tracing import trace
from memformer.model import Memformer, MemformerConfig, MemformerLM
from memformer.reader import MemoryReader
from memformer.segments import map_state, reset_state, run_segments, split_segments
from memformer.slots import separate_slots
from memformer.tasks.recall import Curriculum, RecallTask
from memformer.tasks.scoring import recall_accuracy, scores_and_answers
from memformer.writer import MemoryWriter, keep_bias_for

every_model = pytest.mark.parametrize("model", MODELS)
segment_models = pytest.mark.parametrize("model", SEGMENT_MODELS)
not_positive = st.integers(-1000, 0)
not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
# Hypothesis tries the words that are allowed too.
allowed = {"rotary", "relative", "none", "learn", "paper", "own", "shared", "first", "any"}
words = st.text("abcdefghijklmnopqrstuvwxyz-_ ", max_size=12).filter(lambda w: w not in allowed)


@contextmanager
def refused(*mentions, kind=ValueError):
    """The block raises `kind`, and every one of `mentions` stands in the message."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    for mention in mentions:
        assert str(mention) in message, f"{mention!r} is not named in {message!r}"


def test_refused_asks_for_the_kind_and_for_every_word():
    with refused("3", "at least"):
        raise ValueError("it is 3; it must be at least 4")
    with pytest.raises(AssertionError, match="remedy"), refused("3", "remedy"):
        raise ValueError("it is 3")
    with pytest.raises(pytest.fail.Exception), refused("3"):
        pass
    with pytest.raises(TypeError), refused("3"):
        raise TypeError("3")


# --- settings -------------------------------------------------------------------------------

SIZES = [
    "vocab_size",
    "encoder_layers",
    "decoder_layers",
    "num_slots",
    "segment_length",
    "ffn_dim",
    "convolution",
]


@given(name=st.sampled_from(SIZES), value=not_positive)
def test_sizes_below_one(name, value):
    with refused(name, value, "at least 1"):
        small_config(**{name: value})


@given(
    name=st.sampled_from([*SIZES, "dim", "num_heads", "writer_heads"]),
    value=st.floats(1.1, 99.9),
)
def test_sizes_that_are_not_whole_numbers(name, value):
    if value.is_integer():
        value += 0.5
    with refused(name, value, kind=(TypeError, ValueError)):
        small_config(**{name: value})


@given(dim=st.integers(-5, 40), heads=st.integers(-3, 12))
def test_a_width_that_the_heads_do_not_divide(dim, heads):
    def config():
        return small_config(dim=dim, num_heads=heads, writer_heads=1, positions="none")

    makers = (
        lambda: MultiHeadAttention(dim, heads, max_length=3),
        lambda: MemoryReader(dim, heads),
        lambda: MemoryWriter(dim, heads),
    )
    for make in makers:
        if dim > 0 and heads > 0 and dim % heads == 0:
            make()
        else:
            with refused(f"dim is {dim}", f"num_heads is {heads}", "multiple of num_heads"):
                make()
    if dim > 0 and heads > 0 and dim % heads == 0:
        config()
    elif dim > 0 and heads > 0:
        with refused(f"dim is {dim}", f"num_heads is {heads}", "multiple of num_heads"):
            config()
    else:
        with refused(f"dim is {dim}" if dim < 1 else f"num_heads is {heads}", "at least 1"):
            config()


@given(heads=st.integers(-3, 12).filter(lambda heads: heads < 1 or 12 % heads))
def test_writer_heads_that_do_not_divide_the_width(heads):
    allowed = "at least 1" if heads < 1 else "divide dim, which is 12"
    with refused(f"writer_heads is {heads}", allowed):
        small_config(dim=12, writer_heads=heads)


@given(value=not_finite | st.floats(max_value=0.0))
def test_temperatures_that_are_not_above_zero(value):
    for make in (
        lambda: small_config(temperature=value),
        lambda: MemoryWriter(6, 2, value),
    ):
        with refused(f"temperature is {value}", "finite and above 0"):
            make()


@given(value=not_finite | st.floats(max_value=0.0))
def test_forgetting_strengths_that_are_not_above_zero(value):
    with refused("forget_strength", value, "finite and above 0"):
        small_config(forget_strength=value)
    with refused("strength", value, "finite", "above 0"):
        BiasedMemoryNorm(3, 4, strength=value)


@given(value=not_finite | st.floats(1.0, 99.0) | st.floats(-99.0, 0.0))
def test_a_self_weight_that_cannot_be(value):
    with refused(f"self_weight is {value}", "finite and in (0, 1)"):
        small_config(self_weight=value)


@given(value=not_finite | st.floats(-99.0, -0.01))
def test_a_reader_start_that_is_no_size(value):
    with refused(f"reader_start is {value}", "finite and at least 0"):
        small_config(reader_start=value)


@given(value=not_finite | st.floats(1.0, 99.0) | st.floats(-99.0, -0.01))
def test_a_dropout_that_is_no_probability(value):
    with refused("dropout", value, "in [0, 1)"):
        small_config(dropout=value)


@given(value=st.integers(-9, -1) | st.integers(23, 99))
def test_a_start_token_outside_the_vocabulary(value):
    allowed = "at least 0" if value < 0 else "below vocab_size, 23"
    with refused(f"start_token is {value}", allowed):
        small_config(vocab_size=23, start_token=value)


@given(value=words)
def test_words_that_are_not_on_the_list(value):
    with refused("positions", repr(value), "rotary", "relative", "none"):
        MultiHeadAttention(6, 3, max_length=4, positions=value)
    with refused("positions", repr(value), "rotary", "relative", "none"):
        small_config(positions=value)
    with refused("init", repr(value), "'learn'", "'paper'"):
        small_config(init=value)


def test_rotary_positions_of_odd_heads():
    with refused("3 features", "pairs"):
        MemformerLM(small_config(dim=9, num_heads=3, writer_heads=1))
    with refused("3 features", "pairs"):
        MultiHeadAttention(9, 3, max_length=4, positions="rotary")


def test_the_defaults_are_allowed():
    config = MemformerConfig(vocab_size=10)
    assert {f.name for f in fields(config)} > {*SIZES, "dim", "temperature"}
    with pytest.raises(AttributeError):
        config.dim = 3  # frozen


@given(slots=st.integers(-5, 5), dim=st.integers(-5, 5))
def test_slots_below_one(slots, dim):
    for make in (separate_slots, BiasedMemoryNorm):
        if slots > 0 and dim > 0:
            make(slots, dim)
        else:
            named = f"num_slots is {slots}" if slots < 1 else f"dim is {dim}"
            with refused(named, "at least 1"):
                make(slots, dim)


@every_model
@given(batch=not_positive)
def test_batches_below_one(model, batch):
    with refused(f"batch_size is {batch}", "at least 1"):
        build(model).initial_state(batch)


@given(repeats=not_positive)
def test_repeats_below_one(repeats):
    with refused(f"repeats is {repeats}", "at least 1"):
        seconds(lambda: None, repeats)


# --- tokens ---------------------------------------------------------------------------------


@every_model
@given(bad=st.integers(-(10**6), -1) | st.integers(23, 10**6), place=st.integers(0, 9))
def test_tokens_outside_the_vocabulary(model, bad, place):
    net = build(model)
    tokens = tokens_for(net, 2, 5)
    tokens[place % 2, place // 2] = bad
    with refused(bad, "[0, 23)"):
        net(tokens, net.initial_state(2))
    if hasattr(net, "advance"):
        with refused(bad, "[0, 23)"):
            net.advance(tokens, net.initial_state(2))


@every_model
@given(shape=st.lists(st.integers(1, 3), max_size=4).filter(lambda s: len(s) != 2))
def test_tokens_of_another_rank(model, shape):
    net = build(model)
    with refused(tuple(shape), "(batch, time)"):
        net(torch.zeros(shape, dtype=torch.int64), net.initial_state(2))
    with refused(tuple(shape), "(batch, time)"):
        split_segments(torch.zeros(shape, dtype=torch.int64), 3)


@every_model
@given(dtype=st.sampled_from([torch.int32, torch.uint8, torch.bool, torch.float32]))
def test_tokens_of_another_type(model, dtype):
    net = build(model)
    with refused(dtype, "torch.int64", kind=TypeError):
        net(tokens_for(net, 2, 5).to(dtype), net.initial_state(2))


@every_model
@given(length=st.integers(8, 50))
def test_a_segment_that_is_too_long(model, length):
    net = build(model)
    with refused(f"{length} tokens", "7", "split_segments"):
        net(tokens_for(net, 2, length), net.initial_state(2))


@given(length=st.integers(9, 30))
def test_more_positions_than_there_are_distances(length):
    net = MultiHeadAttention(6, 2, max_length=8, positions="relative")
    with refused(f"{length} positions", "8"):
        net(torch.zeros(1, length, 6))


@every_model
def test_an_empty_segment(model):
    net = build(model)
    for shape in ((2, 0), (0, 3)):
        with refused(shape, "(batch, time)", "neither 0"):
            net(torch.zeros(shape, dtype=torch.int64), net.initial_state(2))


def test_an_empty_stream():
    net = build(MemformerLM)
    with refused("empty", "at least one token"):
        split_segments(torch.zeros(2, 0, dtype=torch.int64), 3)
    with refused("empty", "at least one token"):
        run_segments(net, torch.zeros(2, 0, dtype=torch.int64), 3)
    with refused("no segments"):
        trace(net, [], net.initial_state(2))


@given(length=not_positive)
def test_segment_lengths_below_one(length):
    with refused(f"length is {length}", "at least 1"):
        split_segments(torch.zeros(2, 5, dtype=torch.int64), length)


@every_model
@given(shape=st.sampled_from([(2, 4), (1, 5), (5,), (2, 5, 1)]))
def test_a_mask_of_another_shape_or_type(model, shape):
    net = build(model)
    tokens, state = tokens_for(net, 2, 5), net.initial_state(2)
    with refused(shape, (2, 5), "torch.bool"):
        net(tokens, state, torch.ones(shape, dtype=torch.bool))
    with refused("torch.int64", "torch.bool"):
        net(tokens, state, torch.ones(2, 5, dtype=torch.int64))
    layer = MultiHeadAttention(6, 2, max_length=8)
    with refused(shape, (2, 5), "torch.bool"):
        layer(torch.zeros(2, 5, 6), mask=torch.ones(shape, dtype=torch.bool))


# --- memory ---------------------------------------------------------------------------------


def with_memory(state, change):
    """The state with another memory in it."""
    if isinstance(state, torch.Tensor):
        return change(state)
    return state._replace(memory=change(state.memory))


@every_model
@given(batch=st.integers(1, 4), slots=st.integers(1, 7), dim=st.integers(1, 14))
def test_a_memory_of_another_shape(model, batch, slots, dim):
    net = build(model)
    state = with_memory(net.initial_state(2), lambda _: randn(batch, slots, dim))
    tokens = tokens_for(net, 2, 5)
    if (batch, slots, dim) == (2, 5, 12):
        net(tokens, state)
    else:
        with refused((batch, slots, dim), (2, 5, 12), "initial_state"):
            net(tokens, state)


@every_model
@given(batch=st.integers(1, 4), tokens=st.integers(1, 4))
def test_a_state_of_another_batch_size(model, batch, tokens):
    """Above all a batch of one, which would be broadcast without a word."""
    net = build(model)
    for call in (net, getattr(net, "advance", net)):
        if batch == tokens:
            call(tokens_for(net, tokens, 5), net.initial_state(batch))
        else:
            with refused(batch, tokens):
                call(tokens_for(net, tokens, 5), net.initial_state(batch))


@every_model
@given(dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]))
def test_a_memory_of_another_type(model, dtype):
    net = build(model)
    state = with_memory(net.initial_state(2), lambda m: m.to(dtype))
    with refused(dtype, "torch.float64", ".to()", kind=TypeError):
        net(tokens_for(net, 2, 5), state)


@every_model
def test_a_memory_on_another_device(model):
    net = build(model)
    state = with_memory(net.initial_state(2), lambda m: m.to("meta"))
    with refused("meta", "cpu", ".to()", kind=RuntimeError):
        net(tokens_for(net, 2, 5), state)


@every_model
@given(value=not_finite, places=st.sets(st.integers(0, 119), min_size=1, max_size=9))
def test_a_memory_that_is_not_finite(model, value, places):
    net = build(model)

    def poison(memory):
        memory = memory.detach().clone(memory_format=torch.contiguous_format)
        memory.view(-1)[list(places)] = value
        return memory

    with refused(f"{len(places)} values", "NaN or infinite", "restart"):
        net(tokens_for(net, 2, 5), with_memory(net.initial_state(2), poison))


@every_model
def test_nothing_is_refused_in_a_good_call(model):
    net = build(model)
    out, state = net(tokens_for(net, 2, 5), net.initial_state(2))
    assert out.isfinite().all()
    assert memory_in(state).isfinite().all()


def test_a_trace_of_what_has_no_writer():
    with refused("0 MemoryWriter", "exactly one"):
        trace(torch.nn.Linear(2, 2), [torch.zeros(1, 1).long()], torch.zeros(1, 1, 2))
    both = torch.nn.ModuleList([build(MemformerLM), build(Memformer)])
    with refused("2 MemoryWriter", "exactly one"):
        trace(both, [torch.zeros(1, 1).long()], torch.zeros(1, 1, 2))


@given(leaf=st.none() | st.integers() | words)
def test_a_state_with_something_else_in_it(leaf):
    for place in (leaf, [leaf], {"memory": leaf}):
        with refused(type(leaf).__name__, "made of tensors", kind=TypeError):
            map_state(torch.neg, (torch.zeros(2), (place,)))


def test_states_that_do_not_match():
    one, pair = torch.zeros(2), (torch.zeros(2), torch.zeros(2))
    for state, other in ((one, pair), (pair, one), (pair, (one,))):
        with refused("nested alike", kind=TypeError):
            map_state(torch.add, state, other)
    for fresh, reset in (((3, 4), 2), ((2, 4), 3), ((2, 4), 1)):
        with refused((2, 4), fresh, (reset,)):
            reset_state(torch.zeros(2, 4), torch.zeros(fresh), torch.ones(reset).bool())


@given(slots=st.integers(1, 6), dim=st.integers(1, 6))
def test_a_memory_that_the_forgetting_does_not_fit(slots, dim):
    norm = BiasedMemoryNorm(3, 4)
    if (slots, dim) == (3, 4):
        norm(torch.zeros(2, slots, dim))
    else:
        with refused((2, slots, dim), (3, 4)):
            norm(torch.zeros(2, slots, dim))


@given(steps=st.integers(-9, -1))
def test_steps_below_zero(steps):
    with refused(f"steps is {steps}", "at least 0"):
        drift_angle(torch.ones(1), 1.0, steps)


@given(share=st.floats(-9, 0) | st.floats(1, 9) | not_finite, length=not_positive)
def test_self_weights_and_lengths_that_cannot_be(share, length):
    with refused(share, "between 0 and 1"):
        keep_bias_for(share, 5)
    with refused(f"length is {length}", "at least 1"):
        keep_bias_for(0.5, length)


@every_model
@given(state=st.none() | st.integers() | words)
def test_what_is_no_state(model, state):
    with refused(type(state).__name__, "initial_state", kind=TypeError):
        build(model)(torch.zeros(2, 5, dtype=torch.int64), state)


def test_a_state_of_another_model():
    lm, whole = build(MemformerLM), build(Memformer)
    tokens = tokens_for(lm, 2, 5)
    with refused("MemformerState", "initial_state", kind=TypeError):
        lm(tokens, whole.initial_state(2))
    with refused("Tensor", "initial_state", kind=TypeError):
        whole(tokens, lm.initial_state(2))


# --- tasks ----------------------------------------------------------------------------------


@given(pairs=st.integers(-9, 30), segments=st.integers(-9, 9))
def test_pairs_and_segments_out_of_range(pairs, segments):
    if not 1 <= pairs <= 16:
        with refused(f"pairs is {pairs}", "[1, 16]"):
            RecallTask(pairs, segments)
    elif segments < 2:
        with refused(f"segments is {segments}", "at least 2"):
            RecallTask(pairs, segments)
    else:
        RecallTask(pairs, segments)


@given(value=words)
def test_noise_of_another_kind(value):
    with refused(repr(value), "'own'", "'shared'"):
        RecallTask(2, 3, value)


@given(value=not_finite | st.floats(-9, 0) | st.floats(1, 9))
def test_a_threshold_that_is_no_share(value):
    with refused(f"threshold is {value}", "between 0 and 1"):
        Curriculum(RecallTask(2, 3), threshold=value)
    with refused("start is 4", "2…3"):
        Curriculum(RecallTask(2, 3), start=4)


@given(batch=not_positive)
def test_problems_below_one(batch):
    with refused(batch, "at least 1"):
        RecallTask(2, 3).batch(batch, torch.Generator())
    net = build(MemformerLM, vocab_size=49)
    with refused(batch, "at least 1"):
        recall_accuracy(net, RecallTask(2, 3), trials=batch)


def test_a_model_that_is_too_small_for_the_task():
    with refused("23"):
        recall_accuracy(build(MemformerLM), RecallTask(2, 3), trials=64)
    with refused("10 tokens", "7"):
        recall_accuracy(build(MemformerLM, vocab_size=49), RecallTask(5, 3), trials=2)


def test_scores_of_nothing():
    net = build(MemformerLM, vocab_size=49)
    for segments in ([], RecallTask(2, 3).batch(2, torch.Generator())[:2]):
        with refused("target"):
            scores_and_answers(net, segments)
