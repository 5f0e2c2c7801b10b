"""Sweeps: many runs from one recipe, one record of all of them, resumable run by run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..files import holding, replace_file
from ..forgetting import BiasedMemoryNorm
from ..lab.records import describe_machine
from .recipes import Recipe, RecipeError, changed, put, read_recipe, recipe_from
from .runs import CHECKPOINT
from .trainer import Trainer, record_of

OWN = ("variants", "grid", "seeds")


class Member(NamedTuple):
    """One run of a sweep."""

    variant: str
    settings: dict[str, Any]  # of the grid
    recipe: Recipe

    @property
    def label(self) -> str:
        """What names its row and its folder."""
        chosen = [f"{key}={value}" for key, value in self.settings.items()]
        return ", ".join([self.variant, *chosen, f"seed={self.recipe.seed}"])


class Sweep(NamedTuple):
    """A recipe with `variants` (name → changes), a `grid` (setting → values) and `seeds`."""

    name: str
    mapping: dict[str, Any]
    members: list[Member]


def load_sweep(source: str | Path, changes: Sequence[str] = ()) -> Sweep:
    """The sweep in a JSON file or preset, every run of it checked. Raises `RecipeError`.

    Variants are changes as in `--set`, keyed by their names: {"one head": {"model.writer_heads":
    1}} or nested, {"one head": {"model": {"writer_heads": 1}}}. Each variant is run for every
    combination of the grid and every seed.
    """
    mapping = changed(read_recipe(source), changes)
    variants = mapping.get("variants", {"": {}})
    grid, seeds = mapping.get("grid", {}), mapping.get("seeds", [mapping.get("seed", 0)])
    fine = isinstance(variants, dict) and all(isinstance(v, dict) for v in variants.values())
    if not fine or not variants:
        raise RecipeError("variants must be a mapping of names to changes")
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise RecipeError("grid must be a mapping of settings to lists of values")
    if not isinstance(seeds, list) or not seeds:
        raise RecipeError("seeds must be a list of whole numbers")
    base = {key: value for key, value in mapping.items() if key not in OWN}
    members = []
    for (variant, change), *values, seed in product(variants.items(), *grid.values(), seeds):
        chosen = dict(zip(grid, values, strict=True))
        found = json.loads(json.dumps(base)) | {"seed": seed}
        for key, value in flat({**change, **chosen}).items():
            put(found, key, value)
        try:
            members.append(Member(variant, chosen, recipe_from(found)))
        except RecipeError as error:
            raise RecipeError(f"in variant {variant!r}: {error}") from None
    return Sweep(str(base["name"]), mapping, members)


def flat(change: dict[str, Any]) -> dict[str, Any]:
    """Nested changes as ones with dots: {"model": {"dim": 8}} → {"model.dim": 8}."""
    found: dict[str, Any] = {}
    for key, value in change.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": own for inner, own in value.items()}
        else:
            found[key] = value
    return found


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    folder: str | Path,
    *,
    cpu: bool = False,
    tell: Callable[[str], None] | None = None,
) -> bool:
    """Run what is not done yet; whether all is. The record in `out` is written after each run.

    Called again with the same sweep it goes on, inside a run too: runs keep their checkpoints
    under `folder`. Raises `RecipeError` where `out` is the record of something else.
    """
    out, folder = Path(out), Path(folder)
    with holding(folder):
        record = begin_record(sweep, out)
        replace_file(out, (json.dumps(record) + "\n").encode())  # proven before any work
        done = {row["label"] for row in record["results"]}
        for member in sweep.members:
            if member.label in done:
                continue
            row = run_member(member, folder, cpu, tell)
            if row is None:
                return False
            record["results"].append(row)
            record["seconds"] = round(record["seconds"] + row["seconds"], 1)
            replace_file(out, (json.dumps(record) + "\n").encode())
    return True


def begin_record(sweep: Sweep, out: Path) -> dict[str, Any]:
    """The record as it stands: what is in `out`, or an empty one."""
    if not out.is_file():
        return {
            "what": sweep.mapping.get("what", ""),
            "recipe": sweep.mapping,
            "seed": sorted({member.recipe.seed for member in sweep.members}),
            "machine": describe_machine(),
            "seconds": 0.0,
            "results": [],
        }
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
        same = found["recipe"] == json.loads(json.dumps(sweep.mapping))
        labels = [row["label"] for row in found["results"]]
        found["seconds"] += 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise RecipeError(f"{out} is no record of a sweep; choose another --out") from None
    if not same or not set(labels) <= {member.label for member in sweep.members}:
        raise RecipeError(f"{out} is the record of another sweep; choose another --out")
    return dict(found)


def run_member(
    member: Member, folder: Path, cpu: bool, tell: Callable[[str], None] | None
) -> dict[str, Any] | None:
    """Train one run to its end and say in a row how it went; None where a signal stopped it."""
    own = folder / folder_name(member.label)
    trainer = Trainer(member.recipe, own, cpu=cpu)
    if (own / CHECKPOINT).is_file():
        trainer.resume()
    if tell is not None:
        tell(member.label)
    if not trainer.run():
        return None
    record = record_of(trainer)
    norms = [m for m in trainer.learner.model.modules() if isinstance(m, BiasedMemoryNorm)]
    length = norms[0].strength * norms[0].bias.detach().norm(dim=-1).mean()
    row = {"label": member.label, "variant": member.variant, "seed": member.recipe.seed}
    row |= {"settings": member.settings, "score": record["score"]}
    row["curve"] = record.get("curve", {}).get("rows") or [
        [line["step"], line["seconds"], line["loss"], line.get("bits")] for line in trainer.log
    ]
    if "frontier" in record:
        row |= {key: record["frontier"][key] for key in ("accuracy", "wiped")}
    return row | {"length_of_v": round(float(length), 4), "seconds": record["seconds"]}


def folder_name(label: str) -> str:
    """A label as the name of a folder, never a path, and no two labels with the same one."""
    plain = "".join(sign if sign.isalnum() or sign in "=._-" else "_" for sign in label)
    return f"{plain.strip('._')[:60]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
