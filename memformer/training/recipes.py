"""Recipes: everything that decides a run, checked before anything is computed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from ..config import MemformerConfig
from ..files import data_folder
from ..settings import (
    Count,
    Field,
    Positive,
    Share,
    check_known,
    from_mapping,
    json_schema,
    setting_names,
    settings,
)
from ..tasks.mqar import MQARTask
from ..tasks.recall import RecallTask
from ..tasks.stories import StoryTask
from ..tasks.tokens import check_tokens_name


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the setting and what is allowed."""


TASKS: dict[str, Any] = {"recall": RecallTask, "stories": StoryTask, "mqar": MQARTask}
GROWS = ("start", "threshold")  # of the curriculum of recall and stories, beside the task's own

SEED = Annotated[int, Field(ge=0, lt=2**63)]
WHOLE = Annotated[int, Field(ge=0)]


@settings(error=RecipeError)
class Recipe:
    """Everything that decides a run, and nothing that does not. Raises `RecipeError`."""

    name: str = "untitled"
    what: str = ""  # one sentence for the record
    kind: Literal["lm", "encoder-decoder"] = "lm"
    model: dict[str, Any] = field(default_factory=dict)  # of MemformerConfig
    memory: Literal["on", "off"] = "on"  # off: wiped at every segment, also in training
    corpus: str = "digits"  # what load_corpus knows, or a task: recall, stories, mqar
    tokens: str = "bytes"  # of text; or bpe:N, pieces learned from the training split
    limit: Count | None = None  # documents of the corpus; None: all
    task: dict[str, Any] = field(default_factory=dict)  # of the task's class; start, threshold
    seed: SEED = 0
    steps: Count = 1000
    batch_size: Count = 32  # streams side by side, over all devices
    horizon: Count = 8  # segments a step goes back through; tasks take whole documents
    replay: bool = True  # False: full back-propagation, for comparison
    lr: Positive = 1e-3
    warmup: WHOLE = 50  # steps
    decay: Share = 0.3  # share of steps at the end in which the rate falls to 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    clip: Positive = 1.0
    accumulate: Count = 1  # parts in which a step's streams are taken, to save memory
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    log_every: Count = 25
    evaluate_every: Count = 100
    evaluate_segments: Count = 64  # of the test split; for tasks, the number of problems
    save_every: Count = 100
    frontier: dict[str, Any] = field(
        default_factory=dict
    )  # settings → values, scored at the end

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.batch_size % self.accumulate:
            allowed = f"a multiple of accumulate, {self.accumulate}"
            raise ValueError(f"batch_size is {self.batch_size}; it must be {allowed}")
        from_mapping(MemformerConfig, self.model, within="model.", vocab_size=2**31)
        check_tokens_name(self.tokens)
        if (self.corpus in TASKS) < bool(self.task):
            there = ", ".join(map(repr, TASKS))
            raise ValueError(f"task is given, but corpus is {self.corpus!r}; tasks are {there}")
        if self.corpus in TASKS:
            check_task(self)
        check_frontier(self)

    @property
    def segment_length(self) -> int:
        """Tokens a segment."""
        length: int = self.model.get("segment_length", MemformerConfig.segment_length)
        return length


def check_name(name: str) -> None:
    """Raise unless a run's folder may be called so: letters, digits and a few signs."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+=-]{0,99}", name) or name.endswith(" "):
        short = repr(name) if len(name) <= 60 else f"{name[:57]!r}…"
        raise ValueError(
            f"name is {short}; it must be 1 to 100 letters, digits, and the signs ._+=- , the "
            "first a letter or digit"
        )


def task_of(recipe: Recipe, **changes: Any) -> Any:
    """The task of a recipe, with changes. Raises `RecipeError`."""
    kind = TASKS[recipe.corpus]
    own = {key: value for key, value in recipe.task.items() if key not in GROWS}
    try:
        return from_mapping(kind, {**own, **changes}, within="task.")
    except ValueError as error:
        raise RecipeError(str(error)) from None


def growth_of(recipe: Recipe) -> dict[str, Any]:
    """How its task grows: `start` and `threshold`, where given."""
    return {key: recipe.task[key] for key in GROWS if key in recipe.task}


def check_task(recipe: Recipe) -> None:
    """Raise `ValueError` unless a task can be made of the recipe and fits its model."""
    known = setting_names(TASKS[recipe.corpus]) + list(GROWS)
    check_known(list(recipe.task), known, RecipeError, "task.")
    needs = task_length(task_of(recipe))
    if recipe.segment_length < needs:
        raise ValueError(
            f"model.segment_length is {recipe.segment_length}; the task has segments of {needs} "
            "tokens, so it must be at least as many"
        )
    growth = growth_of(recipe)
    if growth and recipe.corpus == "mqar":
        raise ValueError("task.start is given; the task mqar does not grow")
    for key, value in growth.items():
        whole = type(value) is int if key == "start" else type(value) in (int, float)
        fine = whole and (value >= 2 if key == "start" else 0 < value < 1)
        if not fine:
            allowed = "a whole number, at least 2" if key == "start" else "between 0 and 1"
            raise ValueError(f"task.{key} is {value!r}; it must be {allowed}")


def task_length(task: Any) -> int:
    """Tokens a segment of a task."""
    found: int = task.segment_length if isinstance(task, RecallTask) else task.length
    return found


def check_frontier(recipe: Recipe) -> None:
    """Raise `ValueError` unless the frontier is settings of the task with lists of values."""
    if not recipe.frontier:
        return
    if recipe.corpus not in TASKS:
        raise ValueError(
            f"frontier is given, but corpus is {recipe.corpus!r}, which is no task"
        )
    for key, values in recipe.frontier.items():
        if key == "trials":
            if type(values) is not int or values < 1:
                raise ValueError(f"frontier.trials is {values!r}; it must be at least 1")
        elif not isinstance(values, list) or not values:
            raise ValueError(f"frontier.{key} is {values!r}; it must be a list of values")
    for changes in frontier_places(recipe):
        task = task_of(recipe, **changes)
        if task_length(task) > recipe.segment_length:
            raise ValueError(
                f"frontier asks for segments of {task_length(task)} tokens; model.segment_length"
                f" is {recipe.segment_length}"
            )


def frontier_places(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Every combination of the frontier's values, the last setting running fastest."""
    axes = {key: values for key, values in recipe.frontier.items() if key != "trials"}
    for chosen in product(*axes.values()):
        yield dict(zip(axes, chosen, strict=True))


