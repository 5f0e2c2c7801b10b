"""Reading for ever: streams cut as they come, and read a segment at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memformer.modes import evaluating
from memformer.segments import Segment, SegmentModel, State, begin_segment


def cut_stream(chunks: Iterable[Tensor | Segment], length: int) -> Iterator[Tensor | Segment]:
    """Chunks `(B, any)` become pieces `(B, length)`, the last perhaps shorter.

    A `Segment` passes as it is, after what was waiting. Holds a segment at most, and the chunk
    at hand. Raises `TypeError` for a chunk that is neither, and `ValueError` for one that is
    not `(batch, time)` with one batch size.
    """
    waiting: Tensor | None = None
    for chunk in chunks:
        tokens = chunk.tokens if isinstance(chunk, Segment) else chunk
        check_chunk(tokens, waiting)
        waiting = tokens[:, :0] if waiting is None else waiting
        if isinstance(chunk, Segment):
            if waiting.shape[1]:
                yield waiting
            waiting = waiting[:, :0]
            yield chunk
            continue
        while tokens.shape[1]:
            room = length - waiting.shape[1]
            waiting = torch.cat((waiting, tokens[:, :room]), dim=1)  # a copy
            tokens = tokens[:, room:]
            if waiting.shape[1] == length:
                yield waiting
                waiting = waiting[:, :0]
        del chunk, tokens  # not to be held while the next one is made
    if waiting is not None and waiting.shape[1]:
        yield waiting


def check_chunk(tokens: object, waiting: Tensor | None) -> None:
    """`TypeError` for no tensor; `ValueError` for another rank, or batch than is waiting."""
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"a chunk is of type {type(tokens).__name__}; a tensor (batch, time) of int64 or a "
            "Segment is expected. Give stream one tensor, or an iterable of them"
        )
    if tokens.ndim != 2 or (waiting is not None and len(tokens) != len(waiting)):
        raise ValueError(
            f"a chunk has shape {tuple(tokens.shape)}; (batch, time) is expected, with the "
            "same batch all along"
        )


def segment_length(model: Any, length: int | None = None) -> int:
    """`length`, or else the model's own; `ValueError` unless the model takes it."""
    most = getattr(getattr(model, "config", None), "segment_length", None)
    chosen = most if length is None else length
    if chosen is None:
        raise ValueError("the model has no config that says how long a segment is; give length")
    if chosen < 1 or (most is not None and chosen > most):
        allowed = "at least 1" if most is None else f"in 1…{most}, as the model is configured"
        raise ValueError(f"length is {chosen}; it must be {allowed}")
    return int(chosen)


class Reading(NamedTuple):
    """One segment of a stream, after it was read."""

    tokens: Tensor  # (B, L) int64
    scores: Tensor  # (B, L, V), for the token after each
    state: State  # after the segment


def stream(
    model: SegmentModel,
    tokens: Tensor | Segment | Iterable[Tensor | Segment],
    state: State | None = None,
    *,
    length: int | None = None,
) -> Iterator[Reading]:
    """Read any number of tokens in constant memory; yields a `Reading` a segment.

    `tokens` is `(B, N)`, or an iterable, endless too, of chunks `(B, any)` that are cut again
    to `length` (None: the model's own), or of `Segment`s, which are read as they stand: padding
    is masked, `reset` rows start afresh. `state` is where to go on. In eval mode, without
    gradients.

    Raises `ValueError` for another rank, no tokens, and a `length` out of range: at the call.
    While reading, it raises as `cut_stream` and the model do.
    """
    if isinstance(tokens, Tensor) and (tokens.ndim != 2 or 0 in tokens.shape):
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; (batch, time), neither 0, is expected"
        )
    chunks = [tokens] if isinstance(tokens, (Tensor, Segment)) else tokens
    return read_pieces(model, cut_stream(chunks, segment_length(model, length)), state)


def read_pieces(
    model: Any, pieces: Iterable[Tensor | Segment], state: State | None
) -> Iterator[Reading]:
    """Read pieces that are no longer than a segment, one when it is asked for."""
    for piece in pieces:
        if isinstance(piece, Segment):  # without a mask the attention is faster
            segment = piece._replace(mask=None) if bool(piece.mask.all()) else piece  # type: ignore[arg-type]
        else:
            segment = Segment(piece, None, None, None)  # type: ignore[arg-type]
        with evaluating(model):
            scores, state = model(*begin_segment(model, segment, state))
        yield Reading(segment.tokens, scores, state)
