"""Streams and generation: the cache against the plain call, borders, resets, dice, bytes."""

import math
import weakref

import numpy as np
import pytest
import torch
from helpers import SEGMENT_MODELS, build, close, far, memory_in, states_close, tokens_for
from hypothesis import given
from hypothesis import strategies as st

from memformer.checks import MemoryOverflowError
from memformer.model import Memformer, MemformerEncoder, MemformerLM, MemformerState
from memformer.segments import IGNORE, Segment, reset_state, run_segments, split_segments
from memformer.streaming import (
    CachedDecoder,
    RecomputingDecoder,
    Sampler,
    count_bytes,
    cut_stream,
    generate,
    generate_forever,
    incremental,
    segment_length,
    stream,
)

POSITIONS = "rotary", "relative", "none"
WIDTHS = pytest.mark.parametrize("width", [1, 2, 4, 6, 9])  # of the convolution; segments: 7
EVERY = pytest.mark.parametrize("kind", SEGMENT_MODELS)


def net(kind, positions="rotary", **changes):
    sizes = {"num_heads": 2} if positions == "rotary" else {}  # pairs of features a head
    return build(kind, positions=positions, **(sizes | changes))


def feed_all(decoder, tokens, sizes):
    """Feed pieces of the given sizes in turn; the last takes the rest."""
    scores, begin = [], 0
    for size in [*sizes, tokens.shape[1]]:
        if begin < tokens.shape[1]:
            scores.append(decoder.feed(tokens[:, begin : begin + size]))
            begin += size
    return torch.cat(scores, dim=1)


class Counter(torch.nn.Module):
    """A segment model without config, mask or attention: scores follow from a running sum."""

    def initial_state(self, batch_size):
        return (torch.zeros(batch_size, dtype=torch.float64), ())

    def forward(self, tokens, state):
        total = state[0][:, None] + tokens.cumsum(dim=1)
        return torch.stack([(total * (v + 1)).sin() for v in range(5)], dim=-1), (
            total[:, -1],
            (),
        )

    def advance(self, tokens, state):
        return self(tokens, state)[1]


# ---------------------------------------------------------------- the cache


@EVERY
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("init", ["learn", "paper"])
@pytest.mark.parametrize("cache", [True, False])
def test_scores_and_state_equal_the_plain_call(kind, positions, init, cache):
    model = net(kind, positions, init=init)
    tokens = tokens_for(model, 3, 33)
    expected, state = run_segments(model, tokens, 7)
    decoder = incremental(model, 3, cache=cache)
    sizes = torch.randint(1, 17, (33,)).tolist()
    close(feed_all(decoder, tokens, sizes), expected)
    states_close(decoder.end_segment(), state)


@EVERY
@WIDTHS
@pytest.mark.parametrize("cache", [True, False])
def test_the_convolution_meets_the_tokens_of_its_own_segment(kind, width, cache):
    model = net(kind, convolution=width)
    tokens = tokens_for(model, 3, 40)
    expected, state = run_segments(model, tokens, 7)
    decoder = incremental(model, 3, cache=cache)
    close(feed_all(decoder, tokens, torch.randint(1, 6, (40,)).tolist()), expected)
    states_close(decoder.end_segment(), state)


@EVERY
@WIDTHS
@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize("size", [1, 2])
def test_the_convolution_of_a_row_that_begins_late(kind, width, at, size):
    """The tokens of the document before do not meet those of the new one."""
    model = net(kind, convolution=width)
    tokens = tokens_for(model, 2, 21)
    decoder = incremental(model, 2)
    feed_all(decoder, tokens[:, :at], [1, 1])
    decoder.reset(torch.tensor([False, True]))
    after = feed_all(decoder, tokens[:, at:], [size] * 21)
    close(after[1:], document_alone(model, tokens[1:], at, 21))
    close(after[:1], run_segments(model, tokens[:1], 7)[0][:, at:])


