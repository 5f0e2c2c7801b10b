"""The loop: a run in a folder, its log, its signals, and what it leaves behind."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from ..checks import MemoryOverflowError
from ..files import FileError, holding, replace_file
from ..lab.health import GradientByAge, slot_health
from ..lab.records import describe_machine
from .checkpoints import (
    CheckpointError,
    check_about,
    check_same_run,
    pack_learner,
    read_checkpoint,
    unpack_learner,
    write_checkpoint,
)
from .feeds import CorpusFeed, Feed, make_feed
from .learner import Learner, TrainingError, build_model
from .optimiser import learning_rate
from .recipes import Recipe, RecipeError
from .runs import CHECKPOINT, MODEL, RECORD, TOKENS
from .scores import evaluate, frontier
from .team import Team

SCORES = ("bits", "bits_wiped", "accuracy", "accuracy_wiped")
Tell = Callable[[dict[str, Any]], None]


class Run:
    """A run at one moment, and the file it is saved to and resumed from."""

    def __init__(
        self, recipe: Recipe, folder: str | Path, *, cpu: bool = False, feed: Feed | None = None
    ) -> None:
        self.recipe, self.team = recipe, Team(cpu=cpu)
        self.folder = Path(folder)
        self.checkpoint = self.folder / CHECKPOINT
        self.feed: Feed = make_feed(recipe) if feed is None else feed
        self.learner = Learner(build_model(recipe, self.feed.vocab_size), recipe, self.team)
        self.test = self.feed.test if isinstance(self.feed, CorpusFeed) else None
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []  # of every step, in nats a target
        self.log: list[dict[str, Any]] = []
        torch.manual_seed((recipe.seed + 1 + self.team.rank) % 2**63)  # dropout: each its own

    def save(self) -> None:
        """Write the checkpoint. Every process calls it, and the first one writes."""
        tensors = pack_learner(self.learner)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        text = None if self.feed.tokens is None else self.feed.tokens.to_json()
        about = {"recipe": asdict(self.recipe), "vocab_size": self.feed.vocab_size}
        about |= {"digest": self.feed.digest, "position": self.feed.position(), "text": text}
        about |= {"scaler": self.learner.scaler.state_dict(), "log": self.log}
        about |= {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        if self.team.leads:
            write_checkpoint(self.checkpoint, tensors, about)

    def resume(self) -> None:
        """Go on from the checkpoint in the folder, memory and random numbers included.

        Raises `CheckpointError` where it is damaged or of another run, and `RecipeError` where
        the run has made more steps already than the recipe asks for.
        """
        tensors, about = read_checkpoint(self.checkpoint)
        check_about(self.checkpoint, about)
        check_same_run(self.recipe, self.feed.digest, about)
        done = about["step"]
        if done > self.recipe.steps:
            raise RecipeError(
                f"steps is {self.recipe.steps}; this run has made {done} already. Set steps to "
                f"more than {done} to go on, or evaluate the run as it is"
            )
        losses = tensors.get("losses", torch.zeros(0))
        if losses.shape != (done,):
            raise CheckpointError(
                f"{self.checkpoint} holds {len(losses)} losses of {done} steps"
            )
        unpack_learner(self.learner, tensors, done)
        try:
            self.feed.seek(about["position"])
            self.learner.scaler.load_state_dict(about["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.checkpoint} does not say where the data stood: {error!r}"
            ) from None
        self.step, self.tokens, self.seconds = done, about["tokens"], about["seconds"]
        self.losses, self.log = losses.tolist(), about["log"]

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is due."""
        return self.step % every == 0 or self.step == self.recipe.steps


class Trainer(Run):
    """A run in a folder: `run()` trains it, after `resume()` from where it was saved.

    The folder gets `checkpoint.safetensors` while it trains and, at the end, `record.json` and
    `model/`. Raises `RecipeError`, `CorpusError`, `CheckpointError`, `TrainingError`, and
    `FileError` where the folder is in use or cannot be written.
    """

    def take_step(self) -> GradientByAge:
        """One update of the weights."""
        start, self.step = time.perf_counter(), self.step + 1
        segments, ages = self.feed.draw(), GradientByAge(self.learner.scaler.get_scale())
        rate = learning_rate(self.recipe, self.step)
        self.losses.append(self.learner.update(segments, rate, ages))
        self.tokens += sum(int(segment.mask.sum()) for segment in segments)
        self.seconds += time.perf_counter() - start
        return ages

    def observe(self, ages: GradientByAge) -> None:
        """Add a line to the log."""
        self.log.append(log_row(self, ages))

    def run(self, tell: Tell | None = None) -> bool:
        """Train to the end, or to a signal; whether it is the end. `tell` hears of the log."""
        with holding(self.folder) if self.team.leads else nullcontext():
            with stopping_at_signals(self.team), progress(self) as bar:
                while self.step < self.recipe.steps and not self.team.stops:
                    ages = self.take_step()
                    bar.update()
                    if self.due(self.recipe.log_every):
                        self.observe(ages)
                        tell_of(self, tell)
                    if self.due(self.recipe.save_every):
                        self.save()
                if self.team.stops:
                    self.save()
            if self.step == self.recipe.steps and self.team.leads:
                finish(self)
        return self.step == self.recipe.steps


