"""Finished or stopped runs, read from their folders: to score them, and to draw from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..tasks.tokens import Tokens, tokens_from_json
from .checkpoints import (
    CheckpointError,
    check_about,
    labels_of,
    load_weights_into,
    read_checkpoint,
)
from .feeds import held_out
from .learner import MODELS, TrainingError, build_model
from .recipes import Recipe, RecipeError, changed, recipe_from
from .scores import evaluate
from .team import Team

CHECKPOINT, RECORD, MODEL, TOKENS = (
    "checkpoint.safetensors",
    "record.json",
    "model",
    "tokens.json",
)


class Loaded(NamedTuple):
    """A run's model as of its last checkpoint, ready to be evaluated."""

    model: Any
    recipe: Recipe
    step: int
    tokens: Tokens | None  # how text became ids; None for a model of anything else


def load_run(folder: str | Path, changes: Sequence[str] = (), *, cpu: bool = False) -> Loaded:
    """The model of a run's folder. `changes` are to its recipe, as in `corpus=mnist`.

    Raises `CheckpointError` where there is none, it is damaged, or its weights are not
    numbers; `RecipeError` for changes that are nonsense.
    """
    path = Path(folder) / CHECKPOINT
    tensors, about = read_checkpoint(path)
    check_about(path, about)
    recipe = recipe_from(changed(about["recipe"], changes))
    model = load_weights_into(build_model(recipe, about["vocab_size"]).eval(), tensors)
    tokens = None if about["text"] is None else read_tokens(about["text"])
    return Loaded(model.to(Team(cpu=cpu).device), recipe, about["step"], tokens)


def load_model(folder: str | Path, *, cpu: bool = False) -> tuple[Any, Tokens | None]:
    """A model to draw from: of a run's folder, or of a folder that `save_pretrained` wrote."""
    path = Path(folder)
    if (path / CHECKPOINT).is_file():
        loaded = load_run(path, cpu=cpu)
        return loaded.model, loaded.tokens
    for place in (path, path / MODEL):
        if (place / "config.json").is_file():
            return from_folder(place, cpu)
    read_checkpoint(path / CHECKPOINT)  # says what is missing
    raise CheckpointError(f"there is no checkpoint and no model in {folder}")


def from_folder(folder: Path, cpu: bool) -> tuple[Any, Tokens | None]:
    """The model that `save_pretrained` wrote, and its tokens."""
    kinds = {kind.__name__: kind for kind in MODELS.values()}
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = kinds[about["class"]]
        model = kind.from_pretrained(folder).eval().to(Team(cpu=cpu).device)
        weights = {f"model/{name}": value for name, value in model.state_dict().items()}
        load_weights_into(model, weights)  # refuses NaN
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"no model can be read from {folder}: {error}") from None
    text = folder / TOKENS
    return model, read_tokens(text.read_text(encoding="utf-8")) if text.is_file() else None


def read_tokens(text: str) -> Tokens:
    """Tokens as a run keeps them; `CheckpointError` where they are damaged."""
    try:
        return tokens_from_json(text)
    except ValueError as error:
        raise CheckpointError(f"the tokens kept with the run are damaged: {error}") from None


def score_run(
    folder: str | Path,
    changes: Sequence[str] = (),
    *,
    without: str | Path | None = None,
    cpu: bool = False,
) -> dict[str, Any]:
    """Scores of a run on held-out data, with both controls.

    `…_wiped` is the same weights, wiped at every segment. `…_trained_without` is a run with
    `memory=off` and else the same recipe: the one named by `without`, else one that lies
    beside it, if there is one. Raises what `load_run` raises, and `TrainingError` for a score
    that is not a number.
    """
    loaded = load_run(folder, changes, cpu=cpu)
    score: dict[str, Any] = {"run": str(folder), "step": loaded.step, **scores_of(loaded)}
    other = Path(without) if without is not None else find_without(folder, loaded.recipe)
    if other is None:
        return score
    opponent = load_run(other, changes, cpu=cpu)
    check_comparable(loaded.recipe, opponent.recipe, other)
    name, found = next(iter(scores_of(opponent).items()))
    return score | {f"{name}_trained_without": found, "without": str(other)}


def check_comparable(recipe: Recipe, opponent: Recipe, where: Path) -> None:
    """`RecipeError` unless the opponent was trained without memory, for the same questions."""
    if opponent.memory != "off":
        raise RecipeError(
            f"{where} was trained with memory; --without names one with memory=off"
        )
    alike = ("corpus", "tokens", "limit", "task", "batch_size", "evaluate_segments")
    apart = [key for key in alike if getattr(recipe, key) != getattr(opponent, key)]
    if recipe.segment_length != opponent.segment_length:
        apart.append("model.segment_length")
    if apart:
        raise RecipeError(
            f"{where} differs in {', '.join(apart)}, so scores are not comparable"
        )


def scores_of(loaded: Loaded) -> dict[str, float]:
    """Scores of a loaded run. Raises `RecipeError` where its model cannot read the corpus."""
    corpus = held_out(loaded.recipe, loaded.tokens)
    known = loaded.model.config.vocab_size
    if corpus is not None and corpus.vocab_size > known:
        raise RecipeError(
            f"corpus is {loaded.recipe.corpus!r} with {corpus.vocab_size} ids; the model knows "
            f"{known}"
        )
    score = evaluate(loaded.model, loaded.recipe, corpus)
    for name, value in score.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise TrainingError(f"{name} is {value}: the model's scores are not numbers")
    return score


def find_without(folder: str | Path, recipe: Recipe) -> Path | None:
    """A run beside this one that was trained without memory, and is else the same."""
    if recipe.memory == "off":
        return None
    apart = {"name", "what", "memory"}
    wanted = {key: value for key, value in asdict(recipe).items() if key not in apart}
    own = Path(folder).resolve()
    for path in sorted(own.parent.glob(f"*/{CHECKPOINT}")):
        about = about_of(path) if path.parent != own else {}
        found = about.get("recipe")
        if not isinstance(found, dict) or found.get("memory") != "off":
            continue
        if all(found.get(key) == value for key, value in wanted.items()):
            return path.parent
    return None


def about_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says about its run, read from its head alone; empty where damaged."""
    try:
        with open(path, "rb") as file:
            size = file.read(8)
            length = int.from_bytes(size, "little")
            head = size + file.read(length) if length < 2**27 else size
        found = json.loads(labels_of(head)["about"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
