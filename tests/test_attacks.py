"""Files forged, folders contested, pipes closed: each is answered with a sentence."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from test_training import RECALL, SMALL, run_cli, same, small, weights_of

from memformer.training import (
    CheckpointError,
    FileError,
    Learner,
    RecipeError,
    Team,
    Trainer,
    TrainingError,
    build_model,
    find_without,
    load_recipe,
    load_run,
    load_sweep,
    make_feed,
    read_checkpoint,
    recipe_from,
    recipe_schema,
    run_sweep,
    score_run,
    write_checkpoint,
)
from memformer.training.learner import gradient_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps, not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "with"
    Trainer(small(steps=2), folder, cpu=True).run()
    return folder


def forge(run, folder, change):
    """A copy of a run's checkpoint, changed and with a digest that fits."""
    tensors, about = read_checkpoint(run / "checkpoint.safetensors")
    change(tensors, about)
    write_checkpoint(folder / "checkpoint.safetensors", tensors, about)


def resume_and_load(trainer):
    trainer.resume()
    load_run(trainer.folder, cpu=True)


def put(key, value):
    return lambda tensors, about: about.update({key: value})


ABOUT = [
    *(put(key, None) for key in ("recipe", "vocab_size", "digest", "position", "scaler")),
    *(put(key, None) for key in ("log", "step", "tokens", "seconds")),
    *(put(key, -1) for key in ("vocab_size", "step", "tokens", "seconds", "text", "log")),
    put("vocab_size", True),
    put("vocab_size", 2**70),
    put("log", [3]),
    put("position", {}),
    put("position", {"epoch": "0", "segment": 0}),
    put("position", {"epoch": -1, "segment": 0}),
    put("recipe", {"steps": "many"}),
    put("recipe", {"unheard": 1}),
    put("text", "{"),
    put("step", 1),
    put("scaler", []),
    lambda tensors, about: about.pop("log"),
    lambda tensors, about: about.clear(),
]
TENSORS = [
    lambda tensors, about: tensors.pop("losses"),
    lambda tensors, about: tensors.pop("memory/0"),
    lambda tensors, about: tensors.update({"memory/0": torch.zeros(2, 2)}),
    lambda tensors, about: tensors.pop("random/cpu"),
    lambda tensors, about: tensors.update({"random/cpu": torch.zeros(1, 3).byte()}),
    lambda tensors, about: tensors.pop("optimiser/3/exp_avg"),
    lambda tensors, about: tensors.update({"optimiser/3/exp_avg": torch.zeros(1)}),
    lambda tensors, about: tensors.update({"optimiser/x/exp_avg": torch.zeros(1)}),
    lambda tensors, about: [
        tensors.pop(k) for k in list(tensors) if k.startswith("optimiser/")
    ],
    lambda tensors, about: tensors["model/output.weight"].fill_(float("nan")),
    lambda tensors, about: tensors.pop("model/output.weight"),
]


@pytest.mark.parametrize("number", range(len(ABOUT) + len(TENSORS)))
def test_a_forged_checkpoint_is_refused_with_a_sentence(run, tmp_path, number):
    forge(run, tmp_path, (ABOUT + TENSORS)[number])
    trainer = Trainer(small(steps=4), tmp_path, cpu=True)
    with pytest.raises((CheckpointError, RecipeError)) as caught:
        resume_and_load(trainer)
    assert "\n" not in str(caught.value) or "output.weight" in str(caught.value)


@pytest.mark.parametrize("about", ["[]", "3", "null", '"x"', "{", "[" * 100_000])
def test_json_of_another_kind_under_a_true_digest(tmp_path, about, monkeypatch):
    from safetensors.torch import save

    from memformer.training.checkpoints import FORMAT, digest_of

    tensors = {"a": torch.zeros(2)}
    labels = {"format": FORMAT, "about": about, "sha256": digest_of(tensors, about)}
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(save(tensors, labels))
    with pytest.raises(CheckpointError):
        load_run(tmp_path, cpu=True)


