"""Streams and states: nothing lost, nothing doubled, nothing shifted."""

from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from helpers import corpus_of
from hypothesis import given
from hypothesis import strategies as st

from memformer.segments import (
    IGNORE,
    DocumentStreams,
    Segment,
    begin_segment,
    count_segments,
    cut_documents,
    detach_state,
    leaves_of,
    map_state,
    reset_state,
    run_segments,
    split_segments,
)

seeds = st.integers(0, 2**32 - 1)
documents = st.lists(st.lists(st.integers(0, 9), max_size=17), min_size=1, max_size=8).filter(
    lambda lists: any(lists)
)


class Pair(NamedTuple):
    left: torch.Tensor
    right: tuple


# --- cutting --------------------------------------------------------------------------------


@given(seed=seeds, batch=st.integers(1, 3), size=st.integers(1, 30), length=st.integers(1, 12))
def test_cutting_loses_nothing_and_only_the_last_piece_is_shorter(seed, batch, size, length):
    torch.manual_seed(seed)
    tokens = torch.randint(100, (batch, size))
    pieces = split_segments(tokens, length)
    assert torch.equal(torch.cat(pieces, dim=1), tokens)
    assert all(piece.shape == (batch, length) for piece in pieces[:-1])
    assert 1 <= pieces[-1].shape[1] <= length


# --- states ---------------------------------------------------------------------------------


def nested(batch):
    tensors = [torch.randn(batch, *shape, requires_grad=True) for shape in ((), (3,), (2, 4))]
    return Pair(tensors[0], (tensors[1], (), (tensors[2],)))


def leaves(state):
    found = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)
    return found


def test_map_state_keeps_the_nesting_and_passes_fellows():
    one, other = nested(2), nested(2)
    total = map_state(torch.add, one, other)
    assert isinstance(total, Pair)
    assert isinstance(total.right, tuple)
    assert total.right[1] == ()
    for a, b, c in zip(leaves(one), leaves(other), leaves(total), strict=True):
        assert torch.equal(c, a + b)


@pytest.mark.parametrize("wrong", [None, 1, 0.5, "word", {1, 2}, object()])
def test_map_state_refuses_what_is_not_a_state(wrong):
    for state in ((torch.zeros(1), wrong), [wrong], {"memory": wrong}, wrong):
        with pytest.raises(
            TypeError, match=f"made of tensors; it holds a {type(wrong).__name__}"
        ):
            map_state(torch.neg, state)


def test_a_state_may_hold_lists_and_dicts():
    one, other = (
        {"cells": [torch.randn(2, 3), torch.randn(2)], "pair": Pair(torch.randn(2), ())}
        for _ in range(2)
    )
    total = map_state(torch.add, one, other)
    assert list(total) == ["cells", "pair"]
    assert isinstance(total["cells"], list)
    assert isinstance(total["pair"], Pair)
    for a, b, c in zip(leaves_of(one), leaves_of(other), leaves_of(total), strict=True):
        assert torch.equal(c, a + b)
    mixed = reset_state(one, other, torch.tensor([False, True]))
    assert torch.equal(
        mixed["cells"][0], torch.stack((one["cells"][0][0], other["cells"][0][1]))
    )
    for strange in ({"cells": one["cells"]}, {**one, "more": torch.zeros(2)}, one["cells"]):
        with pytest.raises(TypeError, match="nested alike"):
            map_state(torch.add, one, strange)


def test_a_model_that_carries_nothing_has_an_empty_state():
    assert map_state(torch.neg, ()) == ()
    assert reset_state((), (), torch.tensor([True])) == ()
    assert leaves_of(()) == []


def test_a_list_is_no_tuple():
    pair = torch.zeros(1), torch.zeros(1)
    with pytest.raises(TypeError, match="nested alike"):
        map_state(torch.add, pair, list(pair))
    with pytest.raises(TypeError, match="nested alike"):
        map_state(torch.add, Pair(*pair), pair)


def test_leaves_come_in_order():
    state = (torch.zeros(1), {"a": [torch.zeros(2), (torch.zeros(3),)], "b": torch.zeros(4)})
    assert [len(leaf) for leaf in leaves_of(state)] == [1, 2, 3, 4]


def test_a_detached_state_is_equal_and_without_graph():
    state = map_state(lambda t: t * 2, nested(2))
    cut = detach_state(state)
    for old, new in zip(leaves(state), leaves(cut), strict=True):
        assert torch.equal(old, new)
        assert old.requires_grad
        assert not new.requires_grad