@EVERY
@pytest.mark.parametrize("positions", POSITIONS)
def test_token_by_token(kind, positions):
    model = net(kind, positions)
    tokens = tokens_for(model, 2, 22)
    expected, _ = run_segments(model, tokens, 7)
    decoder = incremental(model, 2)
    assert isinstance(decoder, CachedDecoder)
    for i in range(22):
        close(decoder.feed(tokens[:, i : i + 1])[:, 0], expected[:, i])
        close(decoder.scores, expected[:, i])


@EVERY
@pytest.mark.parametrize("positions", POSITIONS)
def test_single_precision(kind, positions):
    model = net(kind, positions).float()
    tokens = tokens_for(model, 2, 30)
    expected, state = run_segments(model, tokens, 7)
    decoder = incremental(model, 2)
    scores = feed_all(decoder, tokens, [1, 1, 8, 3])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    memory = memory_in(decoder.end_segment())
    torch.testing.assert_close(memory, memory_in(state), rtol=1e-5, atol=1e-5)


@EVERY
def test_bfloat16_is_close(kind):
    model = net(kind).bfloat16()
    tokens = tokens_for(model, 2, 21)
    expected, _ = run_segments(model, tokens, 7)
    scores = feed_all(incremental(model, 2), tokens, [1] * 10)
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(scores, expected, rtol=0.1, atol=0.1)


@EVERY
def test_autocast_runs(kind):
    model = net(kind).float()
    tokens = tokens_for(model, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = run_segments(model, tokens, 7)
        scores = feed_all(incremental(model, 2), tokens, [1] * 9)
    torch.testing.assert_close(scores, expected, rtol=0.1, atol=0.1)


@EVERY
def test_starts_from_a_given_state(kind):
    model = net(kind)
    tokens = tokens_for(model, 2, 28)
    _, state = run_segments(model, tokens[:, :14], 7)
    expected, last = run_segments(model, tokens[:, 14:], 7, state)
    decoder = incremental(model, 2, state)
    close(feed_all(decoder, tokens[:, 14:], [2, 4]), expected)
    states_close(decoder.state, last)  # a full segment ends itself


@EVERY
@pytest.mark.parametrize("cache", [True, False])
def test_segments_may_end_early(kind, cache):
    model = net(kind)
    tokens = tokens_for(model, 2, 9)
    expected, state = run_segments(model, tokens, 4)
    decoder = incremental(model, 2, cache=cache)
    scores = []
    for piece in split_segments(tokens, 4):
        scores.append(feed_all(decoder, piece, [1, 1]))
        decoder.end_segment()
    close(torch.cat(scores, dim=1), expected)
    states_close(decoder.end_segment(), state)  # ending an empty segment changes nothing


@EVERY
@pytest.mark.parametrize("cache", [True, False])
def test_shorter_segments_on_request(kind, cache):
    model = net(kind, "relative")
    tokens = tokens_for(model, 2, 11)
    expected, _ = run_segments(model, tokens, 3)
    close(feed_all(incremental(model, 2, length=3, cache=cache), tokens, [1, 2, 5]), expected)


@EVERY
def test_a_state_with_padding_is_masked(kind):
    model = net(kind)
    tokens, mask = tokens_for(model, 2, 7), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    _, state = model(tokens, model.initial_state(2), mask)
    following = tokens_for(model, 2, 10)
    expected, _ = run_segments(model, following, 7, state)
    close(feed_all(incremental(model, 2, state), following, [1, 3]), expected)


@EVERY
@pytest.mark.parametrize("cache", [True, False])
def test_dropout_is_off_and_modes_come_back(kind, cache):
    model = net(kind, dropout=0.5)
    tokens = tokens_for(model, 2, 16)
    expected, _ = run_segments(model, tokens, 7)
    model.train()
    one = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)).eval()
    close(feed_all(incremental(model, 2, cache=cache), tokens, [1, 2]), expected)
    close(torch.cat([reading.scores for reading in stream(model, tokens)], dim=1), expected)
    assert model.training
    assert not one.training
    with pytest.raises(ValueError, match="ids"):
        list(stream(model, tokens + 23))
    assert model.training


