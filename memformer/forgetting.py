"""Biased memory normalisation: every slot is pulled a little toward where it began, and kept at length one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_at_least_one, check_strength
from .slots import separate_slots, unit_rows


class BiasedMemoryNorm(nn.Module):
    """`m_i ← (m_i + v_i) / ‖m_i + v_i‖`, the paper's forgetting; `v_i = strength · bias_i`.

    `bias (K, D)` is learned and starts as unit rows, so `strength` is the length of `v` at the
    start. The paper learns `v` itself, which is `strength=1`; a smaller one slows forgetting
    and keeps the optimiser's steps on `v` small in proportion. An idle slot drifts to
    `v_i / ‖v_i‖`, where it also began. Exempt `bias` from weight decay: it would lengthen
    every memory. Source: the Memformer paper (2022).

    Raises `ValueError` unless `strength` is finite and above 0.
    """

    def __init__(self, num_slots: int, dim: int, *, strength: float = 0.01) -> None:
        super().__init__()
        check_strength(strength)
        self.strength = strength
        self.bias = nn.Parameter(separate_slots(num_slots, dim))

    def forward(self, memory: Tensor) -> Tensor:
        """`(B, K, D)` → `(B, K, D)`, rows of length 1; `ValueError` for another K or D."""
        if memory.shape[-2:] != self.bias.shape:
            raise ValueError(
                f"memory has shape {tuple(memory.shape)}; (…, slots, width) must end in "
                f"{tuple(self.bias.shape)}"
            )
        return unit_rows(memory + self.strength * self.bias)

    def terminal(self) -> Tensor:
        """`(K, D)`: the unit vectors `v_i / ‖v_i‖`, where slots start and drift back to."""
        return unit_rows(self.bias)

    def initial(self, batch_size: int) -> Tensor:
        """`(B, K, D)`: the memory of `B` streams that have read nothing, one shared view."""
        check_at_least_one(batch_size=batch_size)
        return self.terminal().expand(batch_size, -1, -1)


def drift_angle(angle: Tensor, strength: float | Tensor, steps: int) -> Tensor:
    """Angle in radians between an idle slot and its terminal state, `steps` segments later.

    Slot and bias span a plane, where one step takes `θ` to `atan2(sin θ, cos θ + ‖v‖)`;
    `strength` is `‖v‖` for a slot of length 1. `angle` and `strength` may be of any shapes
    that broadcast. Raises `ValueError` for negative `steps`.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must be at least 0")
    for _ in range(steps):
        angle = torch.atan2(torch.sin(angle), torch.cos(angle) + strength)
    return angle
