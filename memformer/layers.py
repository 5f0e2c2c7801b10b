"""One layer, and a stack of them with what it keeps of a segment while it reads token by token."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MultiHeadAttention
from .cache import KeyValueCache
from .config import MemformerConfig
from .reader import MemoryReader
from .writer import ShortConvolution


class LayerCache(NamedTuple):
    """What one layer keeps of a segment's tokens, and of what it looks at."""

    tokens: KeyValueCache
    source: KeyValueCache


class MemformerLayer(nn.Module):
    """One pre-norm layer: self-attention, a look at `source`, a feed-forward net.

    `source` is the memory, for a `MemoryReader`, or the encoder's output, for cross-attention.
    """

    def __init__(self, config: MemformerConfig, source: Literal["memory", "encoder"]) -> None:
        super().__init__()
        dim, heads, drop = config.dim, config.num_heads, config.dropout
        wide, length = config.ffn_dim or 4 * dim, config.segment_length
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attention = MultiHeadAttention(
            dim, heads, max_length=length, positions=config.positions, dropout=drop
        )
        self.look: MemoryReader | MultiHeadAttention
        if source == "memory":
            starts = {"normalise": config.normalise, "output_start": config.reader_start}
            self.look = MemoryReader(dim, heads, dropout=drop, **starts)  # type: ignore[arg-type]
        else:
            self.look = MultiHeadAttention(dim, heads, max_length=length, dropout=drop)
        self.ffn = nn.Sequential(nn.Linear(dim, wide), nn.GELU(), nn.Linear(wide, dim))
        self.dropout = drop

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        *,
        causal: bool,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`x (B, L, D)`, `source (B, N, D)` → `(B, L, D)`; masks are True where real."""
        kept, seen = (None, None) if cache is None else cache
        masked = {} if source_mask is None else {"mask": source_mask}  # slots have no padding
        y = self.attention(self.norms[0](x), causal=causal, mask=mask, cache=kept)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.look(self.norms[1](x), source, cache=seen, **masked)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.ffn(self.norms[2](x))
        return x + F.dropout(y, self.dropout, self.training)


class SegmentCache:
    """What a stack of layers needs of the tokens that it has read of a segment."""

    def __init__(self, num_layers: int, length: int, source_length: int) -> None:
        self.layers = [
            LayerCache(KeyValueCache(length), KeyValueCache(source_length))
            for _ in range(num_layers)
        ]
        self.recent: Tensor | None = None  # (B, n, D), embedded, for the convolution

    def clear(self) -> None:
        """A border: the next segment has read nothing."""
        self.recent = None
        for layer in self.layers:
            layer.tokens.clear()
        self.look_again()

    def look_again(self) -> None:
        """The layers get another source."""
        for layer in self.layers:
            layer.source.clear()


class SegmentLayers(nn.Module):
    """A convolution over the embedded tokens, then layers that look at one source."""

    def __init__(
        self,
        config: MemformerConfig,
        num_layers: int,
        source: Literal["memory", "encoder"],
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        # Centred, a token stands in the middle, so the width is odd: an even one gets one more.
        self.causal, width = causal, config.convolution
        if not causal and width > 1:
            width |= 1
        self.convolution = (
            ShortConvolution(config.dim, width, causal=causal) if width > 1 else None
        )
        self.layers = nn.ModuleList(MemformerLayer(config, source) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        cache: SegmentCache | None = None,
    ) -> Tensor:
        """Embedded tokens `(B, L, D)`, `source (B, N, D)` → hidden `(B, L, D)`.

        With a `cache`, the tokens go on from those that it holds, and `mask` covers all.
        """
        if self.convolution is not None:
            past = None if cache is None else cache.recent
            if cache is not None:
                cache.recent = self.convolution.reach(x, past)
            x = self.convolution(x, mask, past)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, kept in zip(self.layers, caches, strict=True):
            x = layer(
                x, source, causal=self.causal, mask=mask, source_mask=source_mask, cache=kept
            )
        out: Tensor = self.norm(x)
        return out