def test_reset_takes_whole_rows_with_their_gradients():
    state, fresh, reset = nested(3), nested(3), torch.tensor([False, True, False])
    mixed = reset_state(state, fresh, reset)
    for old, new, out in zip(leaves(state), leaves(fresh), leaves(mixed), strict=True):
        assert torch.equal(out[[0, 2]], old[[0, 2]])
        assert torch.equal(out[1], new[1])
        to_old, to_new = torch.autograd.grad(out.sum(), (old, new))
        assert torch.equal(to_old.flatten(1).any(1) if old.ndim > 1 else to_old.bool(), ~reset)
        assert torch.equal(to_new.flatten(1).any(1) if new.ndim > 1 else to_new.bool(), reset)


def test_a_reset_needs_a_row_for_every_flag():
    for rows, flags in ((3, 2), (2, 3), (1, 3)):
        state = map_state(lambda t, n=rows: t[:1].expand(n, *t.shape[1:]), nested(1))
        with pytest.raises(ValueError, match=rf"reset \({flags},\)"):
            reset_state(state, state, torch.ones(flags, dtype=torch.bool))
    with pytest.raises(ValueError, match="fresh one"):  # never broadcast in silence
        reset_state(nested(3), nested(1), torch.ones(3, dtype=torch.bool))


def test_states_of_other_nestings_are_refused():
    state, reset = nested(2), torch.tensor([True, False])
    for other in (state.left, (state.left, state.right[0]), (state.left, (*state.right, ()))):
        with pytest.raises(TypeError, match="nested alike"):
            reset_state(state, other, reset)
        with pytest.raises(TypeError, match="nested alike"):
            map_state(torch.add, other, state)


class Counter:
    """A segment model that says how much it has read."""

    def initial_state(self, batch_size):
        return torch.zeros(batch_size, dtype=torch.int64)

    def __call__(self, tokens, state):
        read = state[:, None] + tokens.cumsum(dim=1)
        return read[..., None].expand(-1, -1, 2), read[:, -1]


@given(seed=seeds, size=st.integers(1, 20), length=st.integers(1, 9), border=st.integers(0, 20))
def test_run_segments_carries_the_state(seed, size, length, border):
    torch.manual_seed(seed)
    tokens = torch.randint(5, (2, size))
    scores, state = run_segments(Counter(), tokens, length)
    assert torch.equal(scores[..., 0], tokens.cumsum(dim=1))
    assert torch.equal(state, tokens.sum(dim=1))
    start = torch.tensor([100, 200])
    assert torch.equal(
        run_segments(Counter(), tokens, length, start)[1], start + tokens.sum(dim=1)
    )


class LSTM(torch.nn.LSTM):
    """A segment model whose state moves with every token, and that uses nothing else."""

    def initial_state(self, batch_size):
        zeros = torch.zeros(1, batch_size, self.hidden_size, dtype=torch.float64)
        return zeros, zeros

    def forward(self, tokens, state):
        vectors = torch.nn.functional.one_hot(tokens, self.input_size).double()
        return super().forward(vectors, state)


@given(seed=seeds, size=st.integers(1, 20), length=st.integers(1, 21))
def test_an_lstm_does_not_notice_the_cut(seed, size, length):
    torch.manual_seed(seed)
    lstm = LSTM(5, 4, batch_first=True).double()
    tokens = torch.randint(5, (2, size))
    whole, _ = lstm(tokens, lstm.initial_state(2))
    pieces, _ = run_segments(lstm, tokens, length)
    torch.testing.assert_close(pieces, whole)


@given(seed=seeds, batch=st.integers(1, 4), masked=st.booleans(), carried=st.booleans())
def test_begin_segment_starts_afresh_where_a_document_begins(seed, batch, masked, carried):
    torch.manual_seed(seed)
    model = Counter()
    tokens = torch.randint(9, (batch, 3))
    reset, mask = torch.rand(batch) < 0.5, torch.rand(batch, 3) < 0.5 if masked else None
    state = 1 + torch.randint(9, (batch,)) if carried else None
    arguments = begin_segment(model, Segment(tokens, tokens, mask, reset), state)
    expected = [0 if state is None or reset[b] else int(state[b]) for b in range(batch)]
    assert len(arguments) == 2 + masked  # a model without padding need not take a mask
    assert arguments[0] is tokens
    assert arguments[1].tolist() == expected
    assert not masked or arguments[2] is mask


