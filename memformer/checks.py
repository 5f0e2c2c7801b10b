"""What the parts of the mechanism refuse, and what they say then."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class MemoryOverflowError(ValueError):
    """A memory holds NaN or infinity: an earlier segment overflowed."""


def check_heads(dim: int, num_heads: int) -> None:
    """Raise `ValueError` unless `num_heads` divides `dim` and both are positive."""
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(
            f"dim is {dim} and num_heads is {num_heads}; both must be positive, "
            "and dim a multiple of num_heads"
        )


def check_at_least_one(**counts: int) -> None:
    """Raise `ValueError` that names the first count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def check_temperature(temperature: float) -> float:
    """The temperature; `ValueError` unless it is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature is {temperature}; it must be finite and above 0 (the paper: below 1)"
        )
    return temperature


def check_self_weight(self_weight: float) -> None:
    """Raise `ValueError` unless the self-weight lies strictly between 0 and 1."""
    if not 0 < self_weight < 1:
        raise ValueError(f"self_weight is {self_weight}; it must be between 0 and 1")


def check_strength(strength: float) -> None:
    """Raise `ValueError` unless the strength of forgetting is finite and above 0."""
    if not (strength > 0 and math.isfinite(strength)):
        raise ValueError(
            f"strength is {strength}; it must be a finite number above 0 (the paper: 1)"
        )


def check_mask(mask: Tensor, batch_size: int, size: int) -> None:
    """Raise `ValueError` unless `mask` is bool `(batch_size, size)`."""
    if mask.dtype != torch.bool or mask.shape != (batch_size, size):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; "
            f"torch.bool {(batch_size, size)} is expected"
        )


def check_tokens(
    tokens: Tensor, vocab_size: int, max_length: int, mask: Tensor | None = None
) -> None:
    """Raise unless tokens are `(B, 1…max_length)` int64 ids in `[0, vocab_size)`.

    `TypeError` for no tensor and for the dtype; `ValueError` for shape, length, ids, and for a
    `mask` that is not bool of the same shape. Ids are looked at on the CPU only: elsewhere
    that would make the device wait.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens are of type {type(tokens).__name__}; a tensor (batch, time) of int64 is "
            "expected, as from torch.tensor([[1, 2, 3]])"
        )
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens are {tokens.dtype}; torch.int64 is expected")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; (batch, time), neither 0, is expected"
        )
    if tokens.shape[1] > max_length:
        raise ValueError(
            f"the segment has {tokens.shape[1]} tokens, the model takes {max_length}; "
            "cut the stream with split_segments or run_segments"
        )
    if mask is not None:
        check_mask(mask, *tokens.shape)
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"tokens hold id {wrong}; ids must be in [0, {vocab_size})")


def check_memory(memory: Tensor, batch_size: int, num_slots: int, like: Tensor) -> None:
    """Raise unless `memory` is `(batch_size, num_slots, D)`, of the kind of `like (…, D)`.

    `like` is a weight of the model: memory needs its width, dtype and device. `TypeError` for
    no tensor and for the dtype, `ValueError` for the shape, `RuntimeError` for the device, and
    `MemoryOverflowError` for NaN or infinity, looked for on the CPU only.
    """
    if not isinstance(memory, Tensor):
        raise TypeError(
            f"memory is of type {type(memory).__name__}; a tensor (batch, slots, width) is "
            "expected. Begin with initial_state(batch_size)"
        )
    expected = (batch_size, num_slots, like.shape[-1])
    if tuple(memory.shape) != expected:
        raise ValueError(
            f"memory has shape {tuple(memory.shape)}; (batch, slots, width) = {expected} is "
            "expected. Start a batch of this size with initial_state(batch_size)"
        )
    if memory.dtype != like.dtype:
        raise TypeError(
            f"memory is {memory.dtype}, the model {like.dtype}; convert it with .to()"
        )
    if memory.device != like.device:
        raise RuntimeError(
            f"memory is on {memory.device}, the model on {like.device}; move it with .to()"
        )
    on_cpu = memory.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not bool(memory.isfinite().all()):
        raise MemoryOverflowError(
            f"memory holds {int((~memory.isfinite()).sum())} values that are NaN or infinite; "
            "an earlier segment overflowed: lower the learning rate or clip gradients, and "
            "restart the stream"
        )


def check_state(state: Any, batch_size: int) -> None:
    """`TypeError` for what is no `MemformerState`, `ValueError` for another number of streams."""
    if not all(hasattr(state, name) for name in ("memory", "tokens", "mask")):
        raise TypeError(
            f"state is of type {type(state).__name__}; a MemformerState is expected. Begin "
            "with initial_state(batch_size)"
        )
    if state.tokens.shape[:1] != (batch_size,):
        raise ValueError(
            f"the state is of {len(state.tokens)} streams, the tokens of {batch_size}. Start a "
            "batch of this size with initial_state(batch_size)"
        )
