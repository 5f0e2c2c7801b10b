"""What a long stream costs from its first token to its last, and how fast models generate."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memformer.lab.measuring import interleaved
from memformer.lab.records import describe_machine, load_record, load_weights
from memformer.config import MemformerConfig
from memformer.model import Memformer, MemformerLM
from memformer.streaming import Reading, generate, stream
from memformer.tasks import NOISE, RECALL_VOCAB, RecallTask


class StreamSize(NamedTuple):
    """How much is streamed, and of what size the models are that generate."""

    tokens: int  # read by each of `batch` streams
    batch: int
    dim: int
    layers: int
    slots: int
    length: int
    generated: int


STREAMS = {
    "tiny": StreamSize(3_200, 2, 32, 2, 4, 16, 20),
    "small": StreamSize(1_000_000, 4, 256, 4, 32, 256, 256),
    "paper": StreamSize(1_000_000, 64, 512, 12, 32, 256, 256),
}
STRENGTHS = {"as trained": None, "at 0.0001": 1e-4, "at 0.000001": 1e-6}  # of forgetting


def process_bytes() -> int:
    """Bytes of this process that are in memory; where only the peak is known, the peak."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time on a CPU, which others on the machine do not stretch; else wall time."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def trained_model(strength: float | None) -> MemformerLM:
    """The model of `recall-16x64`, with another strength of forgetting if one is given."""
    config = MemformerConfig(RECALL_VOCAB, **load_record("recall-16x64")["recipe"]["model"])
    model = MemformerLM(config)
    model.load_state_dict(load_weights("recall-16x64"))
    model.stack.forget.strength = strength or model.stack.forget.strength
    return model.eval()


def measure_stream(
    strength: float | None, size: StreamSize, device: torch.device
) -> list[dict[str, Any]]:
    """A hundred windows of one long stream: tokens so far, time a token, bytes, recall."""
    model, dice = trained_model(strength).to(device), torch.Generator().manual_seed(0)
    shown, question = RecallTask(16, 2).batch(size.batch, dice)
    low, high, length = NOISE.start, NOISE.stop, model.config.segment_length

    def chunks() -> Iterator[Tensor]:
        yield shown.tokens.to(device)
        while True:
            yield torch.randint(low, high, (size.batch, 100), generator=dice).to(device)

    @torch.no_grad()
    def recall(reading: Reading) -> float:
        scores, _ = model(question.tokens.to(device), reading.state)
        asked = question.targets >= 0
        return float((scores.argmax(-1).cpu() == question.targets)[asked].float().mean())

    readings, clock, rows = stream(model, chunks()), clock_of(device), list[dict[str, Any]]()
    window = size.tokens // 100 // length
    for i in range(1, 101):
        begin = clock()
        for _ in range(window):
            reading = next(readings)
        spent = (clock() - begin) / window / length
        row = {"tokens": i * window * length, "seconds_per_token": spent}
        rows.append(row | {"process_bytes": process_bytes(), "recall": recall(reading)})
    return rows


def measure_generation(
    size: StreamSize, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Tokens a second of one stream with and without the cache, for both forms of the model."""
    rows = []
    for kind in (MemformerLM, Memformer):
        depth = size.layers // 2 if kind is Memformer else size.layers
        config = MemformerConfig(
            256,
            dim=size.dim,
            encoder_layers=depth,
            decoder_layers=depth,
            num_slots=size.slots,
            segment_length=size.length,
        )
        torch.manual_seed(0)
        model = kind(config).to(device).eval()
        runs = {
            name: partial(generate, model, None, size.generated, seed=0, cache=name == "cached")
            for name in ("cached", "recomputed")
        }
        took = interleaved(runs, rounds, clock_of(device))
        speeds = {name: size.generated / took[name].seconds for name in runs}
        rows.append({"model": kind.__name__, "tokens_per_second": speeds})
    return rows


def bench_stream(
    size: str = "small", device: str = "cpu", *, rounds: int = 3
) -> dict[str, Any]:
    """The record of a long stream and of generation; `ValueError` for an unknown size."""
    if size not in STREAMS:
        raise ValueError(f"size is {size!r}; it must be one of {', '.join(STREAMS)}")
    start, place = time.perf_counter(), torch.device(device)
    streams = {name: measure_stream(s, STREAMS[size], place) for name, s in STRENGTHS.items()}
    return {
        "what": "One stream read to its end, and generation with and without a cache",
        "recipe": {"size": size, "strengths": STRENGTHS, "rounds": rounds},
        "size": STREAMS[size]._asdict(),
        "seed": 0,
        "machine": describe_machine(),
        "streams": streams,
        "generation": measure_generation(STREAMS[size], place, rounds),
        "seconds": round(time.perf_counter() - start, 1),
    }
