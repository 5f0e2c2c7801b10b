"""Problems that ask what a model remembers, and scores that cannot flatter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from ..modes import evaluating
from ..segments import IGNORE, Segment, SegmentModel, State, begin_segment


class Problems(NamedTuple):
    """A batch of problems, a document a row, and how long ago each answer was told."""

    segments: list[Segment]
    ages: list[Tensor]  # per segment (B, L): segments since it was told; IGNORE where unasked


class Task(Protocol):
    """What draws problems: recall, stories, or anything a reader writes."""

    @property
    def vocab_size(self) -> int:
        """How many ids its problems are made of, the start token among them."""

    def draw(self, batch_size: int, generator: torch.Generator) -> Problems:
        """Fresh problems with the ages of their answers."""

    def batch(self, batch_size: int, generator: torch.Generator) -> list[Segment]:
        """The same without ages."""


def as_segments(tokens: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Segment]:
    """One document a row, from `(B, L)` tokens and targets a segment, without padding."""
    steps = zip(tokens, targets, strict=True)
    return [
        Segment(
            read, asked, torch.ones_like(read).bool(), torch.full((read.shape[0],), index == 0)
        )
        for index, (read, asked) in enumerate(steps)
    ]


def scores_and_answers(
    model: SegmentModel, segments: Iterable[Segment], *, wipe: bool = False
) -> tuple[Tensor, Tensor]:
    """Read segments in turn; return the scores `(N, V)` and answers `(N,)` of all targets.

    A segment without targets only advances the memory. `wipe` is the reset control: the
    state starts afresh at every segment, so nothing can be remembered. Raises `ValueError`
    where nothing is asked.
    """
    state: State = None
    scores, answers = [], []
    for segment in segments:
        asked = segment.targets != IGNORE
        padded = not bool(segment.mask.all())
        now = segment if padded else segment._replace(mask=None)  # type: ignore[arg-type]
        arguments = begin_segment(model, now, None if wipe else state)
        if asked.any():
            logits, state = model(*arguments)
            scores.append(logits[asked])
            answers.append(segment.targets[asked])
        else:
            state = model.advance(*arguments)
    if not scores:
        raise ValueError("no segment asks for anything; at least one target is needed")
    return torch.cat(scores), torch.cat(answers)


@overload
def recall_accuracy(
    model: SegmentModel,
    task: Task,
    *,
    trials: int = ...,
    seed: int = ...,
    wipe: bool = ...,
    by_age: Literal[False] = ...,
) -> float: ...


@overload
def recall_accuracy(
    model: SegmentModel,
    task: Task,
    *,
    trials: int = ...,
    seed: int = ...,
    wipe: bool = ...,
    by_age: Literal[True],
) -> dict[int, float]: ...


def recall_accuracy(
    model: SegmentModel,
    task: Task,
    *,
    trials: int = 256,
    seed: int = 0,
    wipe: bool = False,
    by_age: bool = False,
) -> float | dict[int, float]:
    """Share of queries answered rightly over `trials` fresh problems, in eval mode.

    With `by_age`, one share for each number of segments that lie between telling and asking.
    """
    problems = task.draw(trials, torch.Generator().manual_seed(seed % 2**63))
    with evaluating(model):
        scores, answers = scores_and_answers(model, problems.segments, wipe=wipe)
    right = (scores.argmax(dim=-1) == answers).cpu()
    if not by_age:
        return float(right.float().mean())
    ages = torch.cat([age[age != IGNORE] for age in problems.ages])
    counts: dict[int, list[bool]] = defaultdict(list)
    for age, hit in zip(ages.tolist(), right.tolist(), strict=True):
        counts[age].append(hit)
    return {age: sum(hits) / len(hits) for age, hits in sorted(counts.items())}