@EVERY
def test_no_graph_is_kept(kind):
    model = net(kind)
    decoder = incremental(model, 2)
    scores = decoder.feed(tokens_for(model, 2, 9))
    state = decoder.end_segment()
    assert not scores.requires_grad
    assert not memory_in(state).requires_grad
    for reading in stream(model, tokens_for(model, 2, 9)):
        assert not reading.scores.requires_grad
        assert not memory_in(reading.state).requires_grad


@EVERY
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_bytes_never_grow(kind, cache, positions):
    model = net(kind, positions)
    decoder = incremental(model, 2, cache=cache)
    held = []
    for _ in range(12):
        at_each = []
        for _ in range(7):
            decoder.feed(tokens_for(model, 2, 1))
            at_each.append(count_bytes(decoder))
        held.append(max(at_each))
    assert len(set(held[1:])) == 1
    decoder.feed(tokens_for(model, 2, 500))
    assert count_bytes(decoder) <= max(held)
    decoder.feed(tokens_for(model, 2, 11))
    assert count_bytes(decoder) <= max(held)


def test_the_cache_is_one_segment_of_keys_and_values():
    model = net(MemformerLM)
    decoder = incremental(model, 2)
    decoder.feed(tokens_for(model, 2, 30))
    for layer in decoder.cache.layers:
        assert layer.tokens.store.shape == (2, 2, 2, 7, 6)  # keys and values
        assert layer.source.store.shape == (2, 2, 2, 5, 6)


def test_count_bytes_counts_storages_once():
    held = torch.zeros(10, dtype=torch.float64)
    assert count_bytes(held, [held[:3], (held.view(2, 5),)]) == 80
    assert count_bytes(held, torch.zeros(3)) == 92
    assert count_bytes(net(MemformerLM), None) == 0


# ---------------------------------------------------------------- resets


@EVERY
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("at", [3, 7, 10, 14, 20])
def test_a_reset_row_is_a_document_with_a_shorter_first_segment(kind, positions, cache, at):
    model = net(kind, positions)
    tokens = tokens_for(model, 3, 30)
    rows = torch.tensor([False, True, False])
    decoder = incremental(model, 3, cache=cache)
    before = decoder.feed(tokens[:, :at])
    decoder.reset(rows)
    after = feed_all(decoder, tokens[:, at:], [1, 1, 2, 5])
    scores = torch.cat((before, after), dim=1)
    whole, whole_state = run_segments(model, tokens, 7)
    close(scores[~rows], whole[~rows])
    close(scores[rows, :at], whole[rows, :at])

    first = 7 - at % 7  # what is left of the segment in which the document begins
    head, state = model(tokens[rows, at : at + first], model.initial_state(1))
    tail, state = run_segments(model, tokens[rows, at + first :], 7, state)
    close(scores[rows, at:], torch.cat((head, tail), dim=1))
    end = decoder.end_segment()
    close(memory_in(end)[~rows], memory_in(whole_state)[~rows])
    close(memory_in(end)[rows], memory_in(state))
    if isinstance(end, MemformerState):
        assert torch.equal(end.mask[rows], state.mask)
        assert torch.equal(end.tokens[rows] * end.mask[rows], state.tokens * state.mask)


@EVERY
@pytest.mark.parametrize("cache", [True, False])
def test_the_state_of_a_row_that_began_late(kind, cache):
    model = net(kind)
    tokens = tokens_for(model, 2, 7)
    decoder = incremental(model, 2, cache=cache)
    decoder.feed(tokens[:, :3])
    decoder.reset(torch.tensor([False, True]))
    decoder.feed(tokens[:, 3:])
    alone = model(tokens[1:, 3:], model.initial_state(1))[1]
    other = model(tokens[:1], model.initial_state(1))[1]
    if kind is MemformerLM:
        states_close(decoder.state, torch.cat((other, alone)))
    else:
        for left, *right in zip(decoder.state, other, alone, strict=True):
            states_close(left, torch.cat(right))


def document_alone(model, tokens, begin, end):
    """Scores of one stream's document that began at `begin`, borders where they were."""
    state, scores = model.initial_state(1), []
    while begin < end:
        border = min(end, begin + 7 - begin % 7)
        logits, state = model(tokens[:, begin:border], state)
        scores.append(logits)
        begin = border
    return torch.cat(scores, dim=1)


