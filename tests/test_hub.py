"""Models that come back as they were saved, and what is refused instead of being guessed."""

import json
from pathlib import Path

import pytest
import torch
from helpers import (
    MODELS,
    SEGMENT_MODELS,
    build,
    small_config,
    stack_of,
    states_close,
    tokens_for,
)
from safetensors.torch import load_file, save_file

from memformer.model import Memformer, MemformerEncoder, MemformerLM

EVERY = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test asks the hub; the setting is read when the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def edit_config(folder, **changes):
    path = folder / "config.json"
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in about.items() if v is not Ellipsis}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@EVERY
@pytest.mark.parametrize("changes", [{}, {"init": "paper", "positions": "relative"}])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_saved_model_comes_back(kind, changes, as_text, tmp_path, capsys):
    model = kind(small_config(**changes)).eval()
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(str(tmp_path) if as_text else tmp_path)
    assert again.config == model.config
    assert not again.training
    tokens = tokens_for(model, 2, 7)
    states_close(model(tokens, model.initial_state(2)), again(tokens, again.initial_state(2)))
    assert capsys.readouterr().out == ""
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@EVERY
def test_a_config_names_its_class_and_every_setting(kind, tmp_path):
    kind(small_config()).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about.pop("class") == kind.__name__
    assert about == vars(small_config())


def test_all_weights_come_back(tmp_path):
    model = build(Memformer).float()
    model.save_pretrained(tmp_path)
    again = Memformer.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_the_folder_of_a_run_holds_a_model(tmp_path):
    MemformerLM(small_config()).save_pretrained(tmp_path / "tiny" / "model")
    assert MemformerLM.from_pretrained(tmp_path / "tiny").config == small_config()
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model.*when it has finished"):
        MemformerLM.from_pretrained(tmp_path / "unfinished")


@pytest.mark.parametrize(
    "name",
    [
        Path("nowhere"),
        Path("runs/tiny"),
        "runs/tiny",
        "./a",
        "../a",
        "a/b/c",
        "/nowhere/at/all",
    ],
)
def test_a_folder_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match="there is no folder") as caught:
        MemformerLM.from_pretrained(name)
    assert "owner/name" in str(caught.value)


@pytest.mark.parametrize("name", ["owner/name", "no such owner/name"])
def test_what_the_hub_does_not_give(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no folder {name}, and the hub does not give"):
        MemformerLM.from_pretrained(name, cache_dir=tmp_path)


def test_a_model_on_the_hub(tmp_path, monkeypatch):
    """The library's download, replaced by a folder: both files and the options arrive."""
    model, asked = MemformerLM(small_config()), []
    model.save_pretrained(tmp_path)

    def download(name, part, **options):
        asked.append((name, part, options))
        return str(tmp_path / part)

    monkeypatch.setattr("memformer.hub.hf_hub_download", download)
    assert MemformerLM.from_pretrained("owner/name", revision="v1").config == model.config
    parts = "config.json", "model.safetensors"
    assert asked == [("owner/name", part, {"revision": "v1"}) for part in parts]


@pytest.mark.parametrize("saved", MODELS)
@pytest.mark.parametrize("asked", MODELS)
def test_a_model_of_another_class(saved, asked, tmp_path):
    saved(small_config()).save_pretrained(tmp_path)
    if saved is asked:
        asked.from_pretrained(tmp_path)
        return
    with pytest.raises(ValueError, match=f"of a {saved.__name__}, not of a {asked.__name__}"):
        asked.from_pretrained(tmp_path)
    edit_config(tmp_path, **{"class": ...})  # saved by hand, without the name
    with pytest.raises(ValueError, match=f"does not fit {asked.__name__}"):
        asked.from_pretrained(tmp_path)


@EVERY
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers": 3, "encoder_layers": 3}, "does not fit .*[Mm]issing"),
        ({"decoder_layers": 1, "encoder_layers": 1}, "does not fit .*[Uu]nexpected"),
        ({"num_slots": 6}, "does not fit .*size mismatch"),
        ({"self_weight": None}, "does not fit .*[Uu]nexpected"),
        ({"num_slot": 6}, "unknown setting 'num_slot'; did you mean 'num_slots'"),
        ({"keep_bias": 1.0}, "unknown setting 'keep_bias'"),
        ({"num_slots": 0}, "num_slots is 0; it must be at least 1"),
        ({"num_slots": "many"}, "num_slots is 'many'"),
        ({"vocab_size": ...}, "vocab_size is missing"),
    ],
)
def test_a_config_that_does_not_fit(kind, changes, message, tmp_path):
    kind(small_config()).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        kind.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@EVERY
def test_weights_that_are_missing_or_left_over(kind, tmp_path):
    model = kind(small_config())
    model.save_pretrained(tmp_path)
    (name,) = (name for name in model.state_dict() if name.endswith("forget.bias"))
    edit_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"does not fit {kind.__name__}.*forget.bias"):
        kind.from_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path, strict=False).config == model.config
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update(extra=torch.zeros(3)))
    with pytest.raises(ValueError, match="extra"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 10_000, '"text"'])
def test_a_damaged_config(content, tmp_path):
    MemformerLM(small_config()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        MemformerLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, 2000])
def test_damaged_weights(size, tmp_path):
    MemformerLM(small_config()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged"):
        MemformerLM.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        MemformerLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", SEGMENT_MODELS)
def test_a_subclass_that_ties_its_weights(kind, tmp_path):
    class Tied(kind, library_name="mine"):
        def __init__(self, config):
            super().__init__(config)
            self.output.weight = stack_of(self).embed.weight

    model = Tied(small_config())
    model.save_pretrained(tmp_path)
    again = Tied.from_pretrained(tmp_path)
    assert torch.equal(again.output.weight, model.output.weight)
    with pytest.raises(ValueError, match="of a Tied"):
        kind.from_pretrained(tmp_path)


def test_the_encoder_says_how_to_load_it(tmp_path):
    MemformerEncoder(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load it with MemformerEncoder\.from_pretrained"):
        MemformerLM.from_pretrained(tmp_path)
