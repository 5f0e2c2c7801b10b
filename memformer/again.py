"""Running a segment a second time exactly as the first: random state, mixed precision, and a check."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .segments import State, leaves_of, map_state


class RandomState(NamedTuple):
    """Where PyTorch's random generators stand: the CPU's and those of devices in use."""

    cpu: Tensor
    devices: list[int]
    on_devices: list[Tensor]

    @classmethod
    def now(cls, *used: Any) -> RandomState:
        """The present state; `used` are tensors, nested as they like, that name the devices."""
        return cls(torch.get_rng_state(), *get_device_states(*used))

    def restore(self) -> None:
        """Put the generators back to where they stood."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.on_devices)


class MixedPrecision(NamedTuple):
    """How autocast is set: for each device, to which dtype, and whether it keeps casts."""

    devices: list[tuple[str, torch.dtype, bool]]
    cache: bool

    @classmethod
    def now(cls, devices: Iterable[str]) -> MixedPrecision:
        """The present setting of these devices and the CPU."""
        settings = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted({"cpu", *devices})
        ]
        return cls(settings, torch.is_autocast_cache_enabled())

    def enter(self) -> ExitStack:
        """The same setting again, as a context, with no casts from before or for after."""
        stack = ExitStack()
        stack.callback(torch.clear_autocast_cache)
        for device, dtype, enabled in self.devices:
            stack.enter_context(torch.autocast(device, dtype, enabled, self.cache))
        torch.clear_autocast_cache()  # casts made without a graph lead back to no weight
        return stack

    @property
    def enabled(self) -> bool:
        return any(enabled for _, _, enabled in self.devices)


def differentiable(t: Tensor) -> bool:
    """Whether a gradient can arrive at this tensor: not at integers and flags."""
    return t.is_floating_point() or t.is_complex()


FULL, HALF = 1e-3, 1e-2  # how far the two passes may differ, in 32 bits or more and in 16


def disagreement(found: State, kept: State, mixed: bool) -> Tensor:
    """How far two runs of a segment are apart, in units of what is allowed: fine up to 1.

    Of each tensor the norm of the difference by the norm, and the worst of all. NaN counts as 0.
    """

    def apart(a: Tensor, b: Tensor) -> Tensor:
        if not differentiable(a):
            return 2.0 * (a != b).any()
        allowed = HALF if mixed or a.element_size() == 2 else FULL
        size = b.abs().float().norm().clamp_min(1e-30)
        far: Tensor = (a - b).abs().float().norm() / size / allowed
        return far

    every = [torch.zeros(()), *leaves_of(map_state(apart, found, kept))]
    worst: Tensor = torch.stack([t.to(every[-1].device) for t in every]).nan_to_num().max()
    return worst


def check_agreement(worst: list[Tensor]) -> None:
    """`RuntimeError` where a segment, run again, has given another memory than at first."""
    if worst and torch.stack(worst).max() > 1:
        raise RuntimeError(
            "a segment that was run again gave another memory than in the first pass, so the "
            "gradients are wrong: discard them. Both passes must compute the same: `advance` "
            "has to draw first what `step` draws at random, and to be compiled as it is, and a "
            "step may change nothing that it reads"
        )


def check_step(loss: Tensor | None, after: State, before: State) -> None:
    """`ValueError` for a loss that is no scalar, `TypeError` for a memory nested otherwise."""
    if loss is not None and loss.ndim:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; a scalar is expected")
    try:
        map_state(lambda new, old: new, after, before)
    except (TypeError, ValueError) as error:
        message = f"a step returns a memory nested like the one it was given ({error})"
        raise TypeError(message) from None


def check_segments(segments: Iterable[Any]) -> list[Any]:
    """The segments as a list; `ValueError` where there are none."""
    found = list(segments)
    if not found:
        raise ValueError("there are no segments; at least one is needed")
    return found
