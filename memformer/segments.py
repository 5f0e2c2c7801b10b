"""Streams cut into segments, lanes of documents, and the state carried between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .checks import check_at_least_one


def split_segments(tokens: Tensor, length: int) -> tuple[Tensor, ...]:
    """Cut `(B, N)` tokens into consecutive `(B, length)` pieces; the last may be shorter.

    Raises `ValueError` for a rank other than 2, an empty stream or a length below 1.
    """
    check_at_least_one(length=length)
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; (batch, time) is expected")
    if tokens.shape[1] == 0:
        raise ValueError("the stream is empty; at least one token is needed")
    return torch.split(tokens, length, dim=1)


# A tensor, or tensors nested in tuples, lists and dicts; `()` for a model that carries nothing.
State = Any


class SegmentModel(Protocol):
    """What every model of the book offers: tokens and a state in, scores and a state out.

    `tokens` are `(B, L)` int64, scores `(B, L, V)`, and row b of a state belongs to stream b.
    """

    def initial_state(self, batch_size: int) -> State:
        """The state of `batch_size` streams of which nothing was read."""

    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Next-token scores `(B, L, V)`, and the state for the segment after this one."""

    def advance(self, tokens: Tensor, state: State) -> State:
        """The next state alone."""


def run_segments(
    model: SegmentModel, tokens: Tensor, length: int, state: State | None = None
) -> tuple[Tensor, State]:
    """Read `(B, N)` tokens in segments; returns all scores `(B, N, V)` and the last state.

    `state` is where to go on; None begins at `model.initial_state(B)`. Raises `ValueError` as
    `split_segments` does.
    """
    state = model.initial_state(tokens.shape[0]) if state is None else state
    scores = []
    for piece in split_segments(tokens, length):
        logits, state = model(piece, state)
        scores.append(logits)
    return torch.cat(scores, dim=1), state


def leaves_of(state: State) -> list[Tensor]:
    """The tensors of a nested state, in order; `TypeError` for anything else in it."""
    leaves = tree_flatten(state)[0]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"a state is made of tensors; it holds a {type(leaf).__name__}")
    return leaves


