"""Associative recall across segments: pairs of symbols are told, and later asked for."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..segments import IGNORE, Segment
from ..settings import Field, Share, settings
from .scoring import Problems, as_segments

KEYS, VALUES, QUERY, NOISE = range(0, 16), range(16, 32), 32, range(33, 49)
RECALL_VOCAB = 49


def interleave(left: Tensor, right: Tensor) -> Tensor:
    """`(B, P)` and `(B, P)` → `(B, 2 P)`: left, right, left, right, …"""
    return torch.stack((left, right), dim=-1).flatten(1)


class Told(NamedTuple):
    """What the problems of a batch are about, `(B, pairs)` each."""

    keys: Tensor
    values: Tensor  # the value that counts: the last one that was told
    age: Tensor  # segments from where it was told to the first that asks


@settings()
class RecallTask:
    """Associative recall: pairs, each a key followed by its value, noise, and queries at the end.

    All segments are `length` tokens long (None: just long enough for all pairs). The last one,
    or the last few where they do not fit, hold the keys in a new order, each followed by
    `QUERY`, and ask for its value at the key.

    `arrival="first"` tells all pairs at the start, `"any"` at places drawn over all segments
    before the queries. A share `overwrite` of the keys is told twice, with another value; the
    last one counts. `noise` is drawn from ids of its `own`, or from keys and values
    (`shared`). Raises `ValueError` where the segments cannot hold what is to be told.
    """

    pairs: Annotated[int, Field(ge=1, le=len(KEYS))]
    segments: Annotated[int, Field(ge=2)]
    noise: Literal["own", "shared"] = "own"
    arrival: Literal["first", "any"] = "first"
    overwrite: Share = 0.0
    length: Annotated[int, Field(ge=2)] | None = None

    def __post_init__(self) -> None:
        if self.length is not None and self.length % 2:
            raise ValueError(f"length is {self.length}; it must be even, to hold whole pairs")
        room = self.told_segments * self.pairs_a_segment
        if self.told_segments < 1 or self.tellings > room:
            raise ValueError(
                f"segments is {self.segments}; {self.asked_segments} ask, and the others hold "
                f"{max(0, room)} pairs, so {self.tellings} cannot be told. Take more segments, "
                "or a greater length"
            )

    @property
    def vocab_size(self) -> int:
        """How many ids its problems are made of."""
        return RECALL_VOCAB

    @property
    def segment_length(self) -> int:
        """Tokens a segment."""
        return 2 * self.pairs if self.length is None else self.length

    @property
    def pairs_a_segment(self) -> int:
        return self.segment_length // 2

    @property
    def asked_segments(self) -> int:
        """How many of the last segments ask."""
        return -(-self.pairs // self.pairs_a_segment)

    @property
    def told_segments(self) -> int:
        return self.segments - self.asked_segments

    @property
    def told_again(self) -> int:
        """How many keys are told twice."""
        return round(self.overwrite * self.pairs)

    @property
    def tellings(self) -> int:
        return self.pairs + self.told_again

    def batch(self, batch_size: int, generator: torch.Generator) -> list[Segment]:
        """`segments` timesteps of `batch_size` fresh problems; only the last ask."""
        return self.draw(batch_size, generator).segments

    def draw(self, batch_size: int, generator: torch.Generator) -> Problems:
        """The same, with the age of every answer."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        shape = batch_size, self.pairs
        deck = torch.rand(batch_size, len(KEYS), generator=generator).argsort(dim=1)
        keys = deck[:, : self.pairs]
        values = torch.randint(VALUES.start, VALUES.stop, shape, generator=generator)
        order = torch.rand(shape, generator=generator).argsort(dim=1)
        noise = self._noise(deck, generator)
        told = self._tell(noise, keys, values, generator)
        return self._ask(noise, Told(*(part.gather(1, order) for part in told)))

    def _noise(self, deck: Tensor, generator: torch.Generator) -> Tensor:
        """`(B, N)` tokens for all that is read before the queries, before anything is told.

        Noise that is `shared` may say what looks like a pair. Where the last telling counts it
        would overwrite them, so its keys are then those that nobody asks for.
        """
        size = deck.shape[0], self.told_segments * self.segment_length
        low, high = (NOISE.start, NOISE.stop) if self.noise == "own" else (0, QUERY)
        noise = torch.randint(low, high, size, generator=generator)
        if self.noise == "own" or (self.arrival == "first" and not self.told_again):
            return noise
        spare = deck[:, self.pairs :]  # keys that are not asked for
        if not spare.shape[1]:  # every key is asked for: only values can be noise
            return torch.where(noise < VALUES.start, noise + VALUES.start, noise)
        other = spare.gather(1, noise % spare.shape[1])
        return torch.where(noise < VALUES.start, other, noise)

    def _tell(
        self, noise: Tensor, keys: Tensor, values: Tensor, generator: torch.Generator
    ) -> Told:
        """Write all pairs into `noise`, in place."""
        batch_size, again = keys.shape[0], self.told_again
        if self.arrival == "any":
            room = self.told_segments * self.pairs_a_segment
            scores = torch.rand(batch_size, room, generator=generator)
            places = scores.argsort(dim=1)[:, : self.tellings]
        else:
            places = torch.arange(self.tellings).expand(batch_size, -1).clone()
        first, last = places[:, : self.pairs].clone(), places[:, : self.pairs].clone()
        if again:
            one, two = first[:, :again], places[:, self.pairs :]
            first[:, :again], last[:, :again] = torch.minimum(one, two), torch.maximum(one, two)
            step = torch.randint(1, len(VALUES), (batch_size, again), generator=generator)
            old = (values[:, :again] - VALUES.start + step) % len(VALUES) + VALUES.start
            noise.scatter_(1, 2 * first[:, :again], keys[:, :again])
            noise.scatter_(1, 2 * first[:, :again] + 1, old)
        noise.scatter_(1, 2 * last, keys)
        noise.scatter_(1, 2 * last + 1, values)
        return Told(keys, values, self.told_segments - last // self.pairs_a_segment)

    def _ask(self, told_tokens: Tensor, asked: Told) -> Problems:
        """Cut what was told into segments, and put the queries behind them."""
        length, number = self.segment_length, self.asked_segments
        size = asked.keys.shape[0], number * length
        tokens = torch.full(size, QUERY)
        targets, ages = torch.full(size, IGNORE), torch.full(size, IGNORE)
        place = 2 * torch.arange(self.pairs)
        tokens[:, place], targets[:, place] = asked.keys, asked.values
        ages[:, place] = asked.age + place // length  # those asked later are older
        silent = torch.full_like(told_tokens, IGNORE)
        whole = [
            torch.split(torch.cat(parts, dim=1), length, dim=1)
            for parts in ((told_tokens, tokens), (silent, targets), (silent, ages))
        ]
        return Problems(as_segments(whole[0], whole[1]), list(whole[2]))


class Curriculum:
    """Draws a task a step: all pairs first, then longer documents with any number of pairs.

    Documents have at most `limit` segments. It starts at `start` and grows by a quarter
    whenever `report` hears of an accuracy above `threshold` on the hardest task so far.
    Until that has happened once, every draw holds all pairs: few pairs teach a shortcut.
    """

    def __init__(
        self,
        goal: RecallTask,
        *,
        start: int | None = None,
        threshold: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.least = shortest(goal)
        start = self.least if start is None else start
        if not self.least <= start <= goal.segments:
            raise ValueError(f"start is {start}; it must be in {self.least}…{goal.segments}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; it must be between 0 and 1")
        self.goal, self.limit, self.threshold = goal, start, threshold
        self.formed = False  # whether the hardest task has been solved once
        self.random = random.Random(seed)

    @property
    def hardest(self) -> RecallTask:
        """All pairs over as many segments as the limit now allows."""
        return replace(self.goal, segments=self.limit)

    def draw(self) -> RecallTask:
        """The next task; segments are drawn evenly on a logarithmic scale."""
        least = 1 if self.formed else self.goal.pairs
        pairs = self.random.randint(least, self.goal.pairs)
        span = self.limit / self.least
        segments = round(self.least * span ** self.random.random())
        return replace(self.goal, pairs=pairs, segments=segments)

    def report(self, accuracy: float) -> None:
        """Raise the limit if the hardest task is solved."""
        if accuracy > self.threshold:
            self.formed = True
            self.limit = min(self.goal.segments, max(self.limit + 1, self.limit * 5 // 4))


def shortest(goal: Any) -> int:
    """The fewest segments over which all of a task's pairs can be told and asked for."""
    for segments in range(2, goal.segments + 1):
        try:
            replace(goal, segments=segments)
        except ValueError:
            continue
        return segments
    return int(goal.segments)
