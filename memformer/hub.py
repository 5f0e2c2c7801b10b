"""Saving and loading models: Hugging Face's interface, strict about what it loads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch.utils._pytree import _register_namedtuple

from .config import MemformerConfig
from .settings import from_mapping

WEIGHTS, CONFIG = "model.safetensors", "config.json"


T = TypeVar("T")


def portable(state_class: type[T]) -> type[T]:
    """Decorate a `NamedTuple` of tensors: `torch.export.save` and `torch.load` then know it.

    `torch.load` reads with `weights_only=True` only what was named before.
    """
    _register_namedtuple(state_class, serialized_type_name=f"memformer.{state_class.__name__}")
    torch.serialization.add_safe_globals([state_class])
    return state_class


class Pretrained(PyTorchModelHubMixin):
    """`save_pretrained`, `push_to_hub` and `from_pretrained`, where every weight finds its place.

    The library's own loader leaves weights that are missing as they were drawn, and ignores
    settings that it does not know. Here the saved config names its class, and anything that
    does not fit raises `ValueError`. For classes that are built from a config and keep it.
    """

    config_class: ClassVar[type] = MemformerConfig
    config: Any

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        about = {"class": type(self).__name__, **asdict(self.config)}
        (save_directory / CONFIG).write_text(json.dumps(about, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        strict: bool = True,
        map_location: str = "cpu",
        **download: Any,
    ) -> Any:
        """The model in a folder, of a finished run, or on the hub, in eval mode.

        Not `strict`, weights may be missing or left over. `download` holds what
        `hf_hub_download` takes: `revision`, `token`, `cache_dir`, `local_files_only` …

        Raises `FileNotFoundError` for a folder that is not there or holds no model, and
        `ValueError` for a model of another class, unknown settings, or weights that do not fit.
        """
        name = pretrained_model_name_or_path
        folder = local_folder(name)
        config, weights = (
            from_hub(str(name), part, download) if folder is None else folder / part
            for part in (CONFIG, WEIGHTS)
        )
        model = cls(read_config(cls, config))
        load_weights(model, weights, strict, map_location)
        return model.eval()  # type: ignore[attr-defined]


def local_folder(name: str | Path) -> Path | None:
    """The folder that holds a model, or None for what can only be an id on the hub.

    Raises `FileNotFoundError` for a folder without a model, and for a name that is neither.
    """
    place, plain = Path(name).expanduser(), isinstance(name, str)
    for folder in (place, place / "model"):  # a run keeps its model beside its checkpoint
        if (folder / CONFIG).is_file():
            return folder
    if place.is_dir():
        raise FileNotFoundError(
            f"{place} holds no model: there is no {CONFIG} in it, nor in {place / 'model'}. "
            "A run writes its model when it has finished"
        )
    parts = str(name).split("/")
    if not plain or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~", "runs"):
        raise FileNotFoundError(
            f"there is no folder {place}, and it is no id on the hub, owner/name. A run keeps "
            "its model in runs/NAME/model"
        )
    return None


def from_hub(name: str, part: str, download: dict[str, Any]) -> Path:
    """A file of a model on the hub; `FileNotFoundError` where it cannot be had."""
    try:
        return Path(hf_hub_download(name, part, **download))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub does not give {part} of {name}: {reason}"
        ) from error


def read_config(cls: type[Pretrained], path: Path) -> Any:
    """The config of a saved model; `ValueError` for another class's, and unknown settings."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds a {type(about).__name__}; settings are expected")
    found = about.pop("class", cls.__name__)
    if found != cls.__name__:
        raise ValueError(
            f"{path} is of a {found}, not of a {cls.__name__}; load it with "
            f"{found}.from_pretrained"
        )
    try:
        return from_mapping(cls.config_class, about)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this version: {error}") from None


def load_weights(model: Any, path: Path, strict: bool, map_location: str) -> None:
    """Load a file of weights; `ValueError` for one that is damaged or does not fit.

    Raises `FileNotFoundError` where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; a model has {CONFIG} and {WEIGHTS}")
    try:
        load_model(model, path, strict=strict, device=str(map_location))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except RuntimeError as error:  # says which weights are missing, left over, or of what size
        reasons = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {type(model).__name__}: {reasons}") from None
    model.to(map_location)
