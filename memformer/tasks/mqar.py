"""Recall as zoology measures it: many pairs at the start, queries scattered over what follows.

Multi-query associative recall (Arora et al. 2023): `pairs` keys with values stand at the
start; later each key comes back once, at a distance drawn from a power law, and its value is
to be predicted at that place. Here the sequence is cut into segments.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..segments import IGNORE, Segment
from ..settings import Count, Field, settings
from .scoring import Problems, as_segments


@settings()
class MQARTask:
    """Pairs at the start of a sequence of `size` tokens, and queries with power-law gaps.

    Half of the `vocabulary` are keys, half values; id 0 is neither and fills the rest. The
    share of a gap g grows as g^(power − 1), as in the published benchmark with `power` .01, so
    most queries follow soon. Sequences are cut into segments of `length`. Raises `ValueError`
    where `size` cannot hold pairs and queries, or the vocabulary is too small.
    """

    pairs: Count = 8
    vocabulary: Annotated[int, Field(ge=4)] = 256
    size: Count = 256
    length: Count = 32
    power: Annotated[float, Field(gt=0)] = 0.01

    def __post_init__(self) -> None:
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(
                f"pairs is {self.pairs}; {self.vocabulary} symbols have "
                f"{self.vocabulary // 2 - 1} keys"
            )
        if self.size < 4 * self.pairs:
            raise ValueError(
                f"size is {self.size}; {self.pairs} pairs and their queries need at least "
                f"{4 * self.pairs}"
            )
        if self.size % self.length:
            raise ValueError(
                f"size is {self.size}; it must be a multiple of length, {self.length}"
            )

    @property
    def vocab_size(self) -> int:
        """How many ids its problems are made of."""
        return self.vocabulary

    @property
    def segments(self) -> int:
        return self.size // self.length

    def batch(self, batch_size: int, generator: torch.Generator) -> list[Segment]:
        """Fresh problems, cut into segments."""
        return self.draw(batch_size, generator).segments

    def draw(self, batch_size: int, generator: torch.Generator) -> Problems:
        """The same, with the age of every answer in segments, 0 in the segment of the pair."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        half, told = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + _choose(batch_size, half - 1, self.pairs, generator)
        values = half + _choose(batch_size, half, self.pairs, generator)
        tokens = torch.zeros(batch_size, self.size, dtype=torch.int64)
        targets, ages = torch.full_like(tokens, IGNORE), torch.full_like(tokens, IGNORE)
        tokens[:, :told:2], tokens[:, 1:told:2] = keys, values
        places = told + 2 * self._gaps(batch_size, generator)
        tokens.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        written = (2 * torch.arange(self.pairs) + 1) // self.length
        ages.scatter_(1, places, places // self.length - written)
        cut = [torch.split(part, self.length, dim=1) for part in (tokens, targets, ages)]
        return Problems(as_segments(cut[0], cut[1]), list(cut[2]))

    def _gaps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """`(B, pairs)` distinct places for queries, in steps of two tokens after the pairs."""
        space = (self.size - 2 * self.pairs) // 2
        weight = torch.arange(1, space + 1).double() ** (self.power - 1)
        return torch.multinomial(weight.expand(batch_size, -1), self.pairs, generator=generator)


def _choose(rows: int, among: int, number: int, generator: torch.Generator) -> Tensor:
    """`(rows, number)` distinct numbers below `among`."""
    return torch.rand(rows, among, generator=generator).argsort(dim=1)[:, :number]
