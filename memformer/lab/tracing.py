"""Everything a memory did over a run of segments: what was read, what was written, what it held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memformer.model import memory_of
from memformer.modes import evaluating
from memformer.reader import MemoryReader
from memformer.segments import Segment, State, begin_segment
from memformer.writer import MemoryWriter


@dataclass(frozen=True)
class MemoryTrace:
    """Everything a memory did over `T` segments, shorter ones padded with zeros."""

    write: Tensor  # (T, B, H, K, 1 + L), column 0 the slot itself
    read: tuple[Tensor, ...]  # per layer (T, B, H, L, K)
    memories: Tensor  # (T + 1, B, K, D), the first as it was before segment 1

    @property
    def self_weight(self) -> Tensor:
        """How much of itself each slot kept, averaged over heads: `(T, B, K)`."""
        return self.write[..., 0].mean(dim=2)


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """While inside, `model` is in eval mode and its readers and writers note their weights.

    At the end, also after an error, hooks are gone and training flags are as they were.
    """
    watched = [m for m in model.modules() if isinstance(m, (MemoryReader, MemoryWriter))]
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in watched}

    def note(module: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
        if not options.get("return_weights"):  # the fused kernel keeps none: ask again
            output = module.forward(*args, **options, return_weights=True)
        seen[module].append(output[1])

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in seen]
    try:
        with evaluating(model):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def stack_padded(weights: list[Tensor]) -> Tensor:
    """`(…, a, b)` tensors on a new first axis, padded with zeros to the longest a and b."""
    a, b = (max(w.shape[d] for w in weights) for d in (-2, -1))
    return torch.stack([F.pad(w, (0, b - w.shape[-1], 0, a - w.shape[-2])) for w in weights])


def trace(model: nn.Module, segments: Iterable[Tensor | Segment], state: State) -> MemoryTrace:
    """Run `model` over `segments` in eval mode; record every read and write of its memory.

    A segment is tokens `(B, L)`, or a `Segment`, whose padding is masked and whose `reset`
    streams start afresh. Raises `ValueError` where the model has not exactly one
    `MemoryWriter`, and where there are no segments.
    """
    memories: list[Tensor] = []
    with recorded_weights(model) as seen:
        writers = [m for m in seen if isinstance(m, MemoryWriter)]
        if len(writers) != 1:
            raise ValueError(
                f"the model has {len(writers)} MemoryWriter modules; a trace needs exactly one"
            )
        for segment in segments:
            inputs: tuple[Any, ...] = (segment, state)
            if isinstance(segment, Segment):
                inputs = begin_segment(model, segment, state)
            memories = memories or [memory_of(inputs[1])]
            state = model(*inputs)[1]
            memories.append(memory_of(state))
    if not memories:
        raise ValueError("there are no segments to trace")
    read = tuple(stack_padded(seen[m]) for m in seen if m is not writers[0])
    return MemoryTrace(stack_padded(seen[writers[0]]), read, torch.stack(memories))
