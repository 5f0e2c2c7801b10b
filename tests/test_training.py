"""Training: recipes, gradients of a step, checkpoints, resuming, several processes."""

import contextlib
import errno
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from memformer import files, training
from memformer.config import MemformerConfig
from memformer.lab.health import GradientByAge
from memformer.model import MemformerLM
from memformer.segments import IGNORE, leaves_of, map_state, reset_state
from memformer.tasks import load_corpus
from memformer.training import (
    CheckpointError,
    CorpusFeed,
    FileError,
    Learner,
    RecipeError,
    TaskFeed,
    Team,
    Trainer,
    TrainingError,
    build_model,
    learning_rate,
    load_recipe,
    load_run,
    preset_names,
    read_checkpoint,
    recipe_from,
    write_checkpoint,
)
from memformer.training.recipes import read_recipe

KINDS = ("lm", "encoder-decoder")
SMALL = {
    "model": {
        "dim": 16,
        "num_heads": 2,
        "num_slots": 4,
        "segment_length": 9,
        "decoder_layers": 1,
    },
    "corpus": "digits",
    "limit": 40,
    "steps": 6,
    "batch_size": 8,
    "horizon": 3,
    "log_every": 2,
    "evaluate_every": 3,
    "evaluate_segments": 3,
    "save_every": 2,
}
RECALL = SMALL | {
    "corpus": "recall",
    "task": {"pairs": 3, "segments": 5},
    "limit": None,
    "evaluate_segments": 16,
}


def small(**changes):
    return recipe_from(SMALL | changes)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- recipes --------------------------------------------------------------------------------


PLURAL = {"variants", "grid", "seeds"}
SWEEPS = [name for name in preset_names() if PLURAL & set(read_recipe(name))]


