"""A step: exact gradients by replay, in parts, in mixed precision, over a team, and the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import MemoryOverflowError
from ..config import MemformerConfig
from ..model import Memformer, MemformerLM
from ..mrbp import Watch, memory_replay_backward
from ..segments import IGNORE, Segment, State, begin_segment, detach_state, map_state
from ..settings import from_mapping
from .optimiser import make_optimiser
from .recipes import Recipe, RecipeError
from .team import Team

MODELS: dict[str, Any] = {"lm": MemformerLM, "encoder-decoder": Memformer}
LARGEST = 2**37  # bytes of weights; more is a slip of the finger


class TrainingError(RuntimeError):
    """A run that makes no sense any more; the last checkpoint is from before."""


def build_model(recipe: Recipe, vocab_size: int) -> Any:
    """The recipe's model with weights drawn from its seed; `RecipeError` where it cannot be."""
    try:
        config = from_mapping(
            MemformerConfig, recipe.model, within="model.", vocab_size=vocab_size
        )
    except ValueError as error:
        raise RecipeError(str(error)) from None
    check_size(config)
    torch.manual_seed(recipe.seed)
    try:
        return MODELS[recipe.kind](config)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise RecipeError(f"model: {error}") from None


def check_size(config: MemformerConfig) -> None:
    """`RecipeError` for a model that no machine could hold, before it is tried."""
    layers = config.encoder_layers + config.decoder_layers
    wide = config.ffn_dim or 4 * config.dim
    weights = layers * config.dim * (8 * config.dim + 2 * wide + 100)
    weights += config.dim * (2 * config.vocab_size + config.num_slots)
    if 4 * weights > LARGEST:
        raise RecipeError(
            f"model: weights of about {4 * weights / 2**30:,.0f} GiB; lower model.dim "
            f"({config.dim}), model.ffn_dim ({wide}) or the number of layers ({layers})"
        )


class Ready(NamedTuple):
    """A segment on its device. What the CPU knows in advance, no device has to be asked."""

    tokens: Tensor  # (B, L)
    targets: Tensor | None  # (B, L); None where nothing is asked
    mask: Tensor | None  # (B, L); None where nothing is padded
    reset: Tensor | None  # (B,); None where no document begins

    @classmethod
    def of(cls, segment: Segment, rows: slice, device: torch.device) -> Ready:
        """Some rows of a segment that is on the CPU."""
        tokens, targets, mask, reset = (part[rows] for part in segment)

        def put(part: Tensor, needed: bool) -> Any:
            return part.to(device, non_blocking=True) if needed else None

        asks, padded = bool((targets != IGNORE).any()), not bool(mask.all())
        begins = put(reset, bool(reset.any()))
        return cls(put(tokens, True), put(targets, asks), put(mask, padded), begins)


def check_finite(loss: float, norm: float, recipe: Recipe) -> None:
    """`TrainingError` unless loss and gradient are numbers; float16 may overflow and go on."""
    if not math.isfinite(loss) or (recipe.precision != "float16" and not math.isfinite(norm)):
        advice = f"begin again with a lower lr ({recipe.lr}) or clip ({recipe.clip})"
        message = f"the loss is {loss} and the length of its gradient {norm}; {advice}"
        raise TrainingError(f"{message}. The last checkpoint is from before")


def gradient_of(weight: Tensor) -> Tensor:
    """Its gradient, zeros where none has arrived: every process must bring the same."""
    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return weight.grad


