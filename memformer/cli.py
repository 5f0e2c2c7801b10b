"""The command line: `memformer` or `python -m memformer`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate and run transformers with a memory made of slots.",
    epilog="Exit codes: 0 done; 1 the run failed; 2 the request cannot be met as given; "
    "3 trouble with a checkpoint or a file; 75 stopped by a signal and saved, go on with "
    "--resume.",
)

Cpu = Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")]
Change = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting: lr=3e-4, model.dim=128."
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]


def say(text: str, *, error: bool = False) -> None:
    """Print a line as it is: what a user wrote is never read as markup."""
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def fail(code: int, error: Exception | str) -> NoReturn:
    """Print what is wrong, and leave."""
    say(f"error: {error}", error=True)
    raise typer.Exit(code)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors that we know become a sentence and an exit code; the others keep their traceback."""
    from memformer.checks import MemoryOverflowError
    from memformer.files import FileError
    from memformer.tasks import CorpusError
    from memformer.training import CheckpointError, RecipeError, TrainingError

    try:
        yield
    except (RecipeError, CorpusError) as error:
        fail(2, error)
    except (CheckpointError, FileError) as error:
        fail(3, error)
    except (TrainingError, MemoryOverflowError) as error:
        fail(1, error)
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        hush()
        raise typer.Exit(0) from None