@EVERY
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("cache", [True, False])
def test_resets_one_after_another(kind, positions, cache):
    model = net(kind, positions)
    tokens = tokens_for(model, 4, 40)
    decoder = incremental(model, 4, cache=cache)
    scores, at, borders = [], 0, [[0] for _ in range(4)]
    while at < 40:
        size = min(40 - at, int(torch.randint(1, 6, ())))
        scores.append(decoder.feed(tokens[:, at : at + size]))
        at += size
        rows = torch.rand(4) < 0.4
        decoder.reset(rows)
        for row, places in zip(rows, borders, strict=True):
            places.extend([at] if row else [])
    scores = torch.cat(scores, dim=1)
    for b, places in enumerate(borders):
        for begin, end in zip(places, [*places[1:], 40], strict=True):
            if begin < end:
                alone = document_alone(model, tokens[b : b + 1], begin, end)
                close(scores[b : b + 1, begin:end], alone)


@EVERY
@pytest.mark.parametrize("cache", [True, False])
def test_a_row_that_read_nothing_keeps_its_initial_state(kind, cache):
    model = net(kind)
    decoder = incremental(model, 2, cache=cache)
    decoder.feed(tokens_for(model, 2, 4))
    decoder.reset(torch.tensor([True, False]))
    state = decoder.end_segment()
    fresh = model.initial_state(2)
    close(memory_in(state)[0], memory_in(fresh)[0])
    assert far(memory_in(state)[1], memory_in(fresh)[1]) or kind is Memformer


def test_resets_of_a_model_without_masks():
    model = Counter()
    tokens = torch.randint(5, (3, 12))
    decoder = incremental(model, 3, length=4)
    assert isinstance(decoder, RecomputingDecoder)
    before = decoder.feed(tokens[:, :6])
    rows = torch.tensor([True, False, True])
    decoder.reset(rows)
    after = feed_all(decoder, tokens[:, 6:], [1, 2])
    close(
        torch.cat((before, after), dim=1)[~rows],
        model(tokens, model.initial_state(3))[0][~rows],
    )
    close(after[rows], model(tokens[rows, 6:], model.initial_state(2))[0])


# ---------------------------------------------------------------- streams


