"""The whole model: an encoder–decoder as published, a decoder-only language model, and an encoder for long documents."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_memory, check_state, check_tokens
from .config import MemformerConfig
from .forgetting import BiasedMemoryNorm
from .hub import Pretrained, portable
from .layers import SegmentCache, SegmentLayers
from .segments import State, reset_state
from .writer import MemoryWriter


def writer_for(config: MemformerConfig) -> MemoryWriter:
    """The writer that a config asks for."""
    return MemoryWriter(
        config.dim,
        config.writer_heads,
        config.temperature,
        self_weight=config.self_weight,
        length=config.segment_length,
        normalise=config.normalise,
    )


class MemoryStack(nn.Module):
    """Embedding, layers that read the memory, one writer after the last, and forgetting."""

    def __init__(self, config: MemformerConfig, num_layers: int, *, causal: bool) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.embed = nn.Embedding(config.vocab_size, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)  # length about 1, like a slot
        self.layers = SegmentLayers(config, num_layers, "memory", causal=causal)
        self.writer = writer_for(config)
        self.forget = BiasedMemoryNorm(config.num_slots, dim, strength=config.forget_strength)

    def initial_state(self, batch_size: int) -> Tensor:
        """The memory before anything was read, `(B, K, D)`, differentiable in `forget.bias`.

        So it belongs to a graph: `copy.deepcopy` takes only what `detach_state` makes of it.
        """
        return self.forget.initial(batch_size)

    def read(
        self,
        tokens: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        cache: SegmentCache | None = None,
    ) -> Tensor:
        """`tokens (B, L)`, `memory (B, K, D)` → hidden `(B, L, D)`: nothing is written."""
        return self.layers(self.embed(tokens), memory, mask, cache=cache)  # type: ignore[no-any-return]

    def write(self, memory: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """`memory (B, K, D)`, `hidden (B, L, D)` → the next memory.

        A stream that is all padding keeps its memory.
        """
        new: Tensor = self.forget(self.writer(memory, hidden, mask))
        return new if mask is None else reset_state(memory, new, mask.any(dim=1))

    def forward(
        self, tokens: Tensor, memory: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`tokens (B, L)`, `memory (B, K, D)` → hidden `(B, L, D)`, memory `(B, K, D)`.

        `mask (B, L)` is True where real.
        """
        check_tokens(tokens, self.config.vocab_size, self.config.segment_length, mask)
        check_memory(memory, tokens.shape[0], self.config.num_slots, self.embed.weight)
        hidden = self.read(tokens, memory, mask)
        return hidden, self.write(memory, hidden, mask)


class MemformerEncoder(MemoryStack, Pretrained, library_name="memformer"):
    """Encoder only, bidirectional in a segment: hidden `(B, L, D)` and memory `(B, K, D)`."""

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__(config, config.encoder_layers, causal=False)


class MemformerLM(nn.Module, Pretrained, library_name="memformer"):
    """Decoder only: `decoder_layers` causal layers that read memory, one writer at the end."""

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__()
        self.config = config
        self.stack = MemoryStack(config, config.decoder_layers, causal=True)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def initial_state(self, batch_size: int) -> Tensor:
        """The memory of `B` streams that have read nothing, `(B, K, D)`."""
        return self.stack.initial_state(batch_size)

    def forward(
        self, tokens: Tensor, state: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`tokens (B, L)`, memory `(B, K, D)` → next-token scores `(B, L, V)`, next memory.

        `mask (B, L)` is True where real. Raises what `check_tokens` and `check_memory` raise.
        """
        hidden, memory = self.stack(tokens, state, mask)
        return self.output(hidden), memory

    def advance(self, tokens: Tensor, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """Only the next memory, without scores."""
        memory: Tensor = self.stack(tokens, state, mask)[1]
        return memory


@portable
class MemformerState(NamedTuple):
    """What the encoder–decoder carries: the memory, and the segment it encodes next."""

    memory: Tensor  # (B, K, D)
    tokens: Tensor  # (B, segment_length) int64, padded
    mask: Tensor  # (B, segment_length) bool, True where real


def memory_of(state: State) -> Tensor:
    """The memory inside a state: the state itself, or its `memory` field."""
    memory: Tensor = state if isinstance(state, Tensor) else state.memory
    return memory


def carry(memory: Tensor, tokens: Tensor, mask: Tensor | None, length: int) -> MemformerState:
    """A state with `tokens (B, ≤ length)` padded to `length`; without `mask` all are real."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    room = (0, length - tokens.shape[1])
    return MemformerState(memory, F.pad(tokens, room), F.pad(real, room))


def unpadded(state: MemformerState) -> tuple[Tensor, Tensor | None]:
    """The state's tokens and mask up to the last real one; no mask where all are real.

    On the CPU only: elsewhere looking at the mask would make the device wait.
    """
    tokens, mask = state.tokens, state.mask
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return tokens, mask
    size = max([1, *(mask.any(dim=0).nonzero().flatten() + 1).tolist()])
    return tokens[:, :size], None if mask[:, :size].all() else mask[:, :size]


class Memformer(nn.Module, Pretrained, library_name="memformer"):
    """The published encoder–decoder: call t encodes segment t − 1 and predicts segment t."""

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = MemformerEncoder(config)
        self.decoder = SegmentLayers(config, config.decoder_layers, "encoder", causal=True)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def initial_state(self, batch_size: int) -> MemformerState:
        """The state of `B` streams of which nothing was read: `start` is to be encoded."""
        memory = self.encoder.initial_state(batch_size)
        start = torch.full((batch_size, 1), self.config.start, device=memory.device)
        return carry(memory, start, None, self.config.segment_length)

    def forward(
        self, tokens: Tensor, state: MemformerState, mask: Tensor | None = None
    ) -> tuple[Tensor, MemformerState]:
        """`tokens (B, L)` → next-token scores `(B, L, V)` and the next state."""
        hidden, real, new = self.encode(tokens, state, mask)
        decoded = self.decoder(self.encoder.embed(tokens), hidden, mask, real)
        return self.output(decoded), new

    def advance(
        self, tokens: Tensor, state: MemformerState, mask: Tensor | None = None
    ) -> MemformerState:
        """Only the next state, without decoder and scores."""
        return self.encode(tokens, state, mask)[2]

    def encode(
        self, tokens: Tensor, state: MemformerState, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, MemformerState]:
        """Hidden `(B, N, D)` of the state's segment, its mask `(B, N)`, and the next state."""
        length = self.config.segment_length
        check_tokens(tokens, self.config.vocab_size, length, mask)
        check_state(state)
        seen, real = unpadded(state)
        hidden, memory = self.encoder(seen, state.memory, real)
        new = carry(memory, tokens, mask, length)
        return hidden, real, new if mask is None else reset_state(state, new, mask.any(dim=1))
