"""Feeds: where a step's segments come from, and how a run finds its place again."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..segments import DocumentStreams, Segment
from ..tasks.corpora import Corpus, load_corpus
from ..tasks.mqar import MQARTask
from ..tasks.recall import Curriculum
from ..tasks.scoring import recall_accuracy
from ..tasks.tokens import Tokens
from .recipes import TASKS, Recipe, RecipeError, growth_of, task_of


class Feed(Protocol):
    """Training data. Write your own with these, and give it to a `Trainer`."""

    vocab_size: int
    digest: str  # of the data, so that a run resumes on no other
    tokens: Tokens | None  # how text became ids; None where it was no text

    def draw(self) -> list[Segment]:
        """The segments of the next step, `batch_size` rows each."""

    def position(self) -> dict[str, Any]:
        """Where it stands, as JSON."""

    def seek(self, position: dict[str, Any]) -> None:
        """Go to where `position` was taken."""

    def report(self, model: Any) -> dict[str, Any]:
        """Look at the model, and say for the log what follows for the data."""

    def sample(self, rows: int) -> list[Segment]:
        """Some streams to look at the memory with, the same on each call."""


class CorpusFeed:
    """Horizon after horizon through a corpus, pass after pass, each in a new order.

    Documents longer than a lane's fair share are cut, so that every stream has something to
    read: a single book fills a batch.
    """

    def __init__(self, corpus: Corpus, recipe: Recipe, test: Corpus | None = None) -> None:
        self.corpus, self.recipe, self.test = corpus, recipe, test
        self.vocab_size, self.digest = corpus.vocab_size, corpus.sha256()
        self.tokens = corpus.tokens
        self.seek({"epoch": 0, "segment": 0})

    def seek(self, position: dict[str, Any]) -> None:
        """Go to where `position` was taken."""
        self.epoch, self.segment = position["epoch"], position["segment"]
        recipe, order = self.recipe, self.recipe.seed + self.epoch
        streams = DocumentStreams(
            self.corpus, recipe.batch_size, recipe.segment_length, order, split_long=True
        )
        self.segments = itertools.islice(streams, self.segment, None)

    def position(self) -> dict[str, Any]:
        """Where it stands, as JSON."""
        return {"epoch": self.epoch, "segment": self.segment}

    def draw(self) -> list[Segment]:
        """The next segments of all streams: a horizon, or what is left of a pass."""
        drawn = list(itertools.islice(self.segments, self.recipe.horizon))
        if not drawn:
            self.seek({"epoch": self.epoch + 1, "segment": 0})
            return self.draw()
        self.segment += len(drawn)
        return drawn

    def report(self, model: Any) -> dict[str, Any]:
        """What a look at the model changes about the data: nothing."""
        return {}

    def sample(self, rows: int) -> list[Segment]:
        """The first horizon of the test split."""
        length = self.recipe.segment_length
        streams = DocumentStreams(self.test or self.corpus, rows, length, split_long=True)
        return list(itertools.islice(streams, self.recipe.horizon))


class TaskFeed:
    """Whole documents of a task, drawn afresh for every step.

    Every step has its own seed, so no generator is to be kept. Tasks with `segments` grow in
    length with success, by a `Curriculum`, and those with `pairs` also mix in fewer pairs.
    """

    tokens: Tokens | None = None

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.step = recipe, 0
        self.task = task_of(recipe)
        self.vocab_size: int = self.task.vocab_size
        self.digest = f"generated {sorted(asdict(self.task).items())}"
        self.curriculum: Curriculum | None = None
        if not isinstance(self.task, MQARTask):
            kind = Curriculum if recipe.corpus == "recall" else LengthCurriculum
            try:
                self.curriculum = kind(self.task, **growth_of(recipe))
            except ValueError as error:
                raise RecipeError(f"task: {error}") from None

    def seek(self, position: dict[str, Any]) -> None:
        """Go to where `position` was taken."""
        self.step = position["step"]
        if self.curriculum is not None:
            self.curriculum.limit = position["limit"]
            self.curriculum.formed = position["formed"]

    def position(self) -> dict[str, Any]:
        """Where it stands, as JSON."""
        if self.curriculum is None:
            return {"step": self.step}
        limit, formed = self.curriculum.limit, self.curriculum.formed
        return {"step": self.step, "limit": limit, "formed": formed}

    def draw(self) -> list[Segment]:
        """Fresh problems."""
        self.step += 1
        seed = (self.recipe.seed * 1_000_003 + self.step) % 2**63
        task = self.task
        if self.curriculum is not None:
            self.curriculum.random.seed(seed)
            task = self.curriculum.draw()
        drawn: list[Segment] = task.batch(
            self.recipe.batch_size, torch.Generator().manual_seed(seed)
        )
        return drawn

    @property
    def hardest(self) -> Any:
        """The hardest task so far."""
        return self.task if self.curriculum is None else self.curriculum.hardest

    def report(self, model: Any) -> dict[str, Any]:
        """Try the hardest task so far, and let the curriculum grow if it is solved."""
        hardest = self.hardest
        wipe = self.recipe.memory == "off"
        accuracy = recall_accuracy(model, hardest, trials=64, seed=self.step, wipe=wipe)
        if self.curriculum is not None:
            self.curriculum.report(accuracy)
        return {"hardest": hardest.segments, "hardest_accuracy": accuracy}

    def sample(self, rows: int) -> list[Segment]:
        """Problems of the hardest task so far."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        drawn: list[Segment] = self.hardest.batch(rows, generator)
        return drawn


class LengthCurriculum(Curriculum):
    """The same for tasks that are told in sentences: lengths grow, all facts are always there."""

    def draw(self) -> Any:
        """The next task; lengths are drawn evenly on a logarithmic scale."""
        span = self.limit / self.least
        return replace(self.goal, segments=round(self.least * span ** self.random.random()))


def make_feed(recipe: Recipe) -> CorpusFeed | TaskFeed:
    """The training data of a recipe. Raises `CorpusError` where there are none."""
    if recipe.corpus in TASKS:
        return TaskFeed(recipe)
    how: dict[str, Any] = {"limit": recipe.limit, "tokens": recipe.tokens}
    corpus = load_corpus(recipe.corpus, "train", **how)
    return CorpusFeed(corpus, recipe, held_out(recipe, corpus.tokens))


def held_out(recipe: Recipe, tokens: Tokens | None = None) -> Corpus | None:
    """The test split of a recipe's corpus; None for tasks, whose problems are always fresh.

    `tokens` are those of the training split, where they were learned.
    """
    if recipe.corpus in TASKS:
        return None
    return load_corpus(recipe.corpus, "test", tokens=tokens or recipe.tokens)


def own_path(corpus: str) -> str:
    """A corpus named on the command line: what lies there as a file or folder is meant as such."""
    from ..tasks.corpora import EMBEDDED, HUB, names_files

    known = corpus in EMBEDDED or corpus in HUB or corpus in TASKS or names_files(corpus)
    try:
        there = "/" not in corpus and Path(corpus).exists()
    except (OSError, ValueError):
        there = False
    return f"./{corpus}" if there and not known else corpus
