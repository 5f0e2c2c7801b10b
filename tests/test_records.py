"""Records of runs: written whole or not at all, read back as they were."""

import json

import pytest
import torch

import memformer
from memformer.lab import records


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder in the place of the real one."""
    monkeypatch.setattr(records, "data_folder", lambda: tmp_path)
    return tmp_path


def a_record(seed):
    return {"seed": seed, "accuracy": [0.5, 1.0], "of": "Größe", "none": None}


def test_what_is_saved_is_what_is_loaded(folder, seed):
    weights = {"a.weight": torch.randn(3, 4), "b": torch.arange(5)}
    records.save_record(folder, "one", a_record(seed), weights)
    records.save_record(folder, "another", a_record(seed + 1), {})
    assert records.record_names() == ["another", "one"]
    assert records.load_record("one") == a_record(seed)
    loaded = records.load_weights("one")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_saving_again_replaces_and_leaves_nothing_else(folder, seed):
    for number in (seed, seed + 1):
        records.save_record(
            folder, "one", a_record(number), {"x": torch.full((2,), number % 7)}
        )
    assert records.load_record("one")["seed"] == seed + 1
    assert records.load_weights("one")["x"].tolist() == [(seed + 1) % 7] * 2
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["runs/one.json", "weights/one.safetensors"]


def test_a_record_that_cannot_be_written_leaves_the_old_one(folder, seed):
    records.save_record(folder, "one", a_record(seed), {"x": torch.zeros(2)})
    with pytest.raises(TypeError):
        records.save_record(folder, "one", {"set": {1}}, {"x": torch.ones(2)})
    assert records.load_record("one") == a_record(seed)
    assert records.load_weights("one")["x"].tolist() == [0, 0]
    assert len(list(folder.rglob("*"))) == 4


def test_a_name_that_is_not_there(folder, seed):
    records.save_record(folder, "one", a_record(seed), {})
    with pytest.raises(FileNotFoundError, match=r"'two'.*one"):
        records.load_record("two")
    with pytest.raises(FileNotFoundError, match="'two'"):
        records.load_weights("two")


def test_every_record_of_the_book_can_be_read():
    for name in records.record_names():
        assert isinstance(records.load_record(name), dict), name


def test_a_machine_is_described_with_git_and_without(monkeypatch, tmp_path):
    described = records.describe_machine()
    assert described["torch"] == torch.__version__
    json.dumps(described)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.describe_machine() | {"commit": ""} == described | {"commit": ""}


def test_the_package_offers_what_it_lists():
    assert len(memformer.__all__) == len(set(memformer.__all__)) > 10
    assert all(
        getattr(memformer, name).__module__.startswith("memformer.")
        for name in memformer.__all__
    )
