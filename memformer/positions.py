"""How a head knows positions: rotary angles, turned into queries and keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Positions = Literal["rotary", "relative", "none"]


def rotary_table(length: int, head_dim: int, like: Tensor, base: float = 10_000.0) -> Tensor:
    """Cosines and sines of the angle of every position and pair, `(2, length, head_dim/2)`.

    Angles grow with the position, for each pair at its own speed, `base^(−2i/d)`.
    """
    exact = torch.promote_types(like.dtype, torch.float32)  # bfloat16 takes 257 for 256
    pair = torch.arange(0, head_dim, 2, device=like.device, dtype=exact)
    position = torch.arange(length, device=like.device, dtype=exact)
    angle = position[:, None] * base ** (-pair / head_dim)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn feature i and feature i + d/2 of `(…, L, d)` together, by the angles of `table`.

    The dot product of two turned vectors depends on their contents and their distance alone
    (Su et al. 2021). `table` is `(2, L, d/2)`.
    """
    cos, sin = table
    left, right = x.chunk(2, dim=-1)
    first = torch.addcmul(left * cos, right, sin, value=-1)  # left · cos − right · sin
    second = torch.addcmul(left * sin, right, cos)
    return torch.cat((first, second), dim=-1).to(x.dtype)


class RotaryPositions(nn.Module):
    """Turns queries and keys by their positions; keeps the table from call to call.

    Raises `ValueError` for a head of odd width.
    """

    def __init__(self, max_length: int, head_dim: int) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"a head has {head_dim} features; rotary positions turn pairs")
        self.table = rotary_table(max_length, head_dim, torch.zeros(()))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """`x (…, L, d)` → the same shape, the first row as position `start`."""
        end, exact = start + x.shape[-2], torch.promote_types(x.dtype, torch.float32)
        known = self.table
        if known.dtype != exact or known.device != x.device or known.shape[1] < end:
            self.table = known = rotary_table(max(end, known.shape[1]), x.shape[-1], x)
        return rotate(x, known[:, start:end])