@EVERY
@given(data=st.data())
def test_any_chunking_gives_the_same_scores(kind, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    model = net(kind)
    sizes = data.draw(st.lists(st.integers(0, 18), min_size=1, max_size=6))
    tokens = tokens_for(model, 2, sum(sizes) + 1)
    expected, state = run_segments(model, tokens, 7)
    chunks = tokens.split([*sizes, 1], dim=1)
    readings = list(stream(model, iter(chunks)))
    close(torch.cat([r.scores for r in readings], dim=1), expected)
    assert torch.equal(torch.cat([r.tokens for r in readings], dim=1), tokens)
    assert all(r.tokens.shape[1] == 7 for r in readings[:-1])
    states_close(readings[-1].state, state)
    decoder = incremental(model, 2)
    close(torch.cat([decoder.feed(c) for c in chunks if c.shape[1]], dim=1), expected)


@EVERY
def test_stream_of_one_tensor_is_run_segments(kind):
    model = net(kind)
    tokens = tokens_for(model, 2, 25)
    state = run_segments(model, tokens_for(model, 2, 9), 7)[1]
    expected, last = run_segments(model, tokens, 7, state)
    readings = list(stream(model, tokens, state))
    assert torch.equal(torch.cat([r.scores for r in readings], dim=1), expected)
    states_close(readings[-1].state, last)
    shorter = list(stream(model, tokens, state, length=4))
    close(
        torch.cat([r.scores for r in shorter], dim=1), run_segments(model, tokens, 4, state)[0]
    )


@EVERY
def test_segments_with_masks_and_resets(kind):
    model = net(kind)
    segments, expected, state = [], [], model.initial_state(3)
    for t in range(6):
        tokens, mask = tokens_for(model, 3, 7), torch.ones(3, 7, dtype=torch.bool)
        if t in (2, 4):
            mask[1, 3:] = False
            mask[2] = False
        reset = torch.tensor([t == 0, t in (0, 3), t in (0, 5)])
        segments.append(Segment(tokens, torch.full_like(tokens, IGNORE), mask, reset))
        state = reset_state(state, model.initial_state(3), reset)
        scores, state = model(tokens, state, mask)
        expected.append(scores)
    readings = list(stream(model, iter(segments)))
    for reading, segment, scores in zip(readings, segments, expected, strict=True):
        close(reading.scores[segment.mask], scores[segment.mask])
    states_close(readings[-1].state, state)
    (single,) = stream(model, segments[0])
    close(single.scores, expected[0])


def test_a_segment_comes_after_what_was_waiting():
    model = net(MemformerLM)
    tokens = tokens_for(model, 2, 8)
    segment = Segment(tokens[:, 3:6], tokens, tokens[:, 3:6] >= 0, torch.tensor([False, False]))
    chunks = [tokens[:, :2], tokens[:, 2:3], segment, tokens[:, 6:]]
    assert [r.tokens.shape[1] for r in stream(model, chunks)] == [3, 3, 2]


def test_an_endless_stream_is_read_as_it_goes():
    model, drawn = net(MemformerLM), []

    def source():
        while True:
            drawn.append(tokens_for(model, 2, 3))
            yield drawn[-1]

    readings = stream(model, source())
    for count in (3, 5, 7):  # 7 tokens need 3 chunks, 14 need 5, 21 need 7
        next(readings)
        assert len(drawn) == count


def test_the_cutter_lets_go_of_chunks():
    chunk = torch.zeros(2, 10_000, dtype=torch.long)
    pieces = list(cut_stream([chunk[:, :9_998], chunk[:, :1]], 7))
    assert all(piece.untyped_storage().nbytes() <= 2 * 7 * 8 for piece in pieces)
    assert sum(piece.shape[1] for piece in pieces) == 9_999


def test_no_chunk_is_held_while_the_next_is_made():
    made, alive = [], []

    def source():
        for _ in range(4):
            alive.append(sum(chunk() is not None for chunk in made))
            chunk = torch.zeros(1, 9, dtype=torch.long)
            made.append(weakref.ref(chunk))
            yield chunk
            del chunk

    assert sum(piece.shape[1] for piece in cut_stream(source(), 4)) == 36
    assert alive == [0, 0, 0, 0]


def test_a_model_without_config_streams_and_generates():
    model = Counter()
    tokens = torch.randint(5, (2, 11))
    expected = model(tokens, model.initial_state(2))[0]
    for length in (1, 4, 20):
        readings = stream(model, tokens, length=length)
        close(torch.cat([r.scores for r in readings], dim=1), expected)
    decoder = incremental(model, 2, length=3)
    out = generate(model, tokens, 9, temperature=0, state=decoder)
    again = torch.cat((tokens, out), dim=1)
    assert torch.equal(model(again, model.initial_state(2))[0].argmax(-1)[:, 10:-1], out)


# ---------------------------------------------------------------- dice


def test_greedy_is_argmax_and_top_one():
    scores = torch.randn(50, 17)
    best = scores.argmax(dim=-1)
    assert torch.equal(Sampler(temperature=0)(scores), best)
    assert torch.equal(Sampler(top_k=1)(scores), best)
    assert torch.equal(Sampler(top_p=1e-6)(scores), best)
    assert torch.equal(Sampler(temperature=1e-12)(scores), best)
    one = Sampler(temperature=0).probabilities(scores)
    assert torch.equal(one, torch.nn.functional.one_hot(best, 17).float())


@given(data=st.data())
def test_probabilities_against_a_slow_reference(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    size = data.draw(st.integers(1, 12))
    warm = data.draw(st.floats(0.1, 5))
    k = data.draw(st.none() | st.integers(1, 15))
    p = data.draw(st.none() | st.floats(0.01, 1))
    scores = torch.randn(3, size, dtype=torch.float64) * 3
    chances = Sampler(warm, k, p).probabilities(scores)
    for row, drawn in zip(scores.tolist(), chances.tolist(), strict=True):
        order = sorted(range(size), key=lambda i: -row[i])[: k or size]
        weight = {i: math.exp((row[i] - max(row)) / warm) for i in order}
        total, kept, mass = sum(weight.values()), {}, 0.0
        for i in order:
            if p is None or mass < p:
                kept[i] = weight[i]
            mass += weight[i] / total
        expected = [kept.get(i, 0.0) / sum(kept.values()) for i in range(size)]
        assert drawn == pytest.approx(expected, abs=1e-10)


def test_equal_scores_still_give_exactly_k():
    chances = Sampler(top_k=3).probabilities(torch.zeros(2, 9))
    assert (chances > 0).sum(dim=1).tolist() == [3, 3]
    close(chances.sum(dim=1), torch.ones(2))


def test_a_share_that_is_just_reached_is_enough():
    """Four equal tokens: two of them have the share .5, three more than .5."""
    scores = torch.zeros(1, 4)
    for share, count in ((0.5, 2), (0.5001, 3), (0.25, 1), (1.0, 4)):
        chances = Sampler(top_p=share).probabilities(scores)
        assert torch.equal(chances[0, :count], torch.full((count,), 1 / count))
        assert (chances[0, count:] == 0).all()


def test_draws_follow_the_probabilities():
    scores = torch.randn(1, 6).expand(60_000, 6)
    sampler = Sampler(0.7, 5, 0.95)
    chances = sampler.probabilities(scores[:1])[0]
    counts = torch.bincount(sampler(scores), minlength=6)
    assert (counts[chances == 0] == 0).all()
    some = chances > 0
    expected = chances[some] * 60_000
    chi = ((counts[some] - expected) ** 2 / expected).sum()
    assert chi < 35  # 4 degrees of freedom at most: once in two million runs


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 4}, {"top_p": 0.8}])
def test_a_draw_is_drawn_as_multinomial_draws(settings, seed):
    scores, dice, same = torch.randn(40, 9), torch.Generator(), torch.Generator()
    sampler = Sampler(generator=dice.manual_seed(seed), **settings)
    drawn = torch.multinomial(
        sampler.probabilities(scores), 1, generator=same.manual_seed(seed)
    )
    assert torch.equal(sampler(scores), drawn.squeeze(1))


