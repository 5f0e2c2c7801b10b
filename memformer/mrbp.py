"""Memory replay back-propagation: exact gradients through any number of segments, with the graph of one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .again import MixedPrecision, RandomState, check_agreement, differentiable, disagreement
from .segments import State, detach_state, leaves_of, map_state


def as_leaves(state: State) -> State:
    """The same values where a new graph may begin.

    Numbers ask for a gradient. Integers and flags are copied, so that a step that counts in
    place leaves the original alone.
    """

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_() if differentiable(t) else t.clone()

    return map_state(leaf, state)


Step = Callable[[Any, State], tuple[Tensor | None, State]]  # (segment, memory) → (loss, memory)
Advance = Callable[[Any, State], State]  # (segment, memory) → memory


class Border(NamedTuple):
    """What the first pass keeps where a segment begins: enough to run the segment again."""

    segment: Any
    memory: State  # without a graph
    random: RandomState


class Replayed(NamedTuple):
    """What `watch` is told of a segment once it has been replayed."""

    segment: int  # 0 is the first segment; the last one is replayed first
    loss: Tensor | None  # detached; None where the step gave none
    gradient: tuple[Tensor | None, ...]  # of all losses, by each tensor of the memory it read


Watch = Callable[[Replayed], None]


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


def back_propagate(ends: Iterable[tuple[Tensor, Tensor | None]]) -> bool:
    """One backward pass from several ends, each with the gradient that arrives there.

    Ends that ask for no gradient, or get none, are left out. Returns whether any was left.
    """
    open_ends = [(end, g) for end, g in ends if end.requires_grad and g is not None]
    if not open_ends:
        return False
    tensors, gradients = zip(*open_ends, strict=True)
    with torch.autocast(tensors[0].device.type, enabled=False):  # it is for forward passes
        torch.autograd.backward(tensors, gradients)
    return True


class ReplayBuffer:
    """What is known at the borders of segments, and how to go back through one of them."""

    def __init__(self, step: Step, memory: State) -> None:
        self.step, self.borders = step, list[Border]()
        self.flowed = False  # whether any gradient has
        self.mixed = MixedPrecision.now(leaf.device.type for leaf in leaves_of(memory))

    def enter(self, segment: Any, memory: State) -> State:
        """Keep what it takes to run this segment again; returns the memory to run it with."""
        random = RandomState.now(memory, segment)
        self.borders.append(Border(segment, detach_state(memory), random))
        return as_leaves(memory)

    def replay(
        self, border: Border, arriving: Sequence[Tensor | None], scale: Tensor | None
    ) -> tuple[Tensor | None, State, tuple[Tensor | None, ...]]:
        """Run one segment again with its graph, and go back through it once.

        `arriving` are the gradients at the tensors of the memory it returns (none: empty),
        `scale` the one at its loss. Returns that loss and memory, both detached, and the
        gradients at the tensors of the memory it read.
        """
        border.random.restore()
        memory = as_leaves(border.memory)
        with torch.enable_grad(), self.mixed.enter():
            loss, after = self.step(border.segment, memory)
        check_step(loss, after, memory)
        ends = list(zip(leaves_of(after), arriving, strict=True)) if arriving else []
        if loss is not None:
            ends.append((loss, None if scale is None else scale.to(loss)))
        self.flowed |= back_propagate(ends)
        gradient = tuple(leaf.grad for leaf in leaves_of(memory))
        return None if loss is None else loss.detach(), detach_state(after), gradient


def go_back(
    buffer: ReplayBuffer,
    arriving: Sequence[Tensor | None],
    scale: Tensor | None,
    watch: Watch | None = None,
) -> tuple[Tensor, State, tuple[Tensor | None, ...]]:
    """The second pass, from the last segment to the first.

    `arriving` and `scale` are those of the last segment, as for `ReplayBuffer.replay`. Returns
    the sum of losses, the last memory, and the gradients at the first one. Raises what
    `memory_replay_backward` raises.
    """
    total, last, next_one, afterwards = None, None, None, buffer.borders[-1].random
    worst = []
    try:
        for index, border in reversed(list(enumerate(buffer.borders))):
            loss, memory, arriving = buffer.replay(border, arriving, scale)
            if next_one is None:
                last, afterwards = memory, RandomState.now(memory, border.segment)
            else:
                worst.append(disagreement(memory, next_one.memory, buffer.mixed.enabled))
            if loss is not None:
                total = loss if total is None else total + loss
            if watch is not None:
                watch(Replayed(index, loss, tuple(arriving)))
            next_one = border
    finally:
        afterwards.restore()  # as if every segment had been run once
    if total is None:
        raise ValueError("no segment gave a loss; at least one is needed")
    if not buffer.flowed:
        raise RuntimeError("no loss depends on anything that requires a gradient")
    check_agreement(worst)
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
    after each segment, the last one first. Returns the loss and the last memory, both
    detached. Algorithm 1 of the Memformer paper (2022).

    Raises `ValueError` where there are no segments, no loss, or one that is not a scalar,
    `TypeError` where the memory changes its nesting, and `RuntimeError` where nothing asks for
    a gradient or the two passes disagree.
    """
    *early, final = check_segments(segments)
    advance = advance or (lambda segment, memory: step(segment, memory)[1])
    buffer, now = ReplayBuffer(step, memory), memory
    with torch.no_grad():
        for segment in early:
            after = advance(segment, buffer.enter(segment, now))
            check_step(None, after, now)
            now = after
        buffer.enter(final, now)  # the last one is run only once, in the second pass
    loss, last, gradients = go_back(buffer, (), torch.ones(()), watch)
    back_propagate(zip(leaves_of(memory), gradients, strict=True))
    return loss, last


class _Replay(torch.autograd.Function):
    """Segments that have been run, as one node of a graph; its backward pass replays them."""

    @staticmethod
    def forward(
        ctx: Any, buffer: ReplayBuffer, outputs: Sequence[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.buffer = buffer
        ctx.set_materialize_grads(False)  # None for an output that nobody used
        ctx.mark_non_differentiable(*(t for t in outputs if not differentiable(t)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, scale: Tensor | None, *arriving: Tensor | None) -> Any:
        now = RandomState.now(*leaves_of(ctx.buffer.borders[-1].memory))
        try:
            return None, None, *go_back(ctx.buffer, arriving, scale)[2], None
        finally:
            now.restore()


def memory_replay(step: Step, segments: Iterable[Any], memory: State) -> tuple[Tensor, State]:
    """The same for an ordinary loop: a loss and a memory for `backward()` to come back to.

    Both may be used in further computation: scaled, added to, read by another model. The first
    pass computes losses too, so it costs more than `memory_replay_backward` with `advance`.
    Weights get their gradients in `.grad` during `backward()`; `torch.autograd.grad` with
    respect to weights does not see them. Raises as `memory_replay_backward` does, the
    `RuntimeError` in `backward()`.
    """
    buffer, now = ReplayBuffer(step, memory), memory
    total: Tensor | None = None
    with torch.no_grad():
        for segment in check_segments(segments):
            loss, after = step(segment, buffer.enter(segment, now))
            check_step(loss, after, now)
            now = after
            if loss is not None:
                total = loss if total is None else total + loss
    if total is None:
        raise ValueError("no segment gave a loss; at least one is needed")
    anchor = torch.zeros((), requires_grad=True)  # so that backward() comes by in any case
    outputs = [total.detach(), *leaves_of(detach_state(now))]
    loss, *last = _Replay.apply(buffer, outputs, *leaves_of(memory), anchor)  # type: ignore[no-untyped-call]
    rest = iter(last)
    return loss, map_state(lambda _: next(rest), now)
