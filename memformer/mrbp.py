"""Memory replay back-propagation: exact gradients through any number of segments at the cost of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .segments import State, detach_state, map_state

__all__ = [
    "Advance",
    "RandomState",
    "ReplayBuffer",
    "Replayed",
    "Step",
    "Watch",
    "leaves_of",
    "memory_replay",
    "memory_replay_backward",
]

Step = Callable[[Any, State], tuple[Tensor | None, State]]  # (segment, memory) → (loss, memory)
Advance = Callable[[Any, State], State]  # (segment, memory) → memory


class RandomState(NamedTuple):
    """Where the random generators of the CPU and of the accelerators in use stand."""

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


def leaves_of(state: State) -> list[Tensor]:
    """The tensors of a nested state, in order."""
    leaves: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        leaves.append(leaf)
        return leaf

    map_state(note, state)
    return leaves


class Replayed(NamedTuple):
    """What `watch` is told of a segment once it has been replayed."""

    segment: int  # 0 is the first segment; the last one is replayed first
    loss: Tensor | None  # detached; None where the step gave none
    gradient: tuple[Tensor | None, ...]  # of all losses, by each tensor of the memory it read


Watch = Callable[[Replayed], None]


def autocast_now(devices: Iterable[str]) -> Callable[[], ExitStack]:
    """A context to enter later, with mixed precision as it is set on these devices now."""
    cache = torch.is_autocast_cache_enabled()
    settings = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in sorted({"cpu", *devices})
    ]

    def enter() -> ExitStack:
        stack = ExitStack()
        for device, dtype, enabled in settings:
            stack.enter_context(torch.autocast(device, dtype, enabled, cache))
        torch.clear_autocast_cache()  # casts kept from a pass without a graph lead to no weight
        return stack

    return enter


def check_step(loss: Tensor | None, after: State, before: State) -> None:
    """`ValueError` for a loss that is no scalar, `TypeError` for a memory nested otherwise."""
    if loss is not None and loss.ndim:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; a scalar is expected")
    map_state(lambda new, old: new, after, before)


def back_propagate(ends: Iterable[tuple[Tensor, Tensor | None]]) -> bool:
    """One backward pass from several ends, each with the gradient that arrives there.

    Ends that ask for no gradient, or get none, are left out. Returns whether any was left.
    """
    open_ends = [(end, g) for end, g in ends if end.requires_grad and g is not None]
    if not open_ends:
        return False
    tensors, gradients = zip(*open_ends, strict=True)
    with torch.autocast(tensors[0].device.type, enabled=False):  # as outside of it
        torch.autograd.backward(tensors, gradients)
    return True


class ReplayBuffer:
    """Memories and random states at the borders of segments: enough to run each one again."""

    def __init__(self, step: Step, segments: Iterable[Any], memory: State) -> None:
        self.step, self.segments = step, list(segments)
        if not self.segments:
            raise ValueError("there are no segments; at least one is needed")
        self.memories = [detach_state(memory)]
        self.random: list[RandomState] = []
        self.flowed = False  # whether any gradient has
        self.autocast = autocast_now(leaf.device.type for leaf in leaves_of(memory))

    def enter(self) -> tuple[Any, State]:
        """The next segment and its memory; keeps where the random generators stand."""
        segment, memory = self.segments[len(self.random)], self.memories[-1]
        self.random.append(RandomState.now(memory, segment))
        return segment, memory

    @torch.no_grad()
    def fill(self, advance: Advance) -> None:
        """The first pass: the memory at every border, without a graph. The last needs none."""
        for _ in self.segments[:-1]:
            self.memories.append(detach_state(advance(*self.enter())))
        self.enter()

    def replay(
        self, index: int, arriving: Sequence[Tensor | None], scale: Tensor | None
    ) -> tuple[Replayed, State]:
        """Run segment `index` again with its graph, and go back through it once.

        `arriving` are the gradients at the tensors of the memory it returns (none: empty),
        `scale` the one at its loss (None: 1). Returns what `watch` sees, and that memory.
        """
        self.random[index].restore()
        memory = map_state(
            lambda t: t.detach().requires_grad_(t.is_floating_point()), self.memories[index]
        )
        with torch.enable_grad(), self.autocast():
            loss, after = self.step(self.segments[index], memory)
        check_step(loss, after, memory)
        ends = list(zip(leaves_of(after), arriving, strict=True)) if arriving else []
        if loss is not None:
            ends.append((loss, torch.ones_like(loss) if scale is None else scale))
        self.flowed |= back_propagate(ends)
        found = tuple(leaf.grad for leaf in leaves_of(memory))
        seen = Replayed(index, None if loss is None else loss.detach(), found)
        return seen, detach_state(after)

    def backward(
        self,
        arriving: Sequence[Tensor | None] = (),
        scale: Tensor | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor, State, tuple[Tensor | None, ...]]:
        """The second pass, from the last segment to the first.

        Returns the sum of losses, the last memory, and the gradients at the first one.
        """
        total, last, after = None, None, self.random[-1]
        try:
            for index in reversed(range(len(self.segments))):
                seen, memory = self.replay(index, arriving, scale)
                arriving = seen.gradient
                if last is None:
                    last, after = memory, RandomState.now(memory, self.segments[index])
                if seen.loss is not None:
                    total = seen.loss if total is None else total + seen.loss
                if watch is not None:
                    watch(seen)
        finally:
            after.restore()  # as if every segment had been run once
        if total is None:
            raise ValueError("no segment gave a loss; at least one is needed")
        if not self.flowed:
            raise RuntimeError("no loss depends on anything that requires a gradient")
        return total, last, tuple(arriving)


def memory_replay_backward(
    step: Step,
    segments: Iterable[Any],
    memory: State,
    *,
    advance: Advance | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, State]:
    """Back-propagate the sum of all segments' losses, holding the graph of one at a time.

    `step(segment, memory) → (loss, memory)` reads one segment: the loss is a scalar, or None
    where nothing is asked; memory is a tensor or a nested tuple of tensors. Gradients are
    added to `.grad`, also to that of `memory` where it, or what it was computed from, asks
    for one. `advance(segment, memory) → memory` is a cheaper way to the next memory for the
    first pass; what it draws at random must be what `step` draws first. `watch` is called
    after each segment. Returns the loss and the last memory, both detached. Algorithm 1 of
    the Memformer paper (2022).

    Raises `ValueError` where there are no segments, no loss, or one that is not a scalar,
    `TypeError` where the memory changes its nesting, and `RuntimeError` where no loss depends
    on anything that requires a gradient.
    """
    buffer = ReplayBuffer(step, segments, memory)
    buffer.fill(advance or (lambda segment, memory: step(segment, memory)[1]))
    loss, last, gradients = buffer.backward(watch=watch)
    back_propagate(zip(leaves_of(memory), gradients, strict=True))
    return loss, last


class _Replay(torch.autograd.Function):
    """Segments as one node of a graph, whose backward pass replays them."""

    @staticmethod
    def forward(ctx: Any, buffer: ReplayBuffer, *leaves: Tensor) -> tuple[Tensor, ...]:
        losses = []
        for _ in buffer.segments:
            loss, memory = buffer.step(*buffer.enter())
            buffer.memories.append(detach_state(memory))
            losses += [] if loss is None else [loss.detach()]
        if not losses:
            raise ValueError("no segment gave a loss; at least one is needed")
        ctx.buffer = buffer
        ctx.set_materialize_grads(False)
        last = leaves_of(buffer.memories[-1])
        ctx.mark_non_differentiable(*(t for t in last if not t.is_floating_point()))
        return sum(losses[1:], losses[0]), *last

    @staticmethod
    def backward(ctx: Any, scale: Tensor | None, *arriving: Tensor | None) -> Any:
        now = RandomState.now(*ctx.buffer.memories)
        try:
            return None, *ctx.buffer.backward(arriving, scale)[2], None
        finally:
            now.restore()


def memory_replay(step: Step, segments: Iterable[Any], memory: State) -> tuple[Tensor, State]:
    """The same for an ordinary loop: a loss and a memory to call `backward()` on, once or scaled.

    The first pass computes the losses too, so it costs more than `memory_replay_backward` with
    `advance`. Gradients of weights go to their `.grad` in `backward()`; `torch.autograd.grad`
    with respect to weights does not see them. Raises as `memory_replay_backward` does.
    """
    buffer = ReplayBuffer(step, segments, memory)
    anchor = torch.zeros((), requires_grad=True)  # so that backward() comes by in any case
    loss, *last = _Replay.apply(buffer, *leaves_of(memory), anchor)  # type: ignore[no-untyped-call]
    rest = iter(last)
    return loss, map_state(lambda _: next(rest), memory)