def test_begin_segment_without_flags_goes_on():
    tokens, state = torch.ones(2, 3, dtype=torch.int64), torch.tensor([4, 5])
    assert begin_segment(Counter(), Segment(tokens, tokens, None, None), state)[1] is state
    fresh = begin_segment(Counter(), Segment(tokens, tokens, None, None), None)[1]
    assert fresh.tolist() == [0, 0]


def test_begin_segment_knows_nested_states_and_keeps_their_gradients():
    class Nested:
        def __init__(self):
            self.start = torch.randn(3, requires_grad=True)

        def initial_state(self, batch_size):
            return {
                "memory": self.start.expand(batch_size, 3),
                "seen": [torch.zeros(batch_size)],
            }

    model = Nested()
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    old = {"memory": torch.ones(2, 3, requires_grad=True), "seen": [torch.ones(2)]}
    reset = torch.tensor([True, False])
    state = begin_segment(model, Segment(tokens, tokens, None, reset), old)[1]
    assert state["seen"][0].tolist() == [0.0, 1.0]
    state["memory"].sum().backward()
    assert model.start.grad.tolist() == [1.0] * 3
    assert old["memory"].grad.tolist() == [[0.0] * 3, [1.0] * 3]


# --- documents ------------------------------------------------------------------------------


@given(
    lists=documents,
    batch=st.integers(1, 4),
    length=st.integers(1, 6),
    order=st.none() | st.integers(0, 999),
)
def test_every_document_is_read_once_in_order_and_predicted_whole(lists, batch, length, order):
    streams = DocumentStreams(corpus_of(lists), batch, length, order)
    lanes = defaultdict(list)  # per lane, the documents seen: [(read, targets), …]
    steps = 0
    for segment in streams:
        steps += 1
        assert segment.tokens.shape == segment.targets.shape == (batch, length)
        assert segment.tokens.dtype == segment.targets.dtype == torch.int64
        assert segment.mask.dtype == segment.reset.dtype == torch.bool
        for lane in range(batch):
            real = segment.mask[lane]
            assert torch.equal(real, real.sort(descending=True).values)  # padding to the right
            assert (segment.targets[lane][~real] == IGNORE).all()
            if segment.reset[lane]:
                assert real.any()
                lanes[lane].append(([], []))
            if real.any():
                lanes[lane][-1][0].extend(segment.tokens[lane][real].tolist())
                lanes[lane][-1][1].extend(segment.targets[lane][real].tolist())
    assert steps == len(streams)
    read = [document for lane in lanes.values() for document in lane]
    assert all(tokens == [10, *targets[:-1]] for tokens, targets in read)
    assert sorted(targets for _, targets in read) == sorted(ids for ids in lists if ids)


