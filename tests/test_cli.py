"""The command line: what it prints, and the codes it leaves with."""

import json
import re
import subprocess
import sys

import pytest
import torch
from test_training import RECALL, SMALL
from typer.testing import CliRunner

from memformer import bench
from memformer.cli import app
from memformer.model import MemformerLM
from memformer.records import record_names

PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}


def run(*arguments, code=0):
    """Call the command line in this process; returns what it printed, both streams."""
    done = CliRunner(env=PLAIN).invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.output + str(done.exception)
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two finished runs, one of digits and one of text, and their recipes."""
    folder = tmp_path_factory.mktemp("cli")
    text = {"corpus": "python-reference", "limit": 3}
    for name, settings in (("digits", SMALL), ("text", SMALL | text), ("recall", RECALL)):
        (folder / f"{name}.json").write_text(json.dumps(settings))
        recipe = folder / f"{name}.json"
        run("train", recipe, "--out", folder / name, "--cpu", "--set", "steps=4")
    return folder


def test_help_teaches_every_command():
    out = run("--help")
    for command in ("train", "evaluate", "generate", "bench", "records"):
        assert command in out
        assert len(run(command, "--help")) > 300
    assert "75 stopped by a signal" in re.sub(r"\s+", " ", out)
    assert "--resume" in run("train", "--help")


def test_both_ways_to_call_it_are_one():
    ways = [[sys.executable, "-m", "memformer"], [sys.executable, "-c", MAIN]]
    first, second = (
        subprocess.run([*w, "--help"], capture_output=True, text=True) for w in ways
    )
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    assert "Usage: memformer" in first.stdout


MAIN = "import sys; sys.argv[0] = 'memformer'; from memformer.cli import main; main()"


def test_a_run_leaves_a_record_a_model_and_a_checkpoint(folder):
    for name in ("digits", "text", "recall"):
        assert {p.name for p in (folder / name).iterdir()} == {
            "checkpoint.safetensors",
            "record.json",
            "model",
        }
        MemformerLM.from_pretrained(folder / name / "model")


def test_a_run_that_is_there_is_not_overwritten(folder):
    before = (folder / "digits" / "checkpoint.safetensors").read_bytes()
    out = run("train", folder / "digits.json", "--out", folder / "digits", code=3)
    assert "--resume" in out
    assert (folder / "digits" / "checkpoint.safetensors").read_bytes() == before


def test_nothing_to_resume_is_said(folder, tmp_path):
    out = run("train", folder / "digits.json", "--out", tmp_path / "new", "--resume", code=3)
    assert "no checkpoint at" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tinny"], "tiny"),
        (["train", "tiny", "--set", "lrr=1"], "did you mean 'lr'"),
        (["train", "tiny", "--set", "steps"], "key=value"),
        (["train", "tiny", "--set", "model.dim=63"], "dim is 63"),
        (["train", "tiny", "--set", "corpus=nowhere"], "unknown corpus 'nowhere'"),
        (["bench", "speed"], "no benchmark 'speed'"),
        (["bench", "replay", "--size", "huge"], "no size 'huge'"),
        (["records", "nowhere"], "no record 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_said_and_code_is_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in re.sub(r"\s+", " ", run(*arguments, code=2))
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_has_code_1(folder, tmp_path):
    wild = [f"--set={change}" for change in ("lr=1e30", "clip=1e9", "warmup=0", "steps=50")]
    out = run(
        "train", folder / "digits.json", "--out", tmp_path / "run", "--cpu", *wild, code=1
    )
    assert "lower lr" in out


def test_evaluate_prints_json_with_the_reset_control(folder):
    for name, kind in (("digits", "bits"), ("text", "bits"), ("recall", "accuracy")):
        score = json.loads(run("evaluate", folder / name, "--cpu"))
        assert score["step"] == 4
        assert score[kind] >= 0
        assert score[f"{kind}_wiped"] >= 0
    again = json.loads(run("evaluate", folder / "digits", "--cpu"))
    assert again == json.loads(run("evaluate", folder / "digits", "--cpu"))
    record = json.loads((folder / "digits" / "record.json").read_text())
    assert again["bits"] == pytest.approx(record["score"]["bits"], rel=1e-6)


def test_what_is_no_run_has_code_3(tmp_path):
    for command in ("evaluate", "generate"):
        assert "no checkpoint at" in run(command, tmp_path, code=3)


def test_generate_draws_ids_the_same_for_a_seed(folder):
    draw = ["generate", folder / "digits", "--tokens", 70, "--cpu", "--seed"]
    first = [int(word) for word in run(*draw, 3).split()]
    assert len(first) == 70
    assert all(0 <= number <= 17 for number in first)
    assert [int(word) for word in run(*draw, 3).split()] == first
    assert [int(word) for word in run(*draw, 4).split()] != first
    likeliest = ["--temperature", 0, "--prompt", "0 0 5"]
    assert run(*draw, 3, *likeliest) == run(*draw, 4, *likeliest)


def test_generate_reads_and_writes_text_as_bytes(folder):
    command = [sys.executable, "-m", "memformer", "generate", folder / "text", "--cpu"]
    done = subprocess.run([*command, "--prompt", "The ", "--tokens", "50"], capture_output=True)
    assert done.returncode == 0
    assert len(done.stdout) == 51  # and the end of the line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "one two"], "whole numbers below 17"),
        (["--prompt", "3 17"], "id 17"),
        (["--top-p", "0"], "top_p"),
    ],
)
def test_prompts_and_settings_that_make_no_sense(folder, options, message):
    assert message in run("generate", folder / "digits", "--cpu", *options, code=2)


def test_bench_writes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench, "bench_replay", lambda size, device: {"what": size, "on": device}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run("bench", "replay", "--out", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {"what": "small", "on": "cpu"}
    assert json.loads(run("bench", "replay", "--size", "paper"))["what"] == "paper"


def test_records_lists_all_and_prints_one():
    out = run("records")
    assert all(name in out for name in record_names())
    assert json.loads(run("records", record_names()[0]))["what"]
