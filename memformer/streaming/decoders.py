"""Reading token by token: decoders that keep what a segment's next token needs, and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memformer.cache import KeyValueCache
from memformer.checks import check_memory, check_state, check_tokens
from memformer.layers import SegmentCache
from memformer.model import (
    Memformer,
    MemformerLM,
    MemformerState,
    MemoryStack,
    carry,
    unpadded,
)
from memformer.modes import evaluating
from memformer.segments import State, map_state, reset_state
from memformer.streaming.reading import segment_length


class OpenSegment:
    """The tokens of `B` streams since the last border, and where in them each row began."""

    def __init__(self, batch_size: int, length: int, device: torch.device | None) -> None:
        self.tokens = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        self.first = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.length, self.filled = length, 0
        self.late = False  # whether some row began inside this segment

    def cut(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens `(B, n)` in pieces that end at the next border, the one after, and so on."""
        room = self.length - self.filled
        if tokens.shape[1] <= room:
            return (tokens,)
        return (tokens[:, :room], *torch.split(tokens[:, room:], self.length, dim=1))

    def append(self, piece: Tensor) -> int:
        """Add tokens `(B, n)` for which there is room; returns the place of the first."""
        begin, self.filled = self.filled, self.filled + piece.shape[1]
        self.tokens[:, begin : self.filled] = piece
        return begin

    def restart(self, rows: Tensor) -> None:
        """Rows `(B,)` that are True begin with the next token."""
        self.first = torch.where(rows, self.filled, self.first)
        self.late = bool(self.first.any())

    def clear(self) -> None:
        """A border: all rows begin at place 0."""
        self.filled, self.late = 0, False
        self.first.zero_()

    @property
    def real(self) -> Tensor | None:
        """`(B, filled)`, where a token belongs to what the row reads now; None: everywhere."""
        place = torch.arange(self.filled, device=self.first.device)
        return place >= self.first[:, None] if self.late else None


class IncrementalDecoder(ABC):
    """Reads `B` streams in phase, any number of tokens at a time, without gradients.

    The model is in eval mode while it reads. `scores` and `state` are of the last token and of
    the last border. A model that gets other weights needs a new decoder.
    """

    def __init__(self, model: Any, batch_size: int, state: State, length: int) -> None:
        self.modules = list(model.modules()) if isinstance(model, nn.Module) else []
        weights = model.parameters() if isinstance(model, nn.Module) else ()
        device = next((weight.device for weight in weights), None)
        self.model = model
        self.state = state  # the model's, at the last border
        self.segment = OpenSegment(batch_size, length, device)  # what was read since
        self.scores: Tensor | None = None  # (B, V), for the token after the last

    @abstractmethod
    def read(self, piece: Tensor, begin: int) -> Tensor:
        """Scores `(B, n, V)` of a piece that was just appended at place `begin`."""

    @abstractmethod
    def next_state(self) -> State:
        """The state after the tokens of the segment."""

    def feed(self, tokens: Tensor) -> Tensor:
        """`(B, n)` tokens → next-token scores `(B, n, V)`, across any number of borders.

        Raises as `check_tokens` does, and `ValueError` for another number of streams.
        """
        self.check(tokens)
        return self.go_on(tokens)

    def check(self, tokens: Tensor) -> None:
        """What `feed` raises."""
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", 2**63)
        room = tokens.numel() if isinstance(tokens, Tensor) else 0
        check_tokens(tokens, vocab_size, room)
        streams, device = len(self.segment.first), self.segment.first.device
        if len(tokens) != streams:
            raise ValueError(
                f"tokens have {len(tokens)} rows; {streams} are expected, one a stream"
            )
        if tokens.device != device:
            raise RuntimeError(
                f"tokens are on {tokens.device}, the model on {device}; move them with .to()"
            )

    def go_on(self, tokens: Tensor) -> Tensor:
        """`feed` for tokens that need no check, as those drawn from the scores."""
        parts = []
        with evaluating(self.modules):
            for piece in self.segment.cut(tokens):
                parts.append(self.read(piece, self.segment.append(piece)))
                if self.segment.filled == self.segment.length:
                    self.end_segment()
        last = parts[-1]
        # A view would hold the scores of all tokens.
        self.scores = last[:, -1] if last.shape[1] == 1 else last[:, -1].clone()
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def end_segment(self) -> State:
        """End the segment here, however short it is, and return the state."""
        if self.segment.filled:
            with evaluating(self.modules):
                new = self.next_state()
            some = self.segment.first < self.segment.filled  # the others have read nothing
            self.state = reset_state(self.state, new, some) if self.segment.late else new
            self.segment.clear()
        return self.state

    def reset(self, rows: Tensor) -> None:
        """Streams where `rows (B,)` is True start afresh with the next token."""
        with torch.no_grad():
            fresh = self.model.initial_state(len(self.segment.first))
            self.state = reset_state(self.state, fresh, rows)
        self.segment.restart(rows)


class RecomputingDecoder(IncrementalDecoder):
    """For any segment model: the segment is read again for every piece."""

    def read(self, piece: Tensor, begin: int) -> Tensor:
        """Scores `(B, n, V)` of a piece that was just appended at place `begin`."""
        tokens = self.segment.tokens[:, : self.segment.filled]
        if not self.segment.late:
            scores: Tensor
            scores, self.after = self.model(tokens, self.state)
            return scores[:, begin:]
        # Rows that began together are read together; not every model takes a mask.
        groups, parts, states = [], [], []
        for first in torch.unique(self.segment.first).tolist():
            rows = (self.segment.first == first).nonzero().flatten()
            state = map_state(partial(torch.index_select, dim=0, index=rows), self.state)
            scores, after = self.model(tokens[rows, first:], state)
            groups.append(rows)
            parts.append(scores[:, begin - first :])
            states.append(after)
        back = torch.cat(groups).argsort()
        self.after = map_state(lambda *rows: torch.cat(rows)[back], *states)
        return torch.cat(parts)[back]

    def next_state(self) -> State:
        """The state after the tokens of the segment."""
        return self.after