@contextmanager
def stopping_at_signals(team: Team) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP only ask to stop after the step; a second one kills."""

    def ask(number: int, frame: Any) -> None:
        team.ask_to_stop()
        signal.signal(number, signal.SIG_DFL)

    before = {}
    with suppress(ValueError):  # not in the main thread: signals are somebody else's
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # there is no SIGHUP on Windows
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, ask)  # nohup ignores: let it
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell_of(run: Run, tell: Tell | None) -> None:
    """Tell of the last line of the log; where nobody listens any more, ask to stop."""
    if tell is None or not run.team.leads:
        return
    try:
        tell(run.log[-1])
    except BrokenPipeError:
        run.team.ask_to_stop()


def log_row(run: Run, ages: GradientByAge) -> dict[str, Any]:
    """How a run stands: the loss of late, and the health of the memory on a few streams.

    Raises `TrainingError` where the memory overflows while it is looked at.
    """
    recipe, model = run.recipe, run.learner.model
    recent = run.losses[-recipe.log_every :]
    row: dict[str, Any] = {"step": run.step, "loss": sum(recent) / len(recent)}
    row |= {"lr": learning_rate(recipe, run.step), "tokens": run.tokens}
    row |= {"seconds": round(run.seconds, 2), "gradient_by_age": ages.result()}
    try:
        row |= slot_health(model, run.feed.sample(min(16, recipe.batch_size)))
        row |= run.feed.report(model)
        if run.due(recipe.evaluate_every):
            row |= evaluate(model, recipe, run.test)
    except MemoryOverflowError as error:
        raise TrainingError(
            f"{error} (found while looking at the model after step {run.step}). Begin again "
            f"with a lower lr ({recipe.lr}) or clip ({recipe.clip}); the last checkpoint is "
            "from before"
        ) from None
    return row


def progress(run: Run) -> Any:
    """A bar with the time that is left, where there is a terminal to show it."""
    total, off = run.recipe.steps, None if run.team.leads else True
    return tqdm(initial=run.step, total=total, unit="step", disable=off, desc=run.recipe.name)


def record_of(run: Run) -> dict[str, Any]:
    """What a finished run says of itself."""
    recipe = run.recipe
    record = {"what": recipe.what, "recipe": asdict(recipe), "seed": recipe.seed}
    record |= {"machine": describe_machine(), "processes": run.team.size}
    record |= {"data": {"name": recipe.corpus, "sha256": run.feed.digest}, "tokens": run.tokens}
    record |= {"seconds": round(run.seconds, 1), "log": run.log}
    last: dict[str, Any] = run.log[-1] if run.log else {}
    record["score"] = {key: value for key, value in last.items() if key in SCORES}
    if any("hardest" in row for row in run.log):
        keys = ("step", "seconds", "hardest", "hardest_accuracy")
        rows = [[row.get(key) for key in keys] for row in run.log]
        columns = ["step", "seconds", "segments", "accuracy"]
        record["curve"] = {"columns": columns, "rows": rows}
    if recipe.frontier:
        record["frontier"] = frontier(run.learner.model, recipe)
    return record


def finish(run: Run) -> None:
    """Write what a run leaves behind: its record, and a model for `from_pretrained`."""
    folder = run.folder
    replace_file(folder / RECORD, (json.dumps(record_of(run)) + "\n").encode())
    try:
        with TemporaryDirectory(dir=folder) as scratch:
            run.learner.model.save_pretrained(scratch)
            if run.feed.tokens is not None:
                text = run.feed.tokens.to_json()
                (Path(scratch) / TOKENS).write_text(text, encoding="utf-8")
            for file in sorted(Path(scratch).iterdir()):
                replace_file(folder / MODEL / file.name, file.read_bytes())
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise FileError(
            f"the model could not be written to {folder / MODEL}: {error}. The checkpoint is "
            "whole; make room, and call again with --resume"
        ) from error