@given(lists=documents, batch=st.integers(1, 4), length=st.integers(1, 6))
def test_lanes_are_as_even_as_their_longest_document_allows(lists, batch, length):
    streams = DocumentStreams(corpus_of(lists), batch, length)
    loads = [sum(-(-len(d) // length) for d in lane) for lane in streams.lanes]
    longest = max(-(-len(ids) // length) for ids in lists)
    assert max(loads) - min(loads) <= longest
    assert len(streams) == max(loads)


def test_lanes_are_even_in_segments_and_not_in_documents():
    corpus = corpus_of([[0] * 20, *([1] * 2 for _ in range(5))])
    assert len(DocumentStreams(corpus, 2, 2)) == 10  # 10 beside 1 + 1 + 1 + 1 + 1


@given(lists=documents, more=st.integers(1, 4), length=st.integers(1, 6))
def test_lanes_without_a_document_are_padding_throughout(lists, more, length):
    full = sum(bool(ids) for ids in lists)
    streams = DocumentStreams(corpus_of(lists), full + more, length)
    assert len(streams) == max(-(-len(ids) // length) for ids in lists)
    mask, reset = (
        torch.stack(field) for field in zip(*((s.mask, s.reset) for s in streams), strict=True)
    )
    reads = mask.any(dim=0).any(dim=-1)
    assert int(reads.sum()) == full
    assert torch.equal(reset.any(dim=0), reads)
    assert int(mask.sum()) == sum(map(len, lists))


@given(lists=documents, order=st.integers(0, 999))
def test_the_order_is_reproducible_and_a_pass_can_be_repeated(lists, order):
    first, again = (DocumentStreams(corpus_of(lists), 2, 3, order) for _ in range(2))
    for one, other, repeat in zip(first, again, first, strict=True):
        for a, b, c in zip(one, other, repeat, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_another_order_is_another_order():
    corpus = corpus_of([[i] for i in range(10)])
    read = {
        tuple(int(s.targets[0, 0]) for s in DocumentStreams(corpus, 1, 1, order))
        for order in range(5)
    }
    assert len(read) > 1
    as_given = [int(s.targets[0, 0]) for s in DocumentStreams(corpus, 1, 1)]
    assert as_given == list(range(10))


# --- long documents, split ------------------------------------------------------------------


def read_in(streams):
    """Per lane: pieces as lists of targets, each begun by a reset."""
    lanes = [[] for _ in streams.lanes]
    for segment in streams:
        for lane, pieces in enumerate(lanes):
            real = segment.mask[lane]
            if segment.reset[lane]:
                assert int(segment.tokens[lane, 0]) == streams.start
                pieces.append([])
            if real.any():
                pieces[-1] += segment.targets[lane][real].tolist()
    return lanes


@given(
    lists=documents,
    batch=st.integers(1, 6),
    length=st.integers(1, 4),
    order=st.none() | st.integers(0, 999),
)
def test_split_documents_leave_no_lane_empty_and_lose_no_token(lists, batch, length, order):
    """Every piece of a document starts afresh, and together they are the document."""
    marked = [[100 * i + j for j in range(len(ids))] for i, ids in enumerate(lists)]
    total = sum(count_segments(len(ids), length) for ids in lists)
    streams = DocumentStreams(
        corpus_of(marked, start=9999), batch, length, order, split_long=True
    )
    lanes = read_in(streams)
    assert sum(bool(lane) for lane in lanes) == min(batch, total)
    pieces = sorted(piece for lane in lanes for piece in lane)
    assert [t for piece in pieces for t in piece] == [t for ids in marked for t in ids]
    share = max(1, total // batch)
    for piece in pieces:
        assert piece == list(range(piece[0], piece[0] + len(piece)))  # no gap, one document
        assert piece[0] % 100 % (share * length) == 0
        assert len(piece) <= share * length
    loads = [sum(count_segments(len(p), length) for p in lane) for lane in lanes]
    assert sum(loads) == total  # cutting at borders of segments adds no padding
    assert max(loads) - min(loads) <= share
    assert len(streams) == max(loads)


@given(lists=documents, batch=st.integers(1, 4), length=st.integers(1, 4))
def test_documents_that_are_short_enough_are_never_split(lists, batch, length):
    longest = max(count_segments(len(ids), length) for ids in lists)
    total = sum(count_segments(len(ids), length) for ids in lists)
    whole, split = (
        DocumentStreams(corpus_of(lists), batch, length, split_long=flag)
        for flag in (False, True)
    )
    if longest <= max(1, total // batch):
        for one, other in zip(whole.lanes, split.lanes, strict=True):
            assert [d.tolist() for d in one] == [d.tolist() for d in other]


def test_six_books_fill_thirty_two_lanes():
    """The case that was met: 26 of 32 lanes were padding, and nobody said so."""
    books = [[7] * 640 for _ in range(6)]
    empty = {
        flag: sum(
            not lane
            for lane in DocumentStreams(corpus_of(books), 32, 10, split_long=flag).lanes
        )
        for flag in (False, True)
    }
    assert empty == {False: 26, True: 0}


@given(lists=documents, most=st.integers(1, 20))
def test_cut_documents_are_the_documents(lists, most):
    rows = [torch.tensor(ids, dtype=torch.uint8) for ids in lists]
    pieces = cut_documents(rows, most)
    assert torch.equal(torch.cat(pieces), torch.cat(rows))
    assert all(len(piece) <= most for piece in pieces)
    assert all(piece.dtype == torch.uint8 for piece in pieces)
    assert len(pieces) == sum(max(1, -(-len(ids) // most)) for ids in lists)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-3, 2)])
@pytest.mark.parametrize("split_long", [True, False])
def test_streams_of_no_lanes_or_no_tokens_are_refused(sizes, split_long):
    with pytest.raises(ValueError, match="at least 1"):
        DocumentStreams(corpus_of([[1]]), *sizes, split_long=split_long)
