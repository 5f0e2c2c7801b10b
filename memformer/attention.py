"""Multi-head attention on PyTorch's fused kernel, causal, padded and cached, with two ways to know positions."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_heads, check_mask
from .positions import Positions, RotaryPositions


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(B, L, D)` → `(B, H, L, D/H)`: every head gets its own slice of the width."""
    return x.view(*x.shape[:2], num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`(B, H, L, D/H)` → `(B, L, D)`, the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


class Seen(NamedTuple):
    """What queries may look at."""

    causal: bool = False  # nothing later than themselves
    mask: Tensor | None = None  # (B, N), True where a key is real
    start: int = 0  # where the first query stands among the keys


def visible_positions(
    query: Tensor, key: Tensor, causal: bool, mask: Tensor | None, start: int = 0
) -> Tensor | None:
    """Where `query (B, H, L, d)` may look in `key (B, H, N, d)`: bool `(B or 1, 1, L, N)`.

    None means everywhere. The first query stands at position `start` of the keys. `mask (B, N)`
    is True where a key is real, else `ValueError`. A query that would see nothing is let see
    everything, as the softmax over nothing is NaN: only padding can be in that place.
    """
    length, size = query.shape[-2], key.shape[-2]
    if mask is not None:
        check_mask(mask, key.shape[0], size)
    if mask is None and (not causal or start + 1 == size):
        return None
    visible = torch.ones(1, 1, length, size, dtype=torch.bool, device=key.device)
    if causal:
        visible = visible.tril(start)
    if mask is not None:
        visible = visible & mask[:, None, None, :]
        visible = visible | ~visible.any(dim=-1, keepdim=True)
    return visible


class RelativeAttention(nn.Module):
    """Attention with a learned vector `R` per head and distance, on keys and on values.

    `A_ij = (Q_i·K_j + Q_i·R_{i−j}) / √d` and `O_i = Σ_j softmax(A)_ij (V_j + R_{i−j})`, the
    simplified relative encoding of the paper's 2021 submission. `table[:, n + max_length − 1]`
    is `R_n`. The value term needs the weights, so this cannot run on a fused kernel.
    """

    def __init__(
        self, max_length: int, num_heads: int, head_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.max_length, self.dropout = max_length, dropout
        self.table = nn.Parameter(torch.randn(num_heads, 2 * max_length - 1, head_dim) * 0.02)

    def turn(self, x: Tensor, start: int) -> Tensor:
        """Queries and keys stay as they are: positions come in when they meet."""
        return x

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen) -> Tensor:
        """`(B, H, L, d)` and twice `(B, H, N, d)` → `(B, H, L, d)`."""
        length, size, most = query.shape[-2], key.shape[-2], self.max_length
        if max(seen.start + length, size) > most:
            reach = max(seen.start + length, size)
            raise ValueError(
                f"{reach} positions, but max_length is {most}; cut shorter segments"
            )
        here = torch.arange(seen.start, seen.start + length, device=query.device)
        distance = here[:, None] - torch.arange(size, device=query.device)
        column = (distance + most - 1).expand(*query.shape[:2], -1, -1)
        by_distance = query @ self.table.mT
        scores = (query @ key.mT + by_distance.gather(-1, column)) / query.shape[-1] ** 0.5
        visible = visible_positions(query, key, *seen)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        blank = torch.zeros_like(by_distance, dtype=weights.dtype)
        return weights @ value + blank.scatter(-1, column, weights) @ self.table


class FusedAttention(nn.Module):
    """Attention on PyTorch's fused kernel, which never stores the weights.

    `rotary` turns queries and keys by their positions. `dropout` acts on the weights, in
    training only.
    """

    def __init__(self, rotary: RotaryPositions | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.rotary, self.dropout = rotary, dropout

    def turn(self, x: Tensor, start: int) -> Tensor:
        """Queries or keys `(B, H, L, d)`, turned where positions are rotary."""
        turned: Tensor = x if self.rotary is None else self.rotary(x, start)
        return turned

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen) -> Tensor:
        """`(B, H, L, d)` and twice `(B, H, N, d)` → `(B, H, L, d)`."""
        dropout = self.dropout if self.training else 0.0
        if seen.causal and seen.mask is None and seen.start == 0:
            # The kernel knows causal order itself, and is faster without a mask.
            return F.scaled_dot_product_attention(query, key, value, None, dropout, True)
        visible = visible_positions(query, key, *seen)
        return F.scaled_dot_product_attention(query, key, value, visible, dropout)


class KeyValueCache:
    """Keys and values that were computed already, `(B, H, n, d)` each, at most `length`.

    For reading without gradients: it writes in place, and never holds more than a segment.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.store: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(B, H, n, d)` twice; returns all that is held. `ValueError` without room."""
        begin, end = self.filled, self.filled + key.shape[2]
        if end > self.length:
            raise ValueError(f"{end} positions, but the cache has room for {self.length}")
        if self.store is None:
            self.store = key.new_empty(2, *key.shape[:2], self.length, key.shape[-1])
        self.store[0, :, :, begin:end], self.store[1, :, :, begin:end] = key, value
        self.filled = end
        return self.held()

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `(B, H, filled, d)` each; `ValueError` where nothing is held."""
        if self.store is None:
            raise ValueError("the cache is empty; extend it first")
        return self.store[0, :, :, : self.filled], self.store[1, :, :, : self.filled]

    def clear(self) -> None:
        """Forget everything; the room stays."""
        self.filled = 0


class MultiHeadAttention(nn.Module):
    """Multi-head attention from `x` to `context`, or from `x` to itself.

    `positions` is `rotary`, `relative` (for up to `max_length` tokens) or `none`. Where there
    is a context, positions and causal order count from the start of both.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int,
        positions: Positions = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.query, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.mix = choose_attention(positions, max_length, num_heads, dim // num_heads, dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """`x (B, L, D)`, `context (B, N, D)` → `(B, L, D)`; `mask (B, N)` True where real.

        With a `cache`, `x` goes on from the tokens that it holds, and `mask` covers them too.
        """
        start = cache.filled if cache is not None and context is None else 0
        query = self.mix.turn(split_heads(self.query(x), self.num_heads), start)
        key, value = keys_and_values(self, x, context, cache)
        mixed = self.mix(query, key, value, Seen(causal, mask, start))
        out: Tensor = self.output(merge_heads(mixed))
        return out


def choose_attention(
    positions: Positions, max_length: int, num_heads: int, head_dim: int, dropout: float
) -> FusedAttention | RelativeAttention:
    """How heads mix, given how they know positions; `ValueError` if that is impossible."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}; it must be one of {get_args(Positions)}")
    if positions == "relative":
        return RelativeAttention(max_length, num_heads, head_dim, dropout)
    rotary = RotaryPositions(max_length, head_dim) if positions == "rotary" else None
    return FusedAttention(rotary, dropout)


def keys_and_values(
    layer: MultiHeadAttention,
    x: Tensor,
    context: Tensor | None = None,
    cache: KeyValueCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of `context (B, N, D)`, or of `x (B, L, D)` itself, `(B, H, N, d)` each.

    Those of a context that a `cache` holds are not computed again; those of `x` are added to
    what it holds.
    """
    if cache is not None and context is not None and cache.filled:
        return cache.held()
    pair = layer.key_value(x if context is None else context).chunk(2, dim=-1)
    key, value = (split_heads(part, layer.num_heads) for part in pair)
    key = layer.mix.turn(key, 0 if cache is None else cache.filled)
    return (key, value) if cache is None else cache.extend(key, value)


def attention_weights(layer: MultiHeadAttention, x: Tensor, context: Tensor) -> Tensor:
    """How each token of `x (B, L, D)` divides its attention over `context`, `(B, H, L, N)`.

    What the fused kernel computes and does not show, for a layer without positions.
    """
    query, key = (
        split_heads(layer.query(x), layer.num_heads),
        keys_and_values(layer, context)[0],
    )
    weights: Tensor = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
    return weights
