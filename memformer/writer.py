"""Slots look at the segment and at themselves, never at one another: slot attention with a temperature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import merge_heads, split_heads
from .checks import check_at_least_one, check_heads, check_self_weight, check_temperature


def slot_weights(
    query: Tensor,
    own_key: Tensor,
    key: Tensor,
    temperature: float,
    keep_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`softmax([q_i·k_i ; q_i·K_x] / (√d τ))` for all slots at once, `(B, H, K, 1 + L)`.

    `query` and `own_key` are `(B, H, K, d)`, `key` is `(B, H, L, d)`, `mask (B, L)` is True
    where a token is real. `keep_bias (H, 1, 1)` is added to the slot's own score, before τ.
    Slot i meets its own key only: no K × K scores. In 32 bits at least.
    """
    root = query.shape[-1] ** 0.5
    wide = torch.promote_types(query.dtype, torch.float32)
    own = (query * own_key).sum(dim=-1, keepdim=True, dtype=wide) / root
    if keep_bias is not None:
        own = own + keep_bias
    seen = (query @ key.mT).to(wide) / root
    if mask is not None:
        seen = seen.masked_fill(~mask[:, None, None, :], float("-inf"))
    return (torch.cat((own, seen), dim=-1) / temperature).softmax(dim=-1)


def blend(weights: Tensor, old: Tensor, value: Tensor) -> Tensor:
    """`m'_i = a_i · [m_i ; V_x]`: `(B, H, K, d)`, of the dtype of `old`.

    `weights (B, H, K, 1 + L)` as from `slot_weights`, `old (B, H, K, d)`, `value (B, H, L, d)`.
    """
    written = weights[..., 1:].to(value.dtype) @ value
    return (weights[..., :1] * old + written).to(old.dtype)


def keep_bias_for(self_weight: float, length: int, temperature: float = 0.25) -> float:
    """The keep bias for a self-weight g at the start: `τ (ln L + ln(g / (1 − g)))`.

    Exact where all scores are zero, for segments of `length` tokens. Raises `ValueError` for a
    self-weight outside (0, 1) or no tokens.
    """
    check_temperature(temperature)
    check_self_weight(self_weight)
    check_at_least_one(length=length)
    return temperature * (math.log(length) + math.log(self_weight / (1 - self_weight)))


QUERY_START = 0.1  # scores start small, so that the formula of `keep_bias_for` holds


class MemoryWriter(nn.Module):
    """Slot attention, the paper's memory writing: `m'_i = a_i · [m_i ; V_x]` in every head.

    An untrained writer keeps `self_weight` of a slot over a segment of `length` tokens, by a
    learned bias per head and queries that start small; None is the paper's form, without.
    `normalise`: slots are layer-normalised for queries and keys, never as values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        temperature: float = 0.25,
        *,
        self_weight: float | None = 0.8,
        length: int = 64,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.temperature = num_heads, check_temperature(temperature)
        self.norm = nn.LayerNorm(dim) if normalise else nn.Identity()
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.keep_bias: nn.Parameter | None = None
        if self_weight is not None:
            bias = torch.tensor(keep_bias_for(self_weight, length, temperature))
            self.keep_bias = nn.Parameter(bias.repeat(num_heads, 1, 1))
            self.query.weight.data *= QUERY_START

    def forward(
        self,
        memory: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`memory (B, K, D)`, `x (B, L, D)`, `mask (B, L)` → `(B, K, D)`; and the weights."""
        slots = self.norm(memory)
        parts = self.query(slots), self.key(slots), self.key(x), self.value(x), memory
        query, own_key, key, value, old = (split_heads(t, self.num_heads) for t in parts)
        weights = slot_weights(query, own_key, key, self.temperature, self.keep_bias, mask)
        new = merge_heads(blend(weights, old, value))
        return (new, weights) if return_weights else new


class ShortConvolution(nn.Module):
    """Mixes every token with the `width − 1` before it, each feature by itself.

    A slot stores one token's vector, so a key and its value must meet in one token before the
    writer looks. `taps[-1]` weighs the token itself and starts near 1, the others near 0. Not
    `causal`, the token stands in the middle. Ours, not the paper's.
    """

    def __init__(self, dim: int, width: int, *, causal: bool = True) -> None:
        super().__init__()
        check_at_least_one(dim=dim, width=width)
        self.before = width - 1 if causal else width // 2
        self.after = width - 1 - self.before
        self.taps = nn.Parameter(torch.randn(width, dim) * 0.3)
        with torch.no_grad():
            self.taps[self.before] += 1

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: Tensor | None = None
    ) -> Tensor:
        """`x (B, L, D)` → `(B, L, D)`; `past (B, n, D)` are the n tokens before, None: none.

        `mask (B, ≥ n + L)`, True where real, ends with the last token of `x`.
        """
        row = x if past is None else torch.cat((past, x), dim=1)
        length, size = x.shape[1], row.shape[1]
        if mask is not None:
            row = row * mask[:, -size:, None]
        row = F.pad(row, (0, 0, self.before - size + length, self.after))
        out = row[:, :length] * self.taps[0]
        for i, tap in enumerate(self.taps[1:], 1):
            out = torch.addcmul(out, row[:, i : i + length], tap)
        return out

    def reach(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """The `before` tokens, or fewer, that the next token meets: a copy of their own."""
        row = x if past is None else torch.cat((past, x), dim=1)
        return row[:, -self.before :].clone()
