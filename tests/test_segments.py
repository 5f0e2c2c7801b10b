"""Streams, states and corpora: nothing lost, nothing doubled, nothing shifted."""

from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from memformer.segments import (
    IGNORE,
    Corpus,
    DocumentStreams,
    _articles,
    detach_state,
    load_corpus,
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


def corpus_of(lists, start=10):
    ids = tuple(torch.tensor(ids, dtype=torch.int64) for ids in lists)
    return Corpus("made up", "train", ids, start)


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


def test_map_state_refuses_what_is_not_a_state():
    with pytest.raises(TypeError, match="list"):
        map_state(torch.neg, (torch.zeros(1), [torch.zeros(1)]))


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
        kind = ValueError if isinstance(other, tuple) and len(other[1]) == 4 else TypeError
        with pytest.raises(kind):
            reset_state(state, other, reset)
        with pytest.raises(kind):
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


# --- corpora --------------------------------------------------------------------------------


def test_the_digest_names_ids_and_borders():
    one, same = corpus_of([[1, 2], [3]]), corpus_of([[1, 2], [3]])
    assert one.sha256() == same.sha256()
    digests = {
        corpus_of(lists).sha256()
        for lists in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]], [[1, 2], [4]])
    }
    assert len(digests) == 5
    small, large = (torch.tensor([1, 2, 250], dtype=t) for t in (torch.uint8, torch.int64))
    assert Corpus("a", "b", (small,), 256).sha256() == Corpus("c", "d", (large,), 300).sha256()
    ids = {Corpus("a", "b", (torch.tensor([i]),), 10**6).sha256() for i in (1, 257, 65537)}
    assert len(ids) == 3  # no id is cut to its last byte or two


def test_digits_are_the_scans_of_scikit_learn():
    train, test = load_corpus("digits"), load_corpus("digits", "test")
    assert len(train.documents) + len(test.documents) == 1797
    pixels = torch.from_numpy(load_digits().data).long()
    assert train.vocab_size == test.vocab_size == 18
    held_out = list(test.documents)
    everything = [
        held_out.pop(0) if i % 5 == 4 else document
        for i, document in enumerate(_merge(train.documents, 1797))
    ]
    assert torch.equal(torch.stack(everything).long(), pixels)
    assert train.num_tokens == 64 * len(train.documents)


def _merge(training, total):
    """The training documents at their places, None where a held-out one belongs."""
    rest = iter(training)
    return [None if i % 5 == 4 else next(rest) for i in range(total)]


def test_the_python_reference_is_text_and_its_splits_share_no_paragraph():
    train, test = load_corpus("python-reference"), load_corpus("python-reference", "test")
    assert train.vocab_size == 257
    assert all(int(d.max()) < train.start for d in (*train.documents, *test.documents))
    texts = [[bytes(d.tolist()).decode() for d in c.documents] for c in (train, test)]
    assert any("keyword" in text for text in texts[0])
    seen, held_out = (
        {" ".join(p.split()) for text in split for p in text.split("\n\n") if len(p) >= 40}
        for split in texts
    )
    assert len(held_out) > 10
    assert not seen & held_out


@pytest.mark.parametrize("name", ["digits", "python-reference"])
@given(limit=st.integers(1, 12))
def test_limit_keeps_the_first_documents(name, limit):
    some, every = load_corpus(name, limit=limit), load_corpus(name)
    assert len(some.documents) == limit
    pairs = zip(some.documents, every.documents, strict=False)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert some.start == every.start


def test_a_corpus_is_the_same_each_time():
    for name in ("digits", "python-reference"):
        assert load_corpus(name).sha256() == load_corpus(name).sha256()
        assert load_corpus(name).sha256() != load_corpus(name, "test").sha256()


@given(ids=st.sets(st.integers(0, 2**20), min_size=2, max_size=6), low=st.integers(0, 65535))
def test_no_two_ids_share_a_digest(ids, low):
    ids |= {low, low + 65536}  # alike in their last two bytes
    digests = {Corpus("a", "b", (torch.tensor([i]),), 2**21).sha256() for i in ids}
    assert len(digests) == len(ids)


def test_no_two_topics_of_the_python_reference_share_a_paragraph():
    splits = [load_corpus("python-reference", split) for split in ("train", "test")]
    counts = defaultdict(int)
    for document in (d for corpus in splits for d in corpus.documents):
        text = bytes(document.tolist()).decode()
        for paragraph in {" ".join(p.split()) for p in text.split("\n\n") if len(p) >= 40}:
            counts[paragraph] += 1
    assert len(counts) > 100
    assert set(counts.values()) == {1}


ONE = [" = One = \n", "", " some text \n", "", " = = Part = = \n", "", " more \n"]
TWO = [" = Two = \n", "", " a sum \n", " = 1 + 1 \n", ""]


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_articles_begin_at_a_title_between_empty_lines(blank):
    lines = [""] * blank + ONE + [""] + TWO
    articles = [text for text in _articles(lines) if text.strip()]
    assert articles == ["".join(ONE), "".join(TWO)]


@pytest.mark.parametrize("before", ["", " text \n"])
@pytest.mark.parametrize("after", ["", " text \n"])
def test_a_formula_is_no_title(before, after):
    """A line that begins with the sign, and is not alone, belongs to the text."""
    lines = [*ONE, "", before, " = x + y \n", after]
    alone = not before and not after
    assert len([text for text in _articles(lines) if text.strip()]) == 1 + alone
    assert "".join(_articles(lines)) == "".join(lines)
