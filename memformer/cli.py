"""The command line: `memformer` or `python -m memformer`."""

from __future__ import annotations

import json
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
    "3 trouble with a checkpoint; 75 stopped by a signal and saved, go on with --resume.",
)
console = Console()

Cpu = Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")]
Change = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting: lr=3e-4, model.dim=128."
    ),
]


def fail(code: int, error: Exception) -> NoReturn:
    """Print what is wrong, and leave."""
    Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors that we know become a sentence and an exit code; the others keep their traceback."""
    from memformer.segments import CorpusError
    from memformer.training import CheckpointError, RecipeError, TrainingError

    try:
        yield
    except (RecipeError, CorpusError) as error:
        fail(2, error)
    except CheckpointError as error:
        fail(3, error)
    except TrainingError as error:
        fail(1, error)


def line(row: dict[str, Any]) -> str:
    """A row of the log for people."""
    parts = [f"step {row['step']}", f"loss {row['loss']:.4f}"]
    for key in ("bits", "bits_wiped", "accuracy", "accuracy_wiped", "hardest_accuracy"):
        if key in row:
            parts.append(f"{key.replace('_', ' ')} {row[key]:.3f}")
    parts.append(f"kept {row['self_weight']:.2f}, slots worth {row['slots']:.1f}")
    return "  ".join([*parts, f"{row['tokens'] / max(row['seconds'], 1e-9):,.0f} tokens/s"])


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A JSON file, or a preset: tiny, recall, paper.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; runs/<name of the recipe> if not given."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint.")
    ] = False,
    change: Change = None,
    cpu: Cpu = False,
) -> None:
    """Train by a recipe; the folder holds a checkpoint, then a record and the model.

    A run may be killed at any moment and goes on with --resume as if nothing had happened.
    On several devices: torchrun --nproc-per-node 2 -m memformer train …
    """
    from tqdm import tqdm

    from memformer.training import CheckpointError, Trainer, load_recipe

    with exit_codes():
        plan = load_recipe(recipe, change or ())
        folder = out or Path("runs") / plan.name
        begun = (folder / "checkpoint.safetensors").is_file()
        if begun and not resume:
            raise CheckpointError(
                f"{folder} holds a run already; go on with --resume, or choose another --out"
            )
        trainer = Trainer(plan, folder, cpu=cpu)
        if resume:
            trainer.resume()
        if not trainer.run(lambda row: tqdm.write(line(row), file=sys.stdout)):
            console.print(f"stopped after step {trainer.step}; go on with --resume")
            raise typer.Exit(75)
    if trainer.team.leads:
        console.print(f"done: {folder}/record.json, {folder}/model/")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    change: Change = None,
    cpu: Cpu = False,
) -> None:
    """Score a run on held-out data, with memory and with memory wiped; prints JSON."""
    from memformer import training

    with exit_codes():
        model, recipe, step = training.load_run(run, change or (), cpu=cpu)
        score = training.evaluate(model, recipe, training.held_out(recipe))
    print(json.dumps({"run": str(run), "step": step, **score}))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    prompt: Annotated[
        str, typer.Option(help="Text, or ids with spaces between, to go on from.")
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
        int | None, typer.Option(help="The same seed draws the same tokens.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print ids, also of text.")] = False,
    cpu: Cpu = False,
) -> None:
    """Draw from a run's model, in constant memory however long; prints as it draws.

    Models of text read and write bytes; models of anything else read and write ids.
    """
    from itertools import islice

    from memformer.streaming import generate_forever
    from memformer.training import RecipeError, load_run

    with exit_codes():
        model, recipe, _ = load_run(run, cpu=cpu)
        start = model.config.start
        as_text = model.config.vocab_size == 257 and recipe.corpus != "mnist" and not ids
        read = read_prompt(prompt, start, as_text).to(next(model.parameters()).device)
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        try:
            drawn = islice(generate_forever(model, read, **how), tokens)
        except ValueError as error:  # a setting of the draw
            raise RecipeError(str(error)) from None
    for token in drawn:
        piece = int(token[0])
        if as_text:
            sys.stdout.buffer.write(bytes([piece]) if piece < 256 else b"\n")
        else:
            sys.stdout.buffer.write(f"{piece} ".encode())
        sys.stdout.buffer.flush()
    print()


def read_prompt(prompt: str, start: int, as_text: bool) -> Any:
    """`(1, 1 + N)` ids: the start token, then bytes or ids. Raises `RecipeError`."""
    import torch

    from memformer.training import RecipeError

    try:
        ids = list(prompt.encode()) if as_text else [int(word) for word in prompt.split()]
    except ValueError:
        raise RecipeError(
            f"the prompt is {prompt!r}; this model reads ids, whole numbers below {start}, with "
            "spaces between"
        ) from None
    wrong = [number for number in ids if not 0 <= number < start]
    if wrong:
        raise RecipeError(f"the prompt holds id {wrong[0]}; ids must be in [0, {start})")
    return torch.tensor([[start, *ids]])


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

    from memformer import bench as benchmarks
    from memformer.training import RecipeError, replace_file

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
        record = json.dumps(known[what](size, device))
        if out is None:
            print(record)
        else:
            replace_file(out, (record + "\n").encode())
            console.print(f"done: {out}")


@app.command()
def records(
    name: Annotated[str | None, typer.Argument(help="Print this one whole, as JSON.")] = None,
) -> None:
    """List the records of finished runs that come with the package."""
    from memformer.records import load_record, record_names

    if name is not None:
        try:
            print(json.dumps(load_record(name), indent=2))
        except FileNotFoundError as error:
            fail(2, error)
        return
    table = Table("record", "what", "device", "seconds")
    for known in record_names():
        record = load_record(known)
        device = record.get("machine", {}).get("device", "")
        table.add_row(known, record.get("what", ""), device, f"{record.get('seconds', 0):,.0f}")
    console.print(table)


def main() -> None:
    """What the command `memformer` runs."""
    app(prog_name="memformer")