def hush() -> None:
    """Print nowhere from now on, so that leaving does not fail at a closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def line(row: dict[str, Any]) -> str:
    """A row of the log for people."""
    parts = [f"step {row['step']}", f"loss {row['loss']:.4f}"]
    for key in ("bits", "bits_wiped", "accuracy", "accuracy_wiped", "hardest_accuracy"):
        if key in row:
            parts.append(f"{key.replace('_', ' ')} {row[key]:.3f}")
    parts.append(f"kept {row['self_weight']:.2f}, slots worth {row['slots']:.1f}")
    return "  ".join([*parts, f"{row['tokens'] / max(row['seconds'], 1e-9):,.0f} tokens/s"])


def write_line(row: dict[str, Any]) -> None:
    """Print a row of the log above the bar, at once. Raises `BrokenPipeError`."""
    from tqdm import tqdm

    tqdm.write(line(row), file=sys.stdout)
    sys.stdout.flush()


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A JSON file, or a preset: tiny, recall, stories, paper, …"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; runs/<name of the recipe> if not given."),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Train on this: your own file, folder or 'pattern*', or a hub id."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint.")
    ] = False,
    change: Change = None,
    cpu: Cpu = False,
) -> None:
    """Train by a recipe; the folder holds a checkpoint, then a record and the model.

    A run may be killed at any moment and goes on with --resume as if nothing had happened.
    On your own text: memformer train tiny --corpus notes.txt. For the fair opponent of a
    memory: --set memory=off. On several devices: torchrun --nproc-per-node 2 -m memformer
    train …, or accelerate launch -m memformer train …
    """
    from memformer.files import holding
    from memformer.training import CheckpointError, Trainer, load_recipe
    from memformer.training.feeds import own_path

    with exit_codes():
        named = [] if corpus is None else [f"corpus={json.dumps(own_path(corpus))}"]
        plan = load_recipe(recipe, [*(change or ()), *named])
        folder = out or Path("runs") / plan.name
        leads = int(os.environ.get("RANK", "0")) == 0
        with holding(folder) if leads else no_lock():
            begun = (folder / "checkpoint.safetensors").is_file()
            if begun and not resume:
                raise CheckpointError(
                    f"{folder} holds a run already; go on with --resume, or choose another "
                    "--out"
                )
            trainer = Trainer(plan, folder, cpu=cpu)
            if resume:
                trainer.resume()
            done = trainer.run(write_line)
        if not done:
            try:
                say(f"stopped after step {trainer.step}; go on with --resume")
            except BrokenPipeError:
                hush()
            raise typer.Exit(75)
        if trainer.team.leads:
            say(f"done: {folder}/record.json, {folder}/model/")


@contextmanager
def no_lock() -> Iterator[None]:
    """What a process holds that is not the first of its team."""
    yield


@app.command()
def sweep(
    recipe: Annotated[
        str, typer.Argument(help="A JSON file or preset with variants, a grid or seeds.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The record; runs/<name>/record.json if not given.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where single runs are kept; runs/<name>/.")
    ] = None,
    change: Change = None,
    cpu: Cpu = False,
) -> None:
    """Train every variant with every seed; the record has one row for each.

    May be killed at any moment; the same command goes on where it was.
    """
    from memformer.training import load_sweep, run_sweep
    from memformer.training.recipes import check_name

    with exit_codes():
        plan = load_sweep(recipe, change or ())
        check_name(plan.name)
        folder = work or Path("runs") / plan.name
        record = out or folder / "record.json"
        say(f"{len(plan.members)} runs")
        if not run_sweep(plan, record, folder, cpu=cpu, tell=say):
            say("stopped; the same command goes on")
            raise typer.Exit(75)
        say(f"done: {record}")


@app.command()
def evaluate(
    run: RunFolder,
    without: Annotated[
        Path | None,
        typer.Option(help="A run with memory=off to compare with; else one beside it."),
    ] = None,
    change: Change = None,
    cpu: Cpu = False,
) -> None:
    """Score a run on held-out data, beside both controls; prints JSON.

    …_wiped is the same model, its memory wiped at every segment; …_trained_without is the same
    recipe with memory=off, where there is such a run.
    """
    from memformer.training import score_run

    with exit_codes():
        score = score_run(run, change or (), without=without, cpu=cpu)
        print(json.dumps(score))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved model.")],
    prompt: Annotated[
        str,
        typer.Option(help="Text, or ids with spaces between, to go on from; - reads it."),
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to draw.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw from the likeliest that hold p.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="The same seed draws the same tokens."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print ids, also of text.")] = False,
    cpu: Cpu = False,
) -> None:
    """Draw from a run's model, in constant memory however long; prints as it draws.

    Models of text read and write text; models of anything else read and write ids.
    """
    from itertools import islice

    from memformer.streaming import generate_forever
    from memformer.training import RecipeError, load_model

    with exit_codes():
        model, known = load_model(run, cpu=cpu)
        text = None if ids else known
        read = read_prompt(standard_input() if prompt == "-" else prompt, model, text)
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        try:
            drawn = islice(generate_forever(model, read, seed=seed, **how), tokens)
            for token in drawn:
                number = int(token[0])
                piece = f"{number} ".encode() if text is None else text.decode([number])
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except ValueError as error:  # a setting of the draw
            raise RecipeError(str(error)) from None
        print(flush=True)


def standard_input() -> str:
    """All of standard input as text, without its last newline. Raises `RecipeError`."""
    from memformer.training import RecipeError

    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the prompt on standard input is not UTF-8 text: byte {error.start} cannot be read"
        ) from None


def read_prompt(prompt: str, model: Any, text: Any) -> Any:
    """`(1, 1 + N)` ids: the start token, then what the prompt says. Raises `RecipeError`."""
    import torch

    from memformer.training import RecipeError

    start = model.config.start
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes that the shell gave us and that are no text
        raise RecipeError(
            "the prompt is not UTF-8 text; set the terminal to UTF-8, or give ids"
        ) from None
    try:
        ids = text.encode(prompt).tolist() if text else [int(word) for word in prompt.split()]
    except ValueError:
        raise RecipeError(
            f"the prompt is {prompt[:80]!r}; this model reads ids, whole numbers below {start}, "
            "with spaces between"
        ) from None
    wrong = [number for number in ids if not 0 <= number < start]
    if wrong:
        raise RecipeError(f"the prompt holds id {wrong[0]}; ids must be in [0, {start})")
    return torch.tensor([[start, *ids]], device=next(model.parameters()).device)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="replay (training) or stream (generation).")],
    size: Annotated[str, typer.Option(help="small, or paper, for a GPU.")] = "small",
    out: Annotated[
        Path | None, typer.Option(help="Write the record here, not to the screen.")
    ] = None,
    cpu: Cpu = False,
) -> None:
    """Measure what replay or streaming costs on this machine; ratios, taken in one run."""
    import torch

    from memformer.files import FileError, probe_writable, replace_file
    from memformer.lab import bench as benchmarks
    from memformer.training import RecipeError

    known: dict[str, Any] = {
        "replay": benchmarks.bench_replay,
        "stream": benchmarks.bench_stream,
    }
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    with exit_codes():
        if what not in known:
            raise RecipeError(f"no benchmark {what!r}; there are {', '.join(known)}")
        if size not in benchmarks.SIZES:
            raise RecipeError(f"no size {size!r}; there are {', '.join(benchmarks.SIZES)}")
        if out is not None:  # before minutes of work
            if out.is_dir():
                raise FileError(f"{out} is a folder; name a file for the record")
            probe_writable(out.parent)
        record = json.dumps(known[what](size, device))
        if out is None:
            print(record)
            return
        try:
            replace_file(out, (record + "\n").encode())
        except FileError:
            print(record)  # so that the work is not lost
            raise
        say(f"done: {out}")


@app.command()
def records(
    name: Annotated[str | None, typer.Argument(help="Print this one whole, as JSON.")] = None,
) -> None:
    """List the records of finished runs that come with the package."""
    from memformer.lab.records import load_record, record_names

    with exit_codes():
        if name is not None:
            if name not in record_names():
                fail(2, f"no record {name!r}; there are {', '.join(record_names())}")
            print(json.dumps(load_record(name), indent=2))
            return
        table = Table("record", "what", "device", "seconds")
        for known in record_names():
            record = load_record(known)
            device = record.get("machine", {}).get("device", "")
            seconds = f"{record.get('seconds', 0):,.0f}"
            table.add_row(known, record.get("what", ""), device, seconds)
        Console(markup=False).print(table)


def main() -> None:
    """What the command `memformer` runs."""
    app(prog_name="memformer")
