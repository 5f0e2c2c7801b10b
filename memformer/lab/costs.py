"""What history costs: time and bytes of attention over everything, measured and counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor


class SavedBytes:
    """Count the bytes that autograd keeps for the backward pass in a `with` block.

    A storage counts once, however many views of it are saved. `ignore` names
    tensors that are there anyway, such as parameters. Storages live as long as
    this object. Of two nested blocks the inner one counts.
    """

    def __init__(self, *ignore: Tensor) -> None:
        # Held, because the address of a freed storage may be given out again.
        ignored = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in ignore}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:  # without `self`, which would close a cycle
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ignored:
                storages[storage.data_ptr()] = storage
            return tensor.detach()  # the tensor itself would close another, and leak

        self.storages = storages
        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)

    def __enter__(self) -> SavedBytes:
        self.hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hooks.__exit__(kind, error, trace)

    @property
    def total(self) -> int:
        """Bytes saved so far."""
        return sum(storage.nbytes() for storage in self.storages.values())


def seconds(
    fn: Callable[[], object],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds that `fn()` takes: the fastest of `repeats` runs, after one to warm up.

    The fastest, because whatever else runs on the machine only adds to a time. The
    clock shows wall time; with `time.process_time`, the processor time of all threads.
    Where there is an accelerator, each run ends when its work is done. Raises
    `ValueError` for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    accelerated = torch.accelerator.is_available()
    times = []
    for _ in range(repeats + 1):
        start = clock()
        fn()
        if accelerated:
            torch.accelerator.synchronize()
        times.append(clock() - start)
    return min(times[1:])


def cache_bytes(tokens: int, layers: int, dim: int, bytes_per_number: int = 4) -> int:
    """What attention keeps of its past: a key and a value per token and layer."""
    return 2 * tokens * layers * dim * bytes_per_number


def slot_bytes(num_slots: int, dim: int, bytes_per_number: int = 4) -> int:
    """What a slot memory keeps of any past: one vector a slot, for all layers."""
    return num_slots * dim * bytes_per_number
