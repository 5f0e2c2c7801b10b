"""The rate of a step, and which weights decay."""

from __future__ import annotations

import torch
from torch import nn

from ..forgetting import BiasedMemoryNorm
from ..writer import ShortConvolution
from .recipes import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step, from 1: it rises over `warmup`, holds, and falls at the end."""
    left = (recipe.steps + 1 - step) / max(1.0, recipe.steps * recipe.decay)
    return recipe.lr * min(1.0, step / max(1, recipe.warmup), left)


# Decay would shrink embeddings and taps for nothing, and lengthen every memory (chapter 7).
SPARED = (nn.Embedding, BiasedMemoryNorm, ShortConvolution)


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices decay, and of them neither embeddings, taps, nor forgetting."""
    spared = {
        id(weight)
        for module in model.modules()
        if isinstance(module, SPARED)
        for weight in module.parameters(recurse=False)
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for weight in model.parameters():
        groups[weight.ndim == 2 and id(weight) not in spared].append(weight)
    options = [
        {"params": groups[True], "weight_decay": recipe.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(options, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=fused)