class CachedDecoder(IncrementalDecoder):
    """Only new tokens pass through the layers; what they need of earlier ones is cached.

    The layers are those of the model: their `forward` takes the cache.
    """

    cache: SegmentCache
    looked: State = None  # the state that the cache belongs to

    @abstractmethod
    def look(self) -> None:
        """Check the state, and take from it what the layers look at in this segment."""

    @abstractmethod
    def hidden(self, piece: Tensor) -> Tensor:
        """Tokens `(B, n)` → hidden `(B, n, D)`, with the cache."""

    def read(self, piece: Tensor, begin: int) -> Tensor:
        """Scores `(B, n, V)` of a piece that was just appended at place `begin`."""
        if begin == 0:
            self.cache.clear()
        if self.looked is not self.state:  # after a border, or a reset
            self.cache.look_again()
            self.look()
            self.looked = self.state
        scores: Tensor = self.model.output(self.hidden(piece))
        return scores


class CachedLM(CachedDecoder):
    """`MemformerLM`; holds the hidden vectors of the segment for the writer."""

    def __init__(self, model: MemformerLM, batch_size: int, state: Tensor, length: int) -> None:
        super().__init__(model, batch_size, state, length)
        config, weight = model.config, model.output.weight
        self.cache = SegmentCache(config.decoder_layers, length, config.num_slots)
        self.written = weight.new_zeros(batch_size, length, config.dim)
        self.look()

    def look(self) -> None:
        """The layers look at the memory, which is the state."""
        streams, weight = len(self.segment.first), self.model.output.weight
        check_memory(self.state, streams, self.model.config.num_slots, weight)

    def hidden(self, piece: Tensor) -> Tensor:
        """Tokens `(B, n)` → hidden `(B, n, D)`, with the cache."""
        hidden: Tensor = self.model.stack.read(piece, self.state, self.segment.real, self.cache)
        filled = self.segment.filled
        self.written[:, filled - piece.shape[1] : filled] = hidden
        return hidden

    def next_state(self) -> Tensor:
        """The memory after the tokens of the segment."""
        hidden, real = self.written[:, : self.segment.filled], self.segment.real
        memory: Tensor = self.model.stack.write(self.state, hidden, real)
        return memory


class CachedMemformer(CachedDecoder):
    """`Memformer`; the encoder runs once a segment, on the one before."""

    def __init__(
        self, model: Memformer, batch_size: int, state: MemformerState, length: int
    ) -> None:
        super().__init__(model, batch_size, state, length)
        config, weight = model.config, model.output.weight
        check_state(state, batch_size)
        check_memory(state.memory, batch_size, config.num_slots, weight)
        self.cache = SegmentCache(config.decoder_layers, length, config.segment_length)

    def look(self) -> None:
        """The layers look at the encoded segment before; the memory it leaves is kept."""
        tokens, self.mask = unpadded(self.state)
        self.encoded, self.memory = self.model.encoder(tokens, self.state.memory, self.mask)

    def hidden(self, piece: Tensor) -> Tensor:
        """Tokens `(B, n)` → hidden `(B, n, D)`, with the cache."""
        embedded, real = self.model.encoder.embed(piece), self.segment.real
        hidden: Tensor = self.model.decoder(embedded, self.encoded, real, self.mask, self.cache)
        return hidden

    def next_state(self) -> MemformerState:
        """The new memory, and the tokens of the segment, each row from where it began."""
        filled, first = self.segment.filled, self.segment.first[:, None]
        place = torch.arange(filled, device=first.device)
        mask = place < filled - first
        tokens = self.segment.tokens.gather(1, (place + first).clamp(max=filled - 1)) * mask
        return carry(self.memory, tokens, mask, self.model.config.segment_length)


def incremental(
    model: Any,
    batch_size: int = 1,
    state: State | None = None,
    *,
    length: int | None = None,
    cache: bool = True,
) -> IncrementalDecoder:
    """A decoder that reads `batch_size` streams from `state` on; None: from the beginning.

    `MemformerLM` and `Memformer` get one with a key–value cache, unless `cache` is False; any
    other segment model gets one that reads its segment again for every token.

    Raises `ValueError` for a batch size below 1, `TypeError` for a model that gives no
    next-token scores, and as `segment_length`, `check_memory` and `check_state` do.
    """
    model = getattr(model, "_orig_mod", model)  # compiled for whole segments, not for tokens
    if isinstance(model, MemoryStack):
        raise TypeError(f"{type(model).__name__} gives no next-token scores; read with stream")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    size = segment_length(model, length)
    with torch.no_grad():
        state = model.initial_state(batch_size) if state is None else state
    kind: type[IncrementalDecoder] = RecomputingDecoder
    if cache and isinstance(model, MemformerLM):
        kind = CachedLM
    elif cache and isinstance(model, Memformer):
        kind = CachedMemformer
    return kind(model, batch_size, state, size)


def count_bytes(*things: object) -> int:
    """Bytes of the tensors in these things: in tuples, lists, decoders, caches, not in modules."""
    storages: dict[int, int] = {}
    todo = list(things)
    while todo:
        thing = todo.pop()
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, (list, tuple)):
            todo.extend(thing)
        elif isinstance(thing, (IncrementalDecoder, OpenSegment, SegmentCache, KeyValueCache)):
            todo.extend(vars(thing).values())
    return sum(storages.values())