# --- files and changes ----------------------------------------------------------------------


def recipe_from(mapping: dict[str, Any]) -> Recipe:
    """A recipe from a mapping; `RecipeError` for a setting that does not exist."""
    return from_mapping(Recipe, mapping)


def preset_names() -> list[str]:
    """The recipes that come with the package, sweeps among them."""
    folder = data_folder() / "recipes"
    return sorted(path.stem for path in folder.glob("*.json") if path.stem != "schema")


def changed(mapping: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Settings with `key=value` changes; a key may have a dot, a value is JSON or else text."""
    result: dict[str, Any] = json.loads(json.dumps(mapping))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise RecipeError(f"{change!r} is no change; write key=value")
        put(result, key, read_value(value))
    return result


def put(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Set one value in place; a key may have one dot, as in `model.dim`."""
    section, dot, inner = key.partition(".")
    if not section or (dot and not inner) or "." in inner:
        raise RecipeError(f"{key!r} names no setting; write lr, or model.dim")
    inside = mapping.setdefault(section, {}) if dot else mapping
    if not isinstance(inside, dict):
        raise RecipeError(f"{section} has no settings inside, so {key!r} cannot be set")
    inside[inner or section] = value


def read_value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def load_recipe(source: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a JSON file, or the preset of that name, with `key=value` changes.

    A key may have a dot, as in `model.dim=128`; a value is read as JSON, else as text. Raises
    `RecipeError` for a file or setting that is not there, and for nonsense.
    """
    found = read_recipe(source)
    if {"variants", "grid", "seeds"} & set(found):
        raise RecipeError(f"{source} holds many runs; start it with: memformer sweep {source}")
    return recipe_from(changed(found, changes))


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The settings in a recipe's file or preset, with a name; `RecipeError` where there is none."""
    known = ", ".join(preset_names())
    try:
        path = Path(source)
        if not path.is_file():
            named = Path(source).name == str(source)  # a preset, not a path into somewhere
            path = data_folder() / "recipes" / f"{source}.json" if named else path
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{source} is not JSON: it is no UTF-8 text") from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        short = str(source)[:100]
        raise RecipeError(f"no recipe {short!r}: no file, and none of {known}") from None
    try:
        found = json.loads(text)
    except RecursionError:
        raise RecipeError(f"{path} is not a recipe: it is nested too deeply") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise RecipeError(f"{path} holds a {kind}, not an object of settings")
    found.pop("$schema", None)
    name = re.sub(r"[^A-Za-z0-9._+=-]+", "-", path.stem).strip("-.") or "untitled"
    return {"name": name[:100], **found}


# --- for editors ----------------------------------------------------------------------------


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes and sweeps, kept in data/recipes/schema.json."""
    schema = json_schema(Recipe)
    fields: dict[str, Any] = schema["properties"]
    fields["$schema"] = {"type": "string"}
    model = json_schema(MemformerConfig)
    model["properties"].pop("vocab_size")
    fields["model"] = inline(model) | {"required": []}
    grows = {"start": {"type": "integer"}, "threshold": {"type": "number"}}
    tasks = [inline(json_schema(kind)) for kind in TASKS.values()]
    for task in tasks:
        task["properties"] |= grows
    fields["task"] = {"anyOf": [{"type": "object", "maxProperties": 0}, *tasks]}
    fields["variants"] = {"type": "object", "additionalProperties": {"type": "object"}}
    fields["grid"] = {"type": "object", "additionalProperties": {"type": "array"}}
    fields["seeds"] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without the parts that only say what it is called."""
    return {key: value for key, value in schema.items() if key not in ("title", "description")}