def test_a_head_without_labels(tmp_path):
    head = json.dumps({"__metadata__": None}).encode()
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_weights_that_are_no_numbers_are_refused_by_every_command(run, tmp_path):
    forge(run, tmp_path, lambda tensors, about: tensors["model/output.weight"].fill_(torch.nan))
    for command in (["evaluate"], ["generate", "--temperature", "0"]):
        done = run_cli(command[0], tmp_path, "--cpu", *command[1:])
        assert done.returncode == 3
        assert "NaN" in done.stderr
        assert "Traceback" not in done.stderr
        assert not done.stdout


def test_fewer_steps_than_done_are_answered(run):
    trainer = Trainer(small(steps=1), run, cpu=True)
    with pytest.raises(RecipeError, match="has made 2 already"):
        trainer.resume()
    same_again = Trainer(small(steps=2), run, cpu=True)
    same_again.resume()
    assert same_again.run()


def test_a_folder_has_one_trainer_and_is_proven_writable_first(tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps(SMALL | {"steps": 100_000, "save_every": 100_000}))
    command = [sys.executable, "-m", "memformer", "train", recipe, "--cpu"]
    command += ["--out", tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "step" in process.stdout.readline()
        with pytest.raises(FileError, match=f"in use by process {process.pid}"):
            Trainer(small(), tmp_path / "run", cpu=True).run()
        process.send_signal(signal.SIGHUP)  # saved like SIGTERM
        assert process.wait(60) == 75
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] > 1
    (tmp_path / "file").write_text("")
    trainer = Trainer(small(), tmp_path / "file" / "run", cpu=True)
    with pytest.raises(FileError, match="nothing can be written"):
        trainer.run()
    assert trainer.step == 0


def test_a_closed_pipe_saves_like_a_signal(tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps(SMALL | {"steps": 100_000, "save_every": 100_000}))
    line = f"{sys.executable} -m memformer train {recipe} --cpu --out {tmp_path / 'run'}"
    shell = f"({line}; echo code $? >&2) | head -1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=120)
    assert "code 75" in done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] >= 2


def test_an_overflow_met_while_looking_is_a_sentence(tmp_path):
    trainer = Trainer(small(), tmp_path, cpu=True)
    ages = trainer.take_step()
    with torch.no_grad():
        trainer.learner.model.stack.forget.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="lower lr"):
        trainer.observe(ages)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"dim": 2**40, "num_heads": 2}, "GiB"),
        ({"encoder_layers": 10**9}, "GiB"),
        ({"dim": 2 * 10**30, "num_heads": 2}, "GiB"),
    ],
)
def test_sizes_beyond_memory_are_answered(model, message):
    with pytest.raises(RecipeError, match=message):
        build_model(small(model=SMALL["model"] | model), 300)


