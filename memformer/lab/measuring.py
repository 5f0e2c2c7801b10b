"""Peak bytes counted tensor by tensor, and times of rivals taken in turns."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors in a `with` block: alive `now`, and the `peak` so far.

    Storages count once, from the operation that returns them until the last tensor on them is
    gone; those that existed before do not count. Scratch space inside a kernel is not seen, nor
    a storage that is resized, nor compiled code. For the CPU; `peak_bytes` knows more devices.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self.note(leaf, 0)  # was there before, or is known
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self.note(leaf, 1)
        return out

    def note(self, leaf: object, share: int) -> None:
        """Follow a storage that is new to us, counting `share` of its bytes: all or none."""
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        number, size = id(storage), share * storage.nbytes()
        if number not in self.alive:
            self.alive[number] = weakref.ref(storage, partial(self.free, number, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, number: int, size: int, _: object) -> None:
        del self.alive[number]
        self.now -= size


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes alive at once while `fn()` runs, beyond those before; None: too many.

    On the CPU tensors are counted by `PeakBytes`, on CUDA the allocator is asked.
    """
    if device.type != "cuda":
        with PeakBytes() as count:
            fn()
        return int(count.peak)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        fn()
    except torch.OutOfMemoryError:
        return None
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


class Timing(NamedTuple):
    """How long a function takes."""

    seconds: float  # median over rounds
    speed: float  # time of the first function by the time of this one: median over rounds


def settle() -> None:
    """Wait until an accelerator, if there is one, has done its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in turns, A B A B …, after one round to warm up.

    Speeds are relative to the first function, within each round. With an accelerator, a run
    ends when its work is done. Raises `ValueError` for no functions or no repeats.
    """
    if repeats < 1 or not functions:
        raise ValueError(
            f"{repeats} repeats of {len(functions)} functions; at least 1 is needed"
        )
    rounds: list[list[float]] = []
    for _ in range(repeats + 1):
        times = []
        for fn in functions.values():
            settle()
            start = clock()
            fn()
            settle()
            times.append(clock() - start)
        rounds.append(times)
    columns = zip(*rounds[1:], strict=True)
    first = [times[0] for times in rounds[1:]]
    return {
        name: Timing(
            statistics.median(column),
            statistics.median(a / b for a, b in zip(first, column, strict=True)),
        )
        for name, column in zip(functions, columns, strict=True)
    }
