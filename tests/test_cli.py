"""The command line: what it prints, and the codes it leaves with."""

import json
import re
import subprocess
import sys

import pytest
import torch
from test_training import RECALL, SMALL
from typer.testing import CliRunner

from memformer.cli import app
from memformer.lab import bench
from memformer.lab.records import record_names
from memformer.model import MemformerLM

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
    for command in ("train", "sweep", "evaluate", "generate", "bench", "records"):
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
        found = {p.name for p in (folder / name).iterdir()}
        assert found == {
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
        (["train", "tiny", "--set", "name=../../escape"], "letters, digits"),
        (["train", "tiny", "--set", "name=[/x]"], "name is '[/x]'"),
        (["train", "tiny", "--set", ".lr=1"], "names no setting"),
        (
            ["train", "tiny", "--set", "seed=18446744073709551616"],
            "seed is 18446744073709551616",
        ),
        (["train", "tiny", "--corpus", "[/red].txt"], "'[/red].txt': there is no such file"),
        (["train", "recall-ablations"], "memformer sweep recall-ablations"),
        (["sweep", "nowhere"], "no recipe 'nowhere'"),
        (["records", "../recipes/tiny"], "no record '../recipes/tiny'"),
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


# --- your own text, from the command line ---------------------------------------------------


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A run of a single file, in pieces, beside one trained without memory."""
    folder = tmp_path_factory.mktemp("notes")
    (folder / "notes.txt").write_text("mary is in the gärden\n" * 300, encoding="utf-8")
    recipe = folder / "r.json"
    recipe.write_text(json.dumps(SMALL | {"steps": 4, "limit": None, "tokens": "bpe:270"}))
    for name, memory in (("with", "on"), ("without", "off")):
        change = f"memory={memory}"
        more = ["--corpus", folder / "notes.txt", "--out", folder / name, "--set", change]
        run("train", recipe, *more, "--cpu")
    return folder


def test_your_own_text_is_trained_scored_and_written(notes):
    score = json.loads(run("evaluate", notes / "with", "--cpu"))
    assert {"bits", "bits_wiped", "bits_trained_without", "without"} <= set(score)
    assert (notes / "with" / "model" / "tokens.json").is_file()
    likeliest = ("--tokens", 9, "--temperature", 0, "--prompt", "mary is", "--cpu")
    from_run = call("generate", notes / "with", *likeliest)
    assert from_run.returncode == 0, from_run.stderr
    assert from_run.stdout == call("generate", notes / "with" / "model", *likeliest).stdout
    piped = [*likeliest[:4], "--prompt", "-", "--cpu"]
    assert (
        call("generate", notes / "with", *piped, input=b"mary is\n").stdout == from_run.stdout
    )


def call(*arguments, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "memformer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, **options)


def test_a_prompt_that_is_no_text_is_answered(notes):
    done = call(
        "generate", notes / "with", "--prompt", b"\xff".decode(errors="surrogateescape")
    )
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr
    done = call("generate", notes / "with", "--prompt", "-", input=b"a\xff")
    assert done.returncode == 2
    assert b"byte 1 cannot be read" in done.stderr


def test_a_larger_vocabulary_than_the_models_is_answered(folder):
    out = run("evaluate", folder / "digits", "--set", "corpus=python-reference", code=2)
    assert "257 ids; the model knows 18" in out


def test_a_folder_of_text_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books here").mkdir()
    (tmp_path / "books here" / "[a].txt").write_text("once upon a time\n" * 50)
    (tmp_path / "r.json").write_text(json.dumps(SMALL | {"steps": 2, "limit": None}))
    run("train", "r.json", "--corpus", "books here", "--cpu")
    record = json.loads((tmp_path / "runs" / "r" / "record.json").read_text())
    assert record["data"]["name"] == "./books here"


def test_where_nothing_can_be_written_no_work_is_begun(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(bench, "bench_replay", lambda *_: pytest.fail("the work was begun"))
    for out in (tmp_path / "file" / "r.json", tmp_path):
        message = run("bench", "replay", "--out", out, code=3)
        assert "written" in message or "is a folder" in message
    message = run("train", "tiny", "--cpu", "--out", tmp_path / "file" / "run", code=3)
    assert "nothing can be written" in message


def test_a_record_that_can_no_longer_be_written_is_printed(tmp_path, monkeypatch):
    def work(size, device):
        (tmp_path / "out").rmdir()
        (tmp_path / "out").write_text("")
        return {"precious": 1}

    monkeypatch.setattr(bench, "bench_replay", work)
    assert '{"precious": 1}' in run(
        "bench", "replay", "--out", tmp_path / "out" / "r.json", code=3
    )


def test_a_sweep_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = RECALL | {"steps": 2, "seeds": [0, 1], "variants": {"[red]": {}}}
    (tmp_path / "s.json").write_text(json.dumps(settings))
    out = run("sweep", "s.json", "--cpu", "--out", "record.json")
    assert "[red], seed=1" in out
    assert len(json.loads((tmp_path / "record.json").read_text())["results"]) == 2
    assert (tmp_path / "runs" / "s").is_dir()