def test_recipes_that_attack(tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text('{"model":' * 50_000)
    with pytest.raises(RecipeError, match="deep"):
        load_recipe(deep)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not JSON"):
        load_recipe(tmp_path / "bytes.json")
    for source in ("a\0b", "x" * 5000, "../recipes/tiny", "/nowhere/tiny"):
        with pytest.raises(RecipeError, match="no recipe"):
            load_recipe(source)
    for change in (".lr=1", "model.=1", "model.a.b=1", "=1", "lr", "seed=18446744073709551616"):
        with pytest.raises(RecipeError):
            load_recipe("tiny", [change])
    odd = tmp_path / "[red] tiny 2.json"
    odd.write_text("{}")
    assert load_recipe(odd).name == "red-tiny-2"


# --- the other control ----------------------------------------------------------------------


def test_trained_without_never_remembers_and_is_found_beside(run):
    folder = run.parent / "without"
    trainer = Trainer(small(steps=2, memory="off"), folder, cpu=True)
    seen = []
    trainer.learner.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    for _ in range(2):
        trainer.take_step()
    fresh = trainer.learner.model.initial_state(8)
    wiped = [i[1].detach() for i in seen]
    assert len(wiped) > 3
    spread = [float((state - fresh).abs().max()) for state in wiped]
    assert max(spread) < 1e-2  # only the few updates of v lie between
    done = Trainer(small(steps=2, memory="off"), folder, cpu=True)
    done.run()
    score = json.loads((folder / "record.json").read_text())["score"]
    assert score["bits"] == score["bits_wiped"]
    assert find_without(run, load_run(run, cpu=True).recipe) == folder
    both = score_run(run, cpu=True)
    assert both["bits_trained_without"] == pytest.approx(score["bits"], rel=1e-6)
    assert score_run(run, without=folder, cpu=True) == both
    with pytest.raises(RecipeError, match="trained with memory"):
        score_run(run, without=run, cpu=True)


def test_steps_without_memory_are_those_of_documents_of_one_segment(seed):
    """memory=off equals full back-propagation through the same segments, all reset."""
    off = small(memory="off", seed=seed % 1000, clip=1e9)
    feed = make_feed(off)
    segments = feed.draw()
    wiped = [s._replace(reset=torch.ones_like(s.reset)) for s in segments]
    on = recipe_from(asdict(off) | {"memory": "on", "replay": False})
    losses, gradients = [], []
    for recipe, read in ((off, segments), (on, wiped)):
        learner = Learner(build_model(recipe, feed.vocab_size).double(), recipe, Team(cpu=True))
        learner.optimiser.zero_grad = lambda: None  # keep them to look at
        losses.append(learner.update(read, 0.0, lambda seen: None))
        every = [gradient_of(weight).flatten() for weight in learner.model.parameters()]
        gradients.append(torch.cat(every))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-10


# --- sweeps and schemas ---------------------------------------------------------------------

SWEEP = RECALL | {
    "steps": 2,
    "name": "tried",
    "frontier": {"segments": [2, 3], "trials": 8},
    "variants": {"as built": {}, "[red]": {"model": {"writer_heads": 2}}},
    "grid": {"lr": [1e-3, 3e-3]},
    "seeds": [0, 1],
}


def test_a_sweep_goes_on_where_it_stopped_and_has_a_row_for_each(tmp_path, monkeypatch):
    path, out = tmp_path / "s.json", tmp_path / "out" / "record.json"
    path.write_text(json.dumps(SWEEP))
    sweep = load_sweep(path)
    assert len(sweep.members) == 8
    assert {m.recipe.lr for m in sweep.members} == {1e-3, 3e-3}
    told = []

    def stop(label):
        told.append(label)
        if len(told) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # before the handler stands: a real death
        return label

    monkeypatch.setattr(signal, "getsignal", signal.getsignal)
    previous = signal.signal(
        signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, out, tmp_path / "work", cpu=True, tell=stop)
    signal.signal(signal.SIGTERM, previous)
    assert len(json.loads(out.read_text())["results"]) == 2
    assert run_sweep(load_sweep(path), out, tmp_path / "work", cpu=True)
    rows = json.loads(out.read_text())["results"]
    assert [row["label"] for row in rows] == [m.label for m in sweep.members]
    assert all(len(row["accuracy"]) == 2 and row["seconds"] >= 0 for row in rows)
    assert rows[0]["curve"] != rows[1]["curve"] or rows[0]["score"] != rows[1]["score"]
    before = out.read_bytes()
    assert run_sweep(load_sweep(path), out, tmp_path / "work", cpu=True)
    assert out.read_bytes() == before
    with pytest.raises(RecipeError, match="another sweep"):
        run_sweep(load_sweep(path, ["steps=3"]), out, tmp_path / "work", cpu=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"grid": {"lr": 3}}, "grid"),
        ({"variants": []}, "variants"),
        ({"variants": {"x": {"model.dimm": 3}}}, "in variant 'x'.*did you mean"),
    ],
)
def test_sweeps_that_cannot_be(tmp_path, change, message):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(SWEEP | change))
    with pytest.raises(RecipeError, match=message):
        load_sweep(path)


def test_the_schema_for_editors_is_fresh():
    from memformer.files import data_folder

    kept = json.loads((data_folder() / "recipes" / "schema.json").read_text())
    assert kept == json.loads(json.dumps(recipe_schema()))


def test_a_run_without_weights_changed_is_the_same(run):
    """The fixture above was not changed by any test."""
    one, two = (weights_of(load_run(run, cpu=True).model) for _ in "ab")
    assert same(one, two)