@pytest.mark.parametrize("name", [n for n in preset_names() if n not in SWEEPS])
def test_every_preset_is_valid_and_builds_its_model(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.what
    build_model(recipe, 300)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_is_valid_and_is_sent_to_its_command(name):
    with pytest.raises(RecipeError, match=f"memformer sweep {name}"):
        load_recipe(name)
    for member in training.load_sweep(name).members:
        build_model(member.recipe, 300)


def test_presets_for_a_cpu_and_for_a_gpu_are_there():
    assert {"tiny", "recall", "stories", "paper"} <= set(preset_names())


def test_changes_are_json_or_text_and_may_go_inside():
    recipe = load_recipe("tiny", ["model.dim=32", "lr=3e-4", "corpus=mnist", "compile=true"])
    assert recipe.model["dim"] == 32
    assert recipe.lr == 3e-4
    assert recipe.corpus == "mnist"
    assert recipe.compile is True
    assert load_recipe("tiny").model["dim"] == 64


WRONG = [
    ("steps", 0, "steps is 0"),
    ("steps", 2.5, "steps is 2.5"),
    ("batch_size", True, "batch_size is True"),
    ("lr", 0, "lr is 0"),
    ("lr", -1.0, "lr is -1.0"),
    ("lr", math.nan, "lr is nan"),
    ("decay", 1.5, "decay is 1.5"),
    ("beta2", 1.0, "beta2 is 1.0"),
    ("clip", 0, "clip is 0"),
    ("kind", "gpt", "kind is 'gpt'"),
    ("precision", "int8", "precision is 'int8'"),
    ("compile", "yes", "compile is 'yes'"),
    ("name", 3, "name is 3"),
    ("limit", 0, "limit is 0"),
    ("accumulate", 3, "multiple of accumulate"),
    ("seed", 2**64, "seed is 18446744073709551616"),
    ("seed", -1, "seed is -1"),
    ("memory", "none", "memory is 'none'; it must be one of 'on', 'off'"),
    ("tokens", "bpe", "'bpe:N'"),
    ("tokens", "bpe:3", "'bpe:N'"),
    ("frontier", {"segments": [3]}, "no task"),
    ("name", "../../escape", "letters, digits"),
    ("name", "[/x]", "letters, digits"),
    ("name", "a" * 5000, "1 to 100"),
    ("name", "a\0b", "letters, digits"),
    ("name", "", "1 to 100"),
    ("name", "..", "letters, digits"),
    ("model", {"dim": 15}, "dim is 15"),
    ("model", {"dimm": 15}, "did you mean 'model.dim'"),
    ("model", {"vocab_size": 15}, "model.vocab_size"),
    ("model", 3, "model is 3"),
    ("task", {"pairs": 2, "segments": 3}, "corpus is 'digits'"),
    ("corpus", "recall", "task.pairs is missing"),
    ("bach_size", 4, "did you mean 'batch_size'"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_nonsense_in_a_recipe_is_named(name, value, message):
    with pytest.raises(RecipeError) as caught:
        small(**{name: value})
    assert message in str(caught.value)


@hypothesis.given(
    st.dictionaries(
        st.sampled_from([*SMALL, "lr", "x"]),
        st.none() | st.text() | st.integers() | st.floats() | st.lists(st.integers()),
        max_size=4,
    )
)
def test_any_json_is_a_recipe_or_a_recipe_error(settings):
    with contextlib.suppress(RecipeError):  # and nothing else
        assert recipe_from(settings)


def test_files_that_are_no_recipe(tmp_path):
    for content, message in (("{", "not JSON"), ("[]", "list")):
        path = tmp_path / "r.json"
        path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    with pytest.raises(RecipeError, match="tiny"):
        load_recipe("nowhere")
    for change in ("lr", "steps.x=3"):
        with pytest.raises(RecipeError):
            load_recipe("tiny", [change])


def test_recall_needs_room_for_its_pairs():
    with pytest.raises(RecipeError, match=r"segment_length is 9; .* 10 tokens"):
        recipe_from(RECALL | {"task": {"pairs": 5, "segments": 3}})


def test_learning_rate_rises_holds_and_falls():
    recipe = small(steps=100, warmup=10, decay=0.2, lr=2.0)
    rates = [learning_rate(recipe, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert set(rates[9:80]) == {2.0}
    assert all(a > b for a, b in itertools.pairwise(rates[80:]))
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(small(decay=0.0, warmup=0), 6) == 1e-3


# --- data -----------------------------------------------------------------------------------


def equal_segments(left, right):
    assert len(left) == len(right)
    return all(
        torch.equal(a, b)
        for x, y in zip(left, right, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_pass_through_the_corpus_asks_for_every_token_once():
    corpus = load_corpus("digits", limit=13)
    recipe = small(batch_size=4)
    feed, asked = CorpusFeed(corpus, recipe, 9), 0
    while feed.epoch == 0:
        segments = feed.draw()
        if feed.epoch == 0:
            asked += sum(int((s.targets != IGNORE).sum()) for s in segments)
    assert asked == corpus.num_tokens


@pytest.mark.parametrize("settings", [SMALL, RECALL])
def test_a_feed_goes_on_from_its_position(settings, seed):
    recipe = recipe_from(settings | {"seed": seed % 1000})
    feed, other = training.make_feed(recipe), training.make_feed(recipe)
    for _ in range(seed % 20):
        feed.draw()
    other.seek(json.loads(json.dumps(feed.position())))
    for _ in range(7):
        assert equal_segments(feed.draw(), other.draw())


def test_epochs_come_in_new_orders_and_seeds_differ():
    corpus = load_corpus("digits", limit=13)
    feed = CorpusFeed(corpus, small(batch_size=2), 9)
    first = feed.draw()
    feed.seek({"epoch": 1, "segment": 0})
    assert not equal_segments(first, feed.draw())
    assert not equal_segments(first, CorpusFeed(corpus, small(batch_size=2, seed=1), 9).draw())


def test_the_curriculum_of_recall_grows_only_with_success():
    feed = TaskFeed(recipe_from(RECALL))
    assert feed.curriculum.limit == 2
    feed.curriculum.report(0.95)
    position = feed.position()
    assert position["limit"] > 2
    other = TaskFeed(recipe_from(RECALL))
    other.seek(position)
    assert other.curriculum.formed
    assert other.curriculum.limit == feed.curriculum.limit


# --- one step -------------------------------------------------------------------------------


def gradients_after(recipe, steps, dropout_seed=0):
    """Gradients of one update with the weights as drawn, in float64."""
    feed = training.make_feed(recipe)
    learner = Learner(build_model(recipe, feed.vocab_size).double(), recipe, Team(cpu=True))
    learner.optimiser.zero_grad = lambda: None  # keep them to look at
    for _ in range(steps - 1):
        feed.draw()
    torch.manual_seed(dropout_seed)
    loss = learner.update(feed.draw(), 0.0, lambda seen: None)
    return loss, torch.cat([w.grad.flatten() for w in learner.model.parameters()]), learner


@pytest.mark.parametrize("kind", ["lm", "encoder-decoder"])
@pytest.mark.parametrize("settings", [SMALL, RECALL])
@pytest.mark.parametrize("change", [{"replay": False}, {"accumulate": 2}, {"accumulate": 4}])
def test_replay_full_and_accumulated_steps_are_one(kind, settings, change, seed):
    base = settings | {"kind": kind, "seed": seed % 1000, "clip": 1e9}
    step = 1 + seed % 12
    loss, expected, a = gradients_after(recipe_from(base), step)
    other, found, b = gradients_after(recipe_from(base | change), step)
    assert other == pytest.approx(loss, rel=1e-10)
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    torch.testing.assert_close(leaves_of(a.state), leaves_of(b.state))


def test_the_loss_is_the_mean_over_all_targets_of_the_step(seed):
    recipe = small(seed=seed % 1000)
    feed = training.make_feed(recipe)
    learner = Learner(build_model(recipe, feed.vocab_size), recipe, Team(cpu=True))
    segments, state, scores, answers = feed.draw(), learner.state, [], []
    with torch.no_grad():
        for s in segments:
            fresh = learner.model.initial_state(len(s.tokens))
            state = reset_state(state, fresh, s.reset)
            logits, state = learner.model(s.tokens, state, s.mask)
            scores.append(logits.flatten(0, 1))
            answers.append(s.targets.flatten())
        loss = torch.nn.functional.cross_entropy(torch.cat(scores), torch.cat(answers))
    found = learner.update(segments, 1e-3, lambda seen: None)
    assert found == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close(learner.state, state)


def test_what_decays_and_what_does_not():
    model = MemformerLM(MemformerConfig(11, dim=16, positions="relative"))
    groups = training.make_optimiser(model, small()).param_groups
    names = {id(w): name for name, w in model.named_parameters()}
    decayed = {names[id(w)] for w in groups[0]["params"]}
    spared = {names[id(w)] for w in groups[1]["params"]}
    assert len(decayed) + len(spared) == len(names)
    assert {"stack.embed.weight", "stack.forget.bias"} <= spared
    assert all(".norm" not in name and "bias" not in name for name in decayed)
    assert "output.weight" in decayed
    assert groups[0]["weight_decay"] > 0 == groups[1]["weight_decay"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_near(precision, tmp_path):
    exact = Trainer(small(), tmp_path / "a", cpu=True)
    mixed = Trainer(small(precision=precision), tmp_path / "b", cpu=True)
    for trainer in (exact, mixed):
        for _ in range(4):
            trainer.take_step()
    assert mixed.losses[0] != exact.losses[0]
    assert mixed.losses == pytest.approx(exact.losses, rel=3e-2)


def compile_quickly(monkeypatch):
    """Compile, but to no machine code, which takes long; returns what was compiled."""
    compiled, real = [], torch.compile

    def quick(part, *args, **kwargs):
        compiled.append(part)
        return real(part, *args, **kwargs | {"backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", quick)
    return compiled


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_are_the_same(kind, tmp_path, monkeypatch):
    compiled = compile_quickly(monkeypatch)
    plain = Trainer(small(kind=kind), tmp_path / "a", cpu=True)
    assert not compiled
    fast = Trainer(small(kind=kind, compile=True), tmp_path / "b", cpu=True)
    for trainer in (plain, fast):
        for _ in range(2):
            ages = trainer.take_step()
        trainer.observe(ages)
    assert compiled
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5)
    assert fast.log[0]["self_weight"] == pytest.approx(plain.log[0]["self_weight"], rel=1e-4)


def test_compiled_replay_is_compiled_full_back_propagation_with_dropout(monkeypatch, seed):
    compile_quickly(monkeypatch)
    model = SMALL["model"] | {"dropout": 0.2}
    recipe = small(model=model, compile=True, seed=seed % 1000, clip=1e9)
    _, expected, _ = gradients_after(replace(recipe, replay=False), 1, seed)
    _, found, _ = gradients_after(recipe, 1, seed)
    assert float((found - expected).norm() / expected.norm()) < 1e-10


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path):
    wild = {"lr": 1e30, "clip": 1e9, "warmup": 0, "save_every": 1, "steps": 50}
    trainer = Trainer(small(**wild), tmp_path, cpu=True)
    with pytest.raises(TrainingError, match="lower lr"):
        trainer.run()
    _, about = read_checkpoint(trainer.checkpoint)
    assert about["step"] < trainer.step


# --- evaluation and health ------------------------------------------------------------------


def test_bits_per_token_count_every_target(seed):
    corpus = load_corpus("digits", "test", limit=7)
    model = build_model(small(), corpus.vocab_size).double()
    total = 0.0
    for document in corpus.documents:
        read = torch.cat((torch.tensor([corpus.start]), document[:-1].long()))[None]
        length = model.config.segment_length
        state = model.initial_state(1)
        for piece, target in zip(
            read.split(length, 1), document.long().split(length), strict=True
        ):
            logits, state = model(piece, state)
            loss = torch.nn.functional.cross_entropy(logits[0], target, reduction="sum")
            total += loss.item()
    score = training.bits_per_token(model, corpus, batch_size=7, length=length, segments=99)
    assert score == pytest.approx(total / corpus.num_tokens / math.log(2), rel=1e-9)


def test_a_wiped_memory_never_sees_the_past():
    corpus = load_corpus("digits", "test", limit=5)
    model = build_model(small(), corpus.vocab_size).double()
    seen = []

    def note(module, inputs):
        seen.append(inputs[1])

    model.register_forward_pre_hook(note)
    training.bits_per_token(model, corpus, batch_size=5, length=9, segments=4, wipe=True)
    for state in seen:
        torch.testing.assert_close(state, model.initial_state(5).detach())


def test_evaluation_changes_nothing(tmp_path):
    trainer = Trainer(small(model=SMALL["model"] | {"dropout": 0.3}), tmp_path, cpu=True)
    trainer.take_step()
    before, mode = torch.get_rng_state(), [m.training for m in trainer.learner.model.modules()]
    weights = weights_of(trainer.learner.model)
    scores = [
        training.evaluate(trainer.learner.model, trainer.recipe, trainer.test) for _ in "ab"
    ]
    trainer.observe(GradientByAge())
    assert scores[0] == scores[1]
    assert torch.equal(before, torch.get_rng_state())
    assert mode == [m.training for m in trainer.learner.model.modules()]
    assert same(weights, weights_of(trainer.learner.model))


def test_gradients_by_age_are_those_of_the_full_graph(seed):
    recipe = recipe_from(RECALL | {"seed": seed % 1000})
    feed = training.make_feed(recipe)
    learner = Learner(build_model(recipe, feed.vocab_size).double(), recipe, Team(cpu=True))
    feed.curriculum.limit = 5
    segments, ages = feed.draw(), GradientByAge()
    memories, state, model = [], learner.state, learner.model
    for s in segments:
        state = reset_state(state, model.initial_state(len(s.tokens)), s.reset)
        state.retain_grad()
        memories.append(state)
        logits, state = model(s.tokens, state)
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), segments[-1].targets.flatten()
    ).backward()
    learner.update(segments, 0.0, ages)
    expected = [float(m.grad.norm()) for m in memories[::-1]]
    assert ages.result()[:-1] == pytest.approx(expected[:-1], rel=1e-5)


def test_gradients_by_age_do_not_depend_on_parts(seed):
    norms = []
    for parts in (1, 4):
        recipe = small(accumulate=parts, seed=seed % 1000)
        feed, ages = training.make_feed(recipe), GradientByAge()
        model = build_model(recipe, feed.vocab_size).double()
        learner = Learner(model, recipe, Team(cpu=True))
        learner.update(feed.draw(), 0.0, ages)
        norms.append(ages.result())
    assert len(norms[0]) == 3
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path):
    trainer = Trainer(small(), tmp_path, cpu=True)
    trainer.take_step()
    before = weights_of(trainer.learner.model)
    trainer.learner.model.output.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(TrainingError, match="gradient"):
        trainer.take_step()
    assert same(before, weights_of(trainer.learner.model))


# --- checkpoints ----------------------------------------------------------------------------


def some_checkpoint(path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.rand(2) > 0.5}
    write_checkpoint(path, tensors, {"step": 3, "text": "ü"})
    return tensors


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "checkpoint.safetensors"
    tensors = some_checkpoint(path)
    found, about = read_checkpoint(path)
    assert same(tensors, found)
    assert about == {"step": 3, "text": "ü"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_every_truncation_and_every_flipped_byte_is_refused(tmp_path, seed):
    path = tmp_path / "checkpoint.safetensors"
    some_checkpoint(path)
    whole, draw = path.read_bytes(), random.Random(seed)
    for _ in range(40):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found, about = read_checkpoint(path)
        except CheckpointError:
            continue
        path.write_bytes(whole)  # a flip that changes nothing, such as in white space
        expected, also = read_checkpoint(path)
        assert same(found, expected)
        assert about == also


def test_foreign_files_are_refused_with_a_reason(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(path)
    for content in (b"", b"hello", os.urandom(500), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or no safetensors"):
            read_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no format"):
        read_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="'pt'"):
        read_checkpoint(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_what_cannot_be_written_leaves_the_last_good_checkpoint(
    code, where, tmp_path, monkeypatch
):
    path = tmp_path / "checkpoint.safetensors"
    before = some_checkpoint(path)

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if where == "open":
        monkeypatch.setattr(files, "open", refuse, raising=False)
    else:
        monkeypatch.setattr(files.os, where, refuse)
    with pytest.raises(FileError) as caught:
        some_checkpoint(path)
    monkeypatch.undo()
    assert os.strerror(code) in str(caught.value)
    assert "still there" in str(caught.value)
    assert same(before, read_checkpoint(path)[0])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def run_cli(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "memformer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def small_files(size):
    """For `preexec_fn`: no file may grow over so many bytes, as on a disk that is full."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """A limit of the system on the size of files stands in for the disk."""
    recipe, run = tmp_path / "r.json", tmp_path / "run"
    recipe.write_text(json.dumps(SMALL))
    assert Trainer(load_recipe(recipe), run, cpu=True).run()
    path = run / "checkpoint.safetensors"
    before = path.read_bytes()

    more = ("--resume", "--set", "steps=8", "--cpu")
    done = run_cli(
        "train", recipe, "--out", run, *more, preexec_fn=small_files(len(before) // 2)
    )
    assert done.returncode == 3
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == before
    assert not list(run.glob(".*.partial"))
    again = Trainer(load_recipe(recipe, ["steps=8"]), run, cpu=True)
    again.resume()
    assert again.run()


def test_a_disk_that_is_full_when_the_model_is_written_loses_nothing(tmp_path):
    """The checkpoint is there before; the model folder is never half of one."""
    recipe, run = tmp_path / "r.json", tmp_path / "run"
    recipe.write_text(json.dumps(SMALL))
    assert Trainer(load_recipe(recipe), run, cpu=True).run()
    weights = run / "model" / "model.safetensors"
    room = weights.stat().st_size // 2
    shutil.rmtree(weights.parent)
    before = (run / "checkpoint.safetensors").read_bytes()

    more = ("--resume", "--cpu")
    done = run_cli("train", recipe, "--out", run, *more, preexec_fn=small_files(room))
    assert done.returncode == 3
    assert "the model could not be written" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in run.iterdir()} == {"checkpoint.safetensors", "record.json"}
    assert (run / "checkpoint.safetensors").read_bytes() == before
    again = Trainer(load_recipe(recipe), run, cpu=True)
    again.resume()
    assert again.run()
    model = MemformerLM.from_pretrained(run)
    assert same(model.state_dict(), load_run(run, cpu=True).model.state_dict())


# --- a run that is killed -------------------------------------------------------------------


def result_of(folder):
    tensors, about = read_checkpoint(folder / "checkpoint.safetensors")
    del about["seconds"]
    for row in about["log"]:
        del row["seconds"]
    return tensors, about


KILLED = SMALL | {
    "steps": 400,
    "save_every": 1,
    "evaluate_every": 30,
    "model": SMALL["model"] | {"dropout": 0.1},
}


@pytest.mark.parametrize(
    "settings", [KILLED, RECALL | {"steps": 12, "kind": "encoder-decoder"}]
)
def test_resuming_at_any_step_changes_no_bit(settings, tmp_path, seed):
    recipe = recipe_from(settings | {"seed": seed % 1000, "steps": 12})
    whole = Trainer(recipe, tmp_path / "whole", cpu=True)
    assert whole.run()
    stop = 1 + seed % 11
    first = Trainer(recipe, tmp_path / "parts", cpu=True)
    while first.step < stop:
        ages = first.take_step()
        if first.due(recipe.log_every):
            first.observe(ages)
    first.save()
    torch.manual_seed(seed)  # whatever happened in between
    second = Trainer(recipe, tmp_path / "parts", cpu=True)
    second.resume()
    assert second.step == stop
    assert second.run()
    left, right = result_of(tmp_path / "whole"), result_of(tmp_path / "parts")
    assert same(left[0], right[0])
    assert left[1] == right[1]
    assert "memory/0" in left[0]


def test_a_run_killed_twenty_times_ends_bit_for_bit_like_one_that_was_not(tmp_path, seed):
    """SIGKILL at random moments; after each, the file there is whole, and the run goes on."""
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps(KILLED | {"seed": seed % 1000}))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    worker = Path(__file__).with_name("killable.py")
    subprocess.run([sys.executable, worker, recipe, whole, "0"], check=True)
    server = subprocess.run(
        [sys.executable, worker, recipe, parts, "20", str(seed)], check=True
    )
    assert server.returncode == 0
    left, right = result_of(whole), result_of(parts)
    assert same(left[0], right[0])
    assert left[1] == right[1]
    kills = json.loads((parts / "kills.json").read_text())
    assert len(kills) == 20
    assert len(set(kills)) > 10  # they fell on different moments


def test_a_signal_lets_the_step_end_saves_and_says_so(tmp_path):
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps(SMALL | {"steps": 100_000, "save_every": 100_000}))
    command = [sys.executable, "-m", "memformer", "train", recipe, "--cpu"]
    command += ["--out", tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "step" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        out = process.stdout.read()
        assert process.wait(60) == 75
    assert "--resume" in out
    tensors, about = read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert about["step"] == len(tensors["losses"]) > 1


def test_an_interrupt_from_the_keyboard_does_the_same(tmp_path):
    trainer = Trainer(small(steps=100, save_every=100), tmp_path, cpu=True)
    before = signal.getsignal(signal.SIGINT)
    assert not trainer.run(lambda row: os.kill(os.getpid(), signal.SIGINT))
    assert trainer.step == 2
    assert read_checkpoint(trainer.checkpoint)[1]["step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_another_recipe_other_data_or_other_weights_are_refused(tmp_path, monkeypatch):
    recipe = small()
    Trainer(recipe, tmp_path, cpu=True).run()
    for change, message in (
        ({"lr": 0.5}, "lr was 0.001 and is 0.5"),
        ({"limit": 39}, "limit was 40 and is 39"),
        ({"model": SMALL["model"] | {"dim": 32}}, "model was"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Trainer(small(**change), tmp_path, cpu=True).resume()
    Trainer(small(steps=9, save_every=1), tmp_path, cpu=True).resume()
    other = Trainer(recipe, tmp_path, cpu=True)
    other.feed.digest = "0"
    with pytest.raises(CheckpointError, match="other data"):
        other.resume()
    tensors, about = read_checkpoint(other.checkpoint)
    tensors["model/output.weight"] = torch.zeros(3, 3)
    write_checkpoint(other.checkpoint, tensors, about)
    with pytest.raises(CheckpointError, match=r"output\.weight"):
        Trainer(recipe, tmp_path, cpu=True).resume()


def test_a_finished_run_loads_again(tmp_path):
    trainer = Trainer(small(), tmp_path, cpu=True)
    trainer.run()
    again, recipe, step, tokens = load_run(tmp_path, cpu=True)
    assert tokens is None
    assert step == 6
    assert recipe == trainer.recipe
    assert same(weights_of(again), weights_of(trainer.learner.model))
    published = MemformerLM.from_pretrained(tmp_path / "model")
    assert same(weights_of(again), weights_of(published))
    record = json.loads((tmp_path / "record.json").read_text())
    assert {"recipe", "seed", "machine", "data", "seconds", "tokens", "log", "score"} <= set(
        record
    )
    assert set(record["score"]) == {"bits", "bits_wiped"}


def test_recall_is_learned_and_a_wiped_memory_is_at_chance(tmp_path):
    """The trainer end to end: two pairs over three segments, some seconds."""
    settings = RECALL | {"task": {"pairs": 2, "segments": 3}, "steps": 500, "batch_size": 32}
    settings |= {"lr": 3e-3, "evaluate_segments": 128, "log_every": 25, "save_every": 500}
    settings["model"] = {"dim": 32, "num_heads": 2, "num_slots": 4, "segment_length": 8}
    settings["model"]["decoder_layers"] = 2
    trainer = Trainer(recipe_from(settings), tmp_path, cpu=True)
    trainer.run()
    score = json.loads((tmp_path / "record.json").read_text())["score"]
    assert score["accuracy"] > 0.9
    assert score["accuracy_wiped"] < 0.3
    assert [row["step"] for row in trainer.log] == list(range(25, 501, 25))


# --- several processes ----------------------------------------------------------------------


def test_two_processes_are_one_with_one_round_a_step(tmp_path, seed):
    """gloo, four steps: losses, weights and memories agree, and collectives are counted."""
    for kind in KINDS:
        changes = {"kind": kind, "seed": seed % 1000, "log_every": 99}
        (tmp_path / f"{kind}.json").write_text(json.dumps(SMALL | changes))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(20000 + seed % 20000)]
    launch += [str(Path(__file__).with_name("two_processes.py")), str(tmp_path), *KINDS]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        seen = json.loads((tmp_path / f"{kind}-seen.json").read_text())
        assert seen["processes"] == 2
        assert seen["collectives"] == ["all_reduce"] * 4
        recipe = load_recipe(tmp_path / f"{kind}.json")
        one = double(Trainer(recipe, tmp_path / "one", cpu=True))
        for _ in range(4):
            one.take_step()
        assert seen["losses"] == pytest.approx(one.losses, rel=1e-12)
        tensors, _ = read_checkpoint(tmp_path / kind / "checkpoint.safetensors")
        for name, value in training.pack_learner(one.learner).items():
            if name.startswith(("model/", "memory/")):
                torch.testing.assert_close(tensors[name], value, rtol=1e-8, atol=1e-10)


def double(trainer):
    """The same trainer in float64, so that sums in another order agree."""
    learner = trainer.learner
    learner.model.double()
    learner.optimiser = training.make_optimiser(learner.model, trainer.recipe)
    learner.state = map_state(
        lambda t: t.double() if t.is_floating_point() else t, learner.state
    )
    return trainer
