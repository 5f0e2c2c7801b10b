"""Whether a memory lives: what its slots keep, how alike they are, how far gradients reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memformer.forgetting import BiasedMemoryNorm
from memformer.lab.tracing import trace
from memformer.mrbp import Replayed
from memformer.segments import Segment
from memformer.slots import effective_slots, slot_similarity


class GradientByAge:
    """Watches replays: how large the gradient at each memory is, by segments to the end."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.squares = scale, dict[int, Tensor]()

    def __call__(self, seen: Replayed) -> None:
        squares = [
            (g / self.scale).float().square().sum() for g in seen.gradient if g is not None
        ]
        before = self.squares.get(seen.segment, torch.zeros(()))
        self.squares[seen.segment] = sum(squares, before)  # of several parts of a batch

    def result(self) -> list[float]:
        """The first is the memory that the last segment read."""
        return [float(s) ** 0.5 for _, s in sorted(self.squares.items(), reverse=True)]


def slot_health(model: Any, segments: Sequence[Segment]) -> dict[str, float]:
    """Whether the slots are alive: what they keep, how alike they are, how fast they forget.

    `keepers` and `overwriters` are the shares of slots with self-weight above 0.9 and below
    0.1, `cosine` is the mean absolute cosine between two slots, `slots` how many the memory
    is worth (`effective_slots`), `v` the mean length of the forgetting bias.
    """
    device = next(model.parameters()).device
    moved = [
        Segment(*(part if part is None else part.to(device) for part in segment))
        for segment in segments
    ]
    begin = model.initial_state(segments[0].tokens.shape[0])
    with torch.compiler.set_stance("force_eager"):  # compiled parts would not show weights
        seen = trace(model, moved, begin)
    kept, last = seen.self_weight, seen.memories[-1]
    cosines = slot_similarity(last).abs()
    pairs = max(1, last.shape[1] * (last.shape[1] - 1))
    apart = (cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)) / pairs
    norm = next(m for m in model.modules() if isinstance(m, BiasedMemoryNorm))
    return {
        "self_weight": float(kept.mean()),
        "keepers": float((kept > 0.9).float().mean()),
        "overwriters": float((kept < 0.1).float().mean()),
        "cosine": float(apart.mean()),
        "slots": float(effective_slots(last).mean()),
        "v": float(norm.strength * norm.bias.detach().norm(dim=-1).mean()),
    }