@EVERY
def test_generation_by_seed_leaves_the_global_generator_alone(kind):
    model = net(kind)
    prompt = tokens_for(model, 3, 5)
    before = torch.get_rng_state()
    one = generate(model, prompt, 30, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, generate(model, prompt, 30, seed=5, cache=False))
    given_one = generate(model, prompt, 30, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, given_one)
    assert not torch.equal(one, generate(model, prompt, 30, seed=6))
    assert one.shape == (3, 30)
    free = generate(model, prompt, 30)
    torch.set_rng_state(before)
    assert torch.equal(free, generate(model, prompt, 30))


@EVERY
def test_greedy_generation_is_the_argmax_of_the_plain_call(kind):
    model = net(kind)
    prompt = tokens_for(model, 2, 10)
    out = generate(model, prompt, 20, temperature=0)
    both = torch.cat((prompt, out), dim=1)
    scores = run_segments(model, both, 7)[0]
    assert torch.equal(scores.argmax(dim=-1)[:, 9:-1], out)


@EVERY
@pytest.mark.parametrize("split", [1, 6, 7, 13])
def test_generation_goes_on_as_if_never_stopped(kind, split):
    model = net(kind)
    prompt = tokens_for(model, 2, 9)
    dice = torch.Generator()
    whole = generate(model, prompt, 20, generator=dice.manual_seed(1))
    decoder = incremental(model, 2)
    decoder.feed(prompt[:, :4])
    dice.manual_seed(1)
    first = generate(model, prompt[:, 4:], split, generator=dice, state=decoder)
    rest = generate(model, None, 20 - split, generator=dice, state=decoder)
    assert torch.equal(torch.cat((first, rest), dim=1), whole)