def map_state(fn: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply `fn` to every tensor of a nested state, together with its fellows in `others`.

    The nesting stays. Raises `TypeError` for what is no tensor, and where nestings differ.
    """
    nesting = tree_flatten(state)[1]
    for other in others:
        if tree_flatten(other)[1] != nesting:
            raise TypeError(
                f"states are nested alike; {nesting} meets {tree_flatten(other)[1]}"
            )
    rows = zip(*(leaves_of(part) for part in (state, *others)), strict=True)
    return tree_unflatten([fn(*row) for row in rows], nesting)


def detach_state(state: State) -> State:
    """The same state cut off from the graph that produced it."""
    return map_state(Tensor.detach, state)


def reset_state(state: State, fresh: State, reset: Tensor) -> State:
    """Rows of `fresh` where `reset (B,)` is True, rows of `state` elsewhere.

    Gradients flow to the rows that were taken. Raises `ValueError` unless every tensor of
    both states has the same shape, with B rows.
    """

    def choose(old: Tensor, new: Tensor) -> Tensor:
        if old.shape != new.shape or old.shape[:1] != reset.shape:
            raise ValueError(
                f"state is {tuple(old.shape)}, the fresh one {tuple(new.shape)} and reset "
                f"{tuple(reset.shape)}; states of one shape with a row per flag are expected"
            )
        return torch.where(reset.view(-1, *[1] * (old.ndim - 1)), new, old)

    return map_state(choose, state, fresh)


IGNORE = -100  # the target that torch.nn.functional.cross_entropy leaves out


class Segment(NamedTuple):
    """One timestep of `B` streams that run side by side."""

    tokens: Tensor  # (B, L) int64, what the model reads
    targets: Tensor  # (B, L) int64, what it should predict; IGNORE where nothing is asked
    mask: Tensor  # (B, L) bool, True where `tokens` is real and False where it is padding
    reset: Tensor  # (B,) bool, True where a new document begins, so the state starts afresh


def begin_segment(model: Any, segment: Any, state: State | None) -> tuple[Any, ...]:
    """The arguments of `model` for a `Segment`: `(tokens, state)`, or `(tokens, state, mask)`.

    Streams whose document begins here start afresh; a state of None starts all. A mask or a
    reset may be None where nothing is padded or begins.
    """
    tokens, _, mask, reset = segment
    if state is None:
        state = model.initial_state(tokens.shape[0])
    elif reset is not None:
        state = reset_state(state, model.initial_state(tokens.shape[0]), reset)
    return (tokens, state) if mask is None else (tokens, state, mask)


def count_segments(tokens: int, length: int) -> int:
    """How many segments of `length` hold so many `tokens`, the last perhaps padded."""
    return -(-tokens // length)


def segment_rows(
    documents: Sequence[Tensor], length: int, start: int
) -> Iterator[tuple[Tensor, ...]]:
    """One lane without end: the rows of a `Segment`, document after document, then padding.

    The model reads `start` and then the document one token late, so that every token of it
    is predicted, the first one too. A document without tokens is passed over.
    """
    for document in documents:
        for begin in range(0, len(document), length):
            piece = document[begin : begin + length]
            tokens, targets = torch.full((length,), start), torch.full((length,), IGNORE)
            targets[: len(piece)] = piece
            tokens[1 : len(piece)] = piece[:-1]
            if begin > 0:
                tokens[0] = document[begin - 1]
            yield tokens, targets, torch.arange(length) < len(piece), torch.tensor(begin == 0)
    padding = torch.full((length,), start), torch.full((length,), IGNORE)
    while True:
        yield *padding, torch.zeros(length, dtype=torch.bool), torch.tensor(False)


def cut_documents(documents: Sequence[Tensor], most: int) -> list[Tensor]:
    """Documents of at most `most` tokens: longer ones become several, each read afresh."""
    return [piece for document in documents for piece in torch.split(document, most)]


def deal_documents(
    documents: Sequence[Tensor], num_lanes: int, length: int
) -> list[list[Tensor]]:
    """Share whole documents evenly among lanes, counted in segments of `length`.

    The longest is dealt first, each to the lane with the least to read (Graham 1969). Within
    a lane documents stand in the order given.
    """
    sizes = [count_segments(len(document), length) for document in documents]
    load, lane_of = [0] * num_lanes, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lane_of[i] = load.index(min(load))
        load[lane_of[i]] += sizes[i]
    lanes: list[list[Tensor]] = [[] for _ in range(num_lanes)]
    for document, lane in zip(documents, lane_of, strict=True):
        lanes[lane].append(document)
    return lanes


class DocumentStreams:
    """`batch_size` lanes reading documents side by side, each one document after another.

    Iterating gives one pass of `Segment`s, in which every document is read once. No segment
    spans two documents: a document's last one is padded, and the lane's next has `reset` set.
    A lane that is done early is padding (mask False) to the end; with fewer documents than
    lanes, some are padding throughout, unless `split_long` cuts documents that are longer
    than a lane's fair share. `order` seeds the shuffle (None: as given).

    `corpus` has `documents`, rows of ids, and `start`, the id that opens each. Raises
    `ValueError` for a batch size or segment length below 1.
    """

    def __init__(
        self,
        corpus: Any,
        batch_size: int,
        segment_length: int,
        order: int | None = None,
        *,
        split_long: bool = False,
    ) -> None:
        check_at_least_one(batch_size=batch_size, segment_length=segment_length)
        self.segment_length, self.start = segment_length, corpus.start
        documents = list(corpus.documents)
        if split_long:
            total = sum(count_segments(len(d), segment_length) for d in documents)
            documents = cut_documents(documents, max(1, total // batch_size) * segment_length)
        if order is not None:
            shuffle = np.random.default_rng(order).permutation(len(documents))
            documents = [documents[i] for i in shuffle]
        self.lanes = deal_documents(documents, batch_size, segment_length)

    def __len__(self) -> int:
        """Segments in one pass: those of the longest lane."""
        length = self.segment_length
        return max(sum(count_segments(len(d), length) for d in lane) for lane in self.lanes)

    def __iter__(self) -> Iterator[Segment]:
        readers = [segment_rows(d, self.segment_length, self.start) for d in self.lanes]
        for _ in range(len(self)):
            rows = zip(*(next(reader) for reader in readers), strict=True)
            yield Segment(*(torch.stack(field) for field in rows))
