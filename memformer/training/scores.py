"""Scores on held-out data, each beside its control: the same weights, memory wiped."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import nn

from ..modes import evaluating
from ..segments import IGNORE, DocumentStreams, State, begin_segment, count_segments
from ..tasks.corpora import Corpus
from ..tasks.scoring import recall_accuracy
from .learner import Ready
from .recipes import Recipe, frontier_places, task_of

LEAST = 64  # segments that a lane of evaluation holds before a document is cut for another


def bits_per_token(
    model: Any,
    corpus: Corpus,
    *,
    batch_size: int,
    length: int,
    segments: int,
    wipe: bool = False,
    split_long: bool = False,
) -> float:
    """Cross-entropy in bits over the first `segments` timesteps of a corpus.

    `wipe` is the reset control: every stream starts afresh at every segment. Raises
    `ValueError` where nothing is asked.
    """
    device, total, count = next(model.parameters()).device, 0.0, 0
    streams = DocumentStreams(corpus, batch_size, length, split_long=split_long)
    state: State = None
    with evaluating(model):
        for segment in itertools.islice(streams, segments):
            ready = Ready.of(segment, slice(None), device)
            logits, state = model(*begin_segment(model, ready, None if wipe else state))
            if ready.targets is not None:
                flat = logits.flatten(0, 1), ready.targets.flatten()
                total += float(
                    nn.functional.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")
                )
                count += int((segment.targets != IGNORE).sum())
    if not count:
        raise ValueError(f"corpus {corpus.name!r} asks for nothing in {segments} segments")
    return total / count / math.log(2)


def evaluate(model: Any, recipe: Recipe, corpus: Corpus | None) -> dict[str, float]:
    """Bits per token with memory and, as `…_wiped`, without; accuracy for tasks (None).

    A model that was trained without memory is only ever read without: its two scores are one.
    """
    name, scores = "bits" if corpus else "accuracy", []
    for wipe in (False, True) if recipe.memory == "on" else (True,):
        most = recipe.evaluate_segments
        if corpus is None:
            seed = 2**62 + recipe.seed % 2**62  # apart from the seeds of training
            score = recall_accuracy(model, task_of(recipe), trials=most, seed=seed, wipe=wipe)
        else:
            sizes = [count_segments(len(d), recipe.segment_length) for d in corpus.documents]
            lanes = min(recipe.batch_size, max(len(sizes), sum(sizes) // LEAST))
            score = bits_per_token(
                model,
                corpus,
                batch_size=lanes,
                length=recipe.segment_length,
                segments=most,
                wipe=wipe,
                split_long=True,
            )
        scores.append(score)
    return {name: scores[0], f"{name}_wiped": scores[-1]}


def frontier(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Accuracy at every place of the recipe's frontier, and the reset control beside it.

    `accuracy` is nested as the frontier's settings stand. `wiped` has a value for each place
    but of the last setting, which is scored at its first value only.
    """
    trials = recipe.frontier.get("trials", 256)
    axes = {key: values for key, values in recipe.frontier.items() if key != "trials"}
    *_, last = axes.values()

    def score(changes: dict[str, Any], wipe: bool = False) -> float:
        task = task_of(recipe, **changes)
        return round(recall_accuracy(model, task, trials=trials, seed=1, wipe=wipe), 4)

    places = list(frontier_places(recipe))
    without = recipe.memory == "off"
    accuracy: list[Any] = [score(place, wipe=without) for place in places]
    wiped: list[Any] = [score(place, wipe=True) for place in places[:: len(last)]]
    for values in list(axes.values())[:0:-1]:
        accuracy = [accuracy[i : i + len(values)] for i in range(0, len(accuracy), len(values))]
    if len(axes) == 1:
        wiped = wiped[0]
    return {**axes, "trials": trials, "accuracy": accuracy, "wiped": wiped}