@EVERY
def test_generation_from_a_model_state(kind):
    model = net(kind)
    prompt = tokens_for(model, 2, 17)
    state = run_segments(model, prompt[:, :14], 7)[1]
    expected = generate(model, prompt, 12, seed=2)
    assert torch.equal(generate(model, prompt[:, 14:], 12, seed=2, state=state), expected)


@EVERY
def test_without_a_prompt_the_start_token_is_read(kind):
    model = net(kind, start_token=3)
    begin = torch.full((1, 1), 3)
    assert torch.equal(generate(model, None, 9, seed=1), generate(model, begin, 9, seed=1))
    two = generate(model, None, 9, seed=1, state=model.initial_state(2))
    assert two.shape == (2, 9)


def test_the_endless_form_agrees_and_goes_on():
    model = net(MemformerLM)
    prompt = tokens_for(model, 2, 3)
    endless = generate_forever(model, prompt, seed=4, top_k=5)
    tokens = torch.stack([next(endless) for _ in range(100)], dim=1)
    assert torch.equal(tokens, generate(model, prompt, 100, seed=4, top_k=5))


def test_whatever_was_yielded_was_read():
    model = net(MemformerLM)
    decoder = incremental(model, 2)
    prompt = tokens_for(model, 2, 3)
    endless = generate_forever(model, prompt, seed=4, state=decoder)
    seen = torch.cat((prompt, torch.stack([next(endless) for _ in range(16)], dim=1)), dim=1)
    expected, state = run_segments(model, seen, 7)
    close(decoder.scores, expected[:, -1])
    close(decoder.end_segment(), state)


def test_a_compiled_model_generates_from_its_weights():
    model = net(MemformerLM)
    compiled = torch.compile(model)  # never called, so nothing is compiled
    prompt = tokens_for(model, 1, 3)
    assert torch.equal(
        generate(compiled, prompt, 9, seed=1), generate(model, prompt, 9, seed=1)
    )


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5; .* at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0; .* at least 1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0}, "top_p is 0; .*in \\(0, 1\\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"seed": 1, "generator": torch.Generator()}, "seed is 1 and there is a generator"),
    ],
)
def test_settings_of_the_sampler_are_checked_at_the_call(settings, message):
    with pytest.raises(ValueError, match=message):
        generate_forever(net(MemformerLM), None, **settings)


@EVERY
@pytest.mark.parametrize("cache", [True, False])
def test_bad_prompts(kind, cache):
    model = net(kind)
    good = tokens_for(model, 2, 4)
    cases = [
        (good[:, :0], ValueError, "shape"),
        (good[:0], ValueError, "shape"),
        (good[0], ValueError, "shape"),
        (good[0, 0], ValueError, "shape"),
        (good.float(), TypeError, "int64"),
        (good + 23, ValueError, "ids must be in"),
        (good - 23, ValueError, "ids must be in"),
    ]
    for prompt, error, message in cases:
        with pytest.raises(error, match=message):
            generate(model, prompt, 3, cache=cache)
        if prompt.ndim == 2 and len(prompt):
            with pytest.raises(error, match=message):
                incremental(model, 2, cache=cache).feed(prompt)
    with pytest.raises(ValueError, match="num_tokens is 0; it must be at least 1"):
        generate(model, good, 0)
    with pytest.raises(ValueError, match="2 rows; 3 are expected"):
        generate(model, good, 3, state=incremental(model, 3, cache=cache))


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2), 5, np.arange(6).reshape(2, 3), "text"])
def test_a_prompt_that_is_no_tensor(prompt):
    model, name = net(MemformerLM), type(prompt).__name__
    for state in (None, incremental(model, 1)):
        with pytest.raises(TypeError, match=rf"type {name}; .*torch.tensor\(\[\[1, 2, 3\]\]\)"):
            generate(model, prompt, 20, state=state)
    with pytest.raises(TypeError, match=f"type {name}"):
        incremental(model, 1).feed(prompt)


@pytest.mark.parametrize("chunks", [[1, 2, 3], np.arange(6).reshape(2, 3), ["text"], [None]])
def test_chunks_that_are_no_tensors(chunks):
    with pytest.raises(TypeError, match=r"a chunk is of type .*; a tensor .* or a Segment"):
        list(stream(net(MemformerLM), chunks))