class Learner:
    """A model, its optimiser, and the memory of its streams: what a step changes."""

    def __init__(self, model: Any, recipe: Recipe, team: Team) -> None:
        parts = team.size * recipe.accumulate
        if recipe.batch_size % parts:
            allowed = f"a multiple of {parts}, the processes times accumulate"
            raise RecipeError(f"batch_size is {recipe.batch_size}; it must be {allowed}")
        self.model, self.recipe, self.team = model.to(team.device), recipe, team
        if recipe.compile:  # the parts, which both passes of replay go through
            for part in self.model.children():
                part.compile()
        self.optimiser = make_optimiser(model, recipe)
        half = recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=half)
        own = recipe.batch_size // team.size
        self.state: State = detach_state(self.model.initial_state(own))

    def precision(self) -> Any:
        """Mixed precision as the recipe has it."""
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.team.device.type, getattr(torch, self.recipe.precision))

    def advance(self, segment: Ready, state: State) -> State:
        """The memory after a segment, where nothing is asked."""
        with self.precision():
            return self.model.advance(*begin_segment(self.model, segment, state))

    def step(self, segment: Ready, state: State, targets: int) -> tuple[Tensor | None, State]:
        """The loss of one segment as its share of `targets`, scaled, and the next memory."""
        if segment.targets is None:
            return None, self.advance(segment, state)
        with self.precision():
            logits, state = self.model(*begin_segment(self.model, segment, state))
            flat = logits.flatten(0, 1), segment.targets.flatten()
            loss = nn.functional.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")
        return self.scaler.scale(loss / targets), state

    def learn(
        self, segments: Sequence[Ready], state: State, targets: int, watch: Watch
    ) -> tuple[Tensor, State]:
        """Add the gradients of the loss summed over tokens and divided by `targets`."""

        def step(segment: Ready, state: State) -> tuple[Tensor | None, State]:
            return self.step(segment, state, targets)

        if all(segment.targets is None for segment in segments):
            with torch.no_grad():
                for segment in segments:
                    state = self.advance(segment, state)
            return torch.zeros((), device=self.team.device), state
        if self.recipe.memory == "off":
            loss, state = self.learn_apart(segments, state, targets)
        elif self.recipe.replay:
            loss, state = memory_replay_backward(
                step, segments, state, advance=self.advance, watch=watch
            )
        else:
            losses = []
            for segment in segments:
                part, state = step(segment, state)
                losses += [] if part is None else [part]
            loss = torch.stack(losses).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() / self.scaler.get_scale(), detach_state(state)

    def learn_apart(
        self, segments: Sequence[Ready], state: State, targets: int
    ) -> tuple[Tensor, State]:
        """The same for a memory that is wiped at every segment: each stands for itself."""
        losses = []
        for segment in segments:
            if segment.targets is None:
                continue
            loss, state = self.step(segment, state, targets)
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            state = detach_state(state)
        return torch.stack(losses).sum(), state

    def add_gradients(self, segments: Sequence[Segment], watch: Watch) -> Tensor:
        """Add to `.grad` what this process brings to a step; returns its share of the loss."""
        recipe, team, parts = self.recipe, self.team, self.recipe.accumulate
        if recipe.memory == "off":
            segments = [s._replace(reset=torch.ones_like(s.reset)) for s in segments]
        targets = sum(int((segment.targets != IGNORE).sum()) for segment in segments)
        losses, states = [], []
        for part in range(parts):
            rows = team.rows(recipe.batch_size, part, parts)
            ready = [Ready.of(segment, rows, team.device) for segment in segments]
            own = map_state(lambda t, part=part: t.chunk(parts)[part], self.state)
            try:
                loss, state = self.learn(ready, own, targets, watch)
            except MemoryOverflowError:  # so the loss would be
                check_finite(math.nan, math.nan, recipe)
                raise
            losses.append(loss)
            states.append(state)
        self.state = map_state(lambda *t: torch.cat(t), *states)
        return torch.stack(losses).sum()

    def update(self, segments: Sequence[Segment], rate: float, watch: Watch) -> float:
        """Change the weights by the mean loss of all targets in the segments; returns it."""
        loss, weights = self.add_gradients(segments, watch), list(self.model.parameters())
        if self.team.size > 1:  # a process whose streams have ended brings zeros
            loss = self.team.share([gradient_of(weight) for weight in weights], loss)
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(weights, self.recipe.clip)
        check_finite(float(loss), float(norm), self.recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        return float(loss)
