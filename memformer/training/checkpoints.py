"""Checkpoints: a run at one moment in one file, and every doubt about a file put into words."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..files import replace_file
from ..segments import leaves_of, map_state
from .learner import Learner
from .recipes import Recipe, recipe_from

FORMAT = "memformer checkpoint, version 2"
FREE = {"what", "steps", "evaluate_every", "evaluate_segments", "save_every", "frontier"}
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or followed; the message says why."""


# --- the file -------------------------------------------------------------------------------


def digest_of(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 over names, shapes, bytes and the JSON beside them."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Tensors and JSON in one safetensors file, so that they can never be of two moments.

    Raises `FileError` where it cannot be written.
    """
    text = json.dumps(about)
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    labels = {"format": FORMAT, "about": text, "sha256": digest_of(packed, text)}
    replace_file(path, save(packed, labels))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checkpoint` wrote; `CheckpointError` for all else, saying what is wrong."""
    try:
        there = path.is_file()
        content = path.read_bytes() if there else b""  # at once: it may be replaced meanwhile
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None
    if not there:
        hint = model_folder_hint(path.parent)
        raise CheckpointError(f"there is no checkpoint at {path}{hint}")
    try:
        tensors = load(content)
        labels = labels_of(content)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None
    if (found := labels.get("format", "no format")) != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT!r}: it says {found!r}")
    text = labels.get("about")
    if not isinstance(text, str) or digest_of(tensors, text) != labels.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its contents do not match its own digest")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no JSON about its run: {error}") from None
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} holds a {type(about).__name__} about its run, no object")
    return tensors, about


def labels_of(content: bytes) -> dict[str, Any]:
    """The texts in the head of a safetensors file. Raises `ValueError` where there are none."""
    head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    labels = head.get("__metadata__") if isinstance(head, dict) else None
    return labels if isinstance(labels, dict) else {}


def model_folder_hint(folder: Path) -> str:
    """What to say where a folder holds a model and no run."""
    if (folder / "config.json").is_file():
        return "; the folder holds a model, without the run that made it"
    return ""


# --- what is in it --------------------------------------------------------------------------

ABOUT: dict[str, tuple[type, ...]] = {
    "recipe": (dict,),
    "vocab_size": (int,),
    "digest": (str,),
    "position": (dict,),
    "scaler": (dict,),
    "log": (list,),
    "step": (int,),
    "tokens": (int,),
    "seconds": (int, float),
    "text": (str, type(None)),  # how text became ids
}


def check_about(path: Path, about: dict[str, Any]) -> Recipe:
    """The recipe in a checkpoint; `CheckpointError` unless all that belongs to a run is there."""
    for name, kinds in ABOUT.items():
        if name not in about:
            raise CheckpointError(f"{path} is no checkpoint of a run: {name!r} is missing")
        value = about[name]
        wrong = not isinstance(value, kinds) or isinstance(value, bool)
        if wrong or (isinstance(value, int | float) and not 0 <= value < 2**63):
            raise CheckpointError(f"{path} is no checkpoint of a run: {name} is {value!r:.80}")
    if not all(isinstance(row, dict) and "step" in row for row in about["log"]):
        raise CheckpointError(f"{path} is no checkpoint of a run: its log has broken rows")
    if any(type(v) is not int or v < 0 for k, v in about["position"].items() if k != "formed"):
        raise CheckpointError(f"{path} is no checkpoint of a run: its position is broken")
    try:
        return recipe_from(about["recipe"])
    except ValueError as error:
        raise CheckpointError(f"{path} holds a recipe that is none: {error}") from None


def pack_learner(learner: Learner) -> dict[str, Tensor]:
    """Weights, moments, memories and random states, the last two of all processes."""
    team, device = learner.team, learner.team.device
    tensors = {f"model/{k}": v for k, v in learner.model.state_dict().items()}
    for number, moments in learner.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{number}/{name}": value for name, value in moments.items()}
    for number, leaf in enumerate(leaves_of(learner.state)):
        tensors[f"memory/{number}"] = team.collect(leaf)
    tensors["random/cpu"] = team.collect(torch.get_rng_state()[None].to(device))
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        tensors["random/cuda"] = team.collect(state[None].to(device))
    return tensors


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_weights_into(model: Any, tensors: dict[str, Tensor]) -> Any:
    """The model with the weights of a checkpoint; `CheckpointError` where they do not fit."""
    weights = under("model/", tensors)
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"the weights hold NaN or infinity (first in {name}); the run overflowed. Go "
                "back to an earlier checkpoint, or train again with a lower lr"
            )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit the recipe's model: {error}") from None
    return model


def check_same_run(recipe: Recipe, digest: str, about: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless the checkpoint is of this recipe and this data."""
    now, then = asdict(recipe), about["recipe"]
    changes = [key for key in now if key not in FREE and now[key] != then.get(key)]
    if changes:
        was = ", ".join(f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in changes)
        rest = f"in another folder; only {', '.join(sorted(FREE))} may change"
        raise CheckpointError(
            f"the checkpoint is of another recipe: {was}. Begin a new run {rest}"
        )
    if digest != about["digest"]:
        data = f"other data under the name {recipe.corpus!r}"
        raise CheckpointError(f"the checkpoint was trained on {data}: their digests differ")


def unpack_learner(learner: Learner, tensors: dict[str, Tensor], step: int) -> None:
    """Put back what `pack_learner` took; `CheckpointError` where it does not fit."""
    team = learner.team
    randoms = tensors.get("random/cpu", torch.zeros(0))
    if len(randoms) != team.size:
        there = f"of {len(randoms)} processes and this run has {team.size}"
        raise CheckpointError(f"the checkpoint is {there}; start as many")
    load_weights_into(learner.model, tensors)
    load_moments_into(learner, tensors, step)
    rows = team.rows(learner.recipe.batch_size)
    memory = (tensors.get(f"memory/{number}") for number in itertools.count())

    def put_back(leaf: Tensor) -> Tensor:
        saved = next(memory)
        if saved is None or saved[rows].shape != leaf.shape or saved.dtype != leaf.dtype:
            raise CheckpointError("the memory in the checkpoint does not fit the model")
        return saved[rows].to(leaf.device)

    learner.state = map_state(put_back, learner.state)
    try:
        torch.set_rng_state(randoms[team.rank])
        if team.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"][team.rank], team.device)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint holds no random state: {error}") from None


def load_moments_into(learner: Learner, tensors: dict[str, Tensor], step: int) -> None:
    """Put back the optimiser's moments; `CheckpointError` unless every one is there."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in under("optimiser/", tensors).items():
        number, _, name = key.partition("/")
        if not number.isdecimal():
            raise CheckpointError(f"the optimiser's state has a strange name: {key!r:.80}")
        moments.setdefault(int(number), {})[name] = tensor
    weights = [w for group in learner.optimiser.param_groups for w in group["params"]]
    for place, weight in enumerate(weights):
        found = moments.get(place, {})
        if step and found.keys() != MOMENTS:
            raise CheckpointError(f"the optimiser's moments of weight {place} are missing")
        if any(found[m].shape != weight.shape for m in ("exp_avg", "exp_avg_sq") if m in found):
            raise CheckpointError(f"the optimiser's moments of weight {place} do not fit it")
    learner.optimiser.load_state_dict({**learner.optimiser.state_dict(), "state": moments})