@pytest.mark.parametrize("number", [0, -3, 2.5, math.nan, "many", None, True + 0.5])
def test_a_number_of_tokens_that_is_none(number):
    with pytest.raises(ValueError, match=r"num_tokens is .*; it must be at least 1"):
        generate(net(MemformerLM), None, number)


def test_settings_may_be_numpy_numbers():
    model, numbers = net(MemformerLM), {"temperature": np.float32(0.5), "top_k": np.int64(3)}
    plain = generate(model, None, 9, temperature=0.5, top_k=3, top_p=0.5, seed=1)
    again = generate(model, None, np.int64(9), top_p=np.float64(0.5), seed=1, **numbers)
    assert torch.equal(plain, again)


@EVERY
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_weights_that_overflowed_generate_nothing(kind, cache, temperature):
    model = net(kind)
    with torch.no_grad():
        model.output.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="scores are NaN or infinite"):
        generate_forever(model, None, temperature=temperature, cache=cache)  # at the call
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)
    for state in (None, build(kind).initial_state(2)):
        with pytest.raises(ValueError, match="NaN"):
            generate(model, None, 3, temperature=temperature, cache=cache, state=state)


def test_scores_that_overflow_later_are_refused_too():
    decoder = incremental(net(MemformerLM), 2)
    endless = generate_forever(None, None, state=decoder, temperature=0)
    next(endless)
    decoder.scores = torch.full_like(decoder.scores, math.nan)
    with pytest.raises(ValueError, match="scores are NaN"):
        next(endless)


def test_some_scores_may_be_minus_infinity():
    scores = torch.randn(4, 9)
    scores[:, 2:] = -math.inf
    for sampler in (Sampler(), Sampler(0), Sampler(0.5, 3), Sampler(top_p=0.9)):
        assert (sampler(scores) < 2).all()
    with pytest.raises(ValueError, match="infinite"):
        Sampler()(torch.full((1, 4), -math.inf))


@pytest.mark.parametrize("kind", SEGMENT_MODELS)
def test_a_state_that_overflowed(kind):
    model = net(kind)
    state = model.initial_state(1)
    memory_in(state).data = torch.full_like(memory_in(state), math.nan)
    with pytest.raises(MemoryOverflowError, match="NaN"):
        incremental(model, 1, state)
    with pytest.raises(MemoryOverflowError, match="NaN"):
        list(stream(model, tokens_for(model, 1, 3), state))


@EVERY
def test_bad_states(kind):
    model = net(kind)
    with pytest.raises((TypeError, ValueError)):
        incremental(model, 2, model.initial_state(3))
    with pytest.raises((TypeError, ValueError)):
        incremental(model, 2, ())
    with pytest.raises(ValueError, match="states of one shape"):
        incremental(model, 2).reset(torch.tensor([True]))


def test_bad_streams():
    model = net(MemformerLM)
    tokens = tokens_for(model, 2, 4)
    for wrong in (tokens[0], tokens[:, :0]):
        with pytest.raises(ValueError, match="is expected"):
            stream(model, wrong)
    with pytest.raises(ValueError, match="same batch"):
        list(stream(model, [tokens, tokens[:1]]))
    with pytest.raises(ValueError, match="same batch"):
        list(stream(model, [tokens[0]]))
    assert list(stream(model, [])) == []
    with pytest.raises(ValueError, match="length is 8; it must be in 1…7"):
        stream(model, tokens, length=8)
    with pytest.raises(ValueError, match="length is 0"):
        segment_length(model, 0)
    with pytest.raises(ValueError, match="no config"):
        stream(Counter(), tokens)
    with pytest.raises(ValueError, match=r"no config\.start"):
        generate(Counter(), None, 3, state=incremental(Counter(), 2, length=3))
    with pytest.raises(ValueError, match="batch_size is 0"):
        incremental(model, 0)
    with pytest.raises(TypeError, match="no next-token scores"):
        incremental(net(MemformerEncoder))
