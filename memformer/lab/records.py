"""Records of finished runs and the weights that belong to them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from memformer.files import data_folder, replace_file


def record_names() -> list[str]:
    """The names of all records, sorted."""
    return sorted(path.stem for path in (data_folder() / "runs").glob("*.json"))


def load_record(name: str) -> dict[str, Any]:
    """The record of one run. Raises `FileNotFoundError` that lists the names there are."""
    path = data_folder() / "runs" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no record {name!r}; there are {', '.join(record_names())}")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def load_weights(name: str) -> dict[str, Tensor]:
    """The trained weights of one run, on the CPU, for `load_state_dict`."""
    path = data_folder() / "weights" / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no weights for {name!r} in {path.parent.name}/")
    return load_file(path)


def save_record(
    folder: Path, name: str, record: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> None:
    """Write `runs/NAME.json`, and `weights/NAME.safetensors` if given, under `folder`."""
    files = {folder / "runs" / f"{name}.json": (json.dumps(record) + "\n").encode()}
    if weights is not None:
        packed = {key: value.contiguous() for key, value in weights.items()}
        files[folder / "weights" / f"{name}.safetensors"] = save(packed)
    for path, content in files.items():  # all that can fail in memory has not failed
        replace_file(path, content)


def describe_machine() -> dict[str, Any]:
    """What a record says of where it ran: device, threads, versions, commit of the code."""
    cuda = torch.cuda.is_available()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "none",
    }
