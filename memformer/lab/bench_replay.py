"""What the ways to go back through segments cost, in bytes and in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from memformer.lab.measuring import Timing, interleaved, peak_bytes
from memformer.lab.records import describe_machine
from memformer.config import MemformerConfig
from memformer.layers import MemformerLayer
from memformer.model import Memformer, MemformerLM
from memformer.mrbp import memory_replay_backward
from memformer.segments import State, leaves_of


class ReplaySize(NamedTuple):
    """What a benchmark of replay runs."""

    batch_size: int
    settings: dict[str, int]  # of `MemformerConfig`, but for the layers
    layers: dict[str, tuple[int, int]]  # model → of its encoder (0: decoder only) and decoder


LAYERS = {"decoder-only 12": (0, 12), "encoder–decoder 4+8": (4, 8)}
SIZES = {
    "tiny": ReplaySize(
        2,
        {"vocab_size": 31, "dim": 8, "num_heads": 2, "num_slots": 3, "segment_length": 6},
        {"decoder-only 2": (0, 2), "encoder–decoder 1+1": (1, 1)},
    ),
    "small": ReplaySize(
        4,
        {"vocab_size": 257, "dim": 128, "num_heads": 4, "num_slots": 32, "segment_length": 64},
        LAYERS,
    ),
    "paper": ReplaySize(
        32,
        {
            "vocab_size": 8192,
            "dim": 512,
            "num_heads": 8,
            "num_slots": 32,
            "segment_length": 128,
        },
        LAYERS,
    ),
}


def model_of(size: ReplaySize, name: str) -> MemformerLM | Memformer:
    """The model of that name with random weights, in training mode, without dropout."""
    encoder, decoder = size.layers[name]
    settings: dict[str, Any] = size.settings
    config = MemformerConfig(**settings, encoder_layers=max(encoder, 1), decoder_layers=decoder)
    return Memformer(config) if encoder else MemformerLM(config)


@contextmanager
def layers_checkpointed(model: nn.Module) -> Iterator[None]:
    """While inside, every layer keeps its inputs only and is run again on the way back."""
    layers = [m for m in model.modules() if isinstance(m, MemformerLayer)]
    for layer in layers:  # an attribute of the object hides the method of its class
        vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def segment_loss(
    model: MemformerLM | Memformer, tokens: Tensor, memory: State
) -> tuple[Tensor, State]:
    """The step that all methods run. What is predicted does not matter here: the tokens."""
    logits, memory = model(tokens, memory)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), memory


Method = Callable[[Any, list[Tensor]], None]  # (model, segments): forward and back


def full(model: Any, segments: list[Tensor], border: bool = False) -> None:
    """Back-propagation through time; with `border` each segment keeps only what it reads."""
    step = partial(segment_loss, model)
    if border:
        step = partial(checkpoint, step, use_reentrant=False)
    memory, losses = model.initial_state(len(segments[0])), []
    for tokens in segments:
        loss, memory = step(tokens, memory)
        losses.append(loss)
    torch.autograd.backward(losses)


def layers(model: Any, segments: list[Tensor]) -> None:
    with layers_checkpointed(model):
        full(model, segments)


def replay(model: Any, segments: list[Tensor]) -> None:
    step, memory = partial(segment_loss, model), model.initial_state(len(segments[0]))
    memory_replay_backward(step, segments, memory, advance=model.advance)


def replay_layers(model: Any, segments: list[Tensor]) -> None:
    """Replay, and within the segment that is replayed checkpointing per layer."""
    with layers_checkpointed(model):
        replay(model, segments)


METHODS: dict[str, Method] = {
    "full": full,
    "layers": layers,
    "border": partial(full, border=True),
    "replay": replay,
    "both": replay_layers,
}


def kept_bytes(model: Any, segments: list[Tensor]) -> int:
    """The memories that replay keeps for its second pass, one per segment."""
    memory = model.initial_state(len(segments[0]))
    return len(segments) * sum(t.numel() * t.element_size() for t in leaves_of(memory))


def measure_bytes(
    model: Any, segments: list[Tensor], device: torch.device
) -> dict[str, int | None]:
    """The peak of each method in bytes, with gradients there already; None: out of memory."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return {
        name: peak_bytes(partial(method, model, segments), device)
        for name, method in METHODS.items()
    }


def measure_times(
    model: Any, segments: list[Tensor], device: torch.device, repeats: int
) -> dict[str, Timing]:
    """The methods in turns, full back-propagation first."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    rivals = {name: partial(method, model, segments) for name, method in METHODS.items()}
    return interleaved(rivals, repeats, clock)


def random_segments(size: ReplaySize, count: int, device: torch.device) -> list[Tensor]:
    """`count` segments of random ids `(B, L)`."""
    shape = size.batch_size, size.settings["segment_length"]
    ids = size.settings["vocab_size"]
    return [torch.randint(ids, shape, device=device) for _ in range(count)]


def measure(
    size: ReplaySize, name: str, count: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """A row per method: bytes, and times where there are `repeats`."""
    model = model_of(size, name).to(device)
    segments = random_segments(size, count, device)
    peaks = measure_bytes(model, segments, device)
    times = measure_times(model, segments, device, repeats) if repeats else {}
    rows: list[dict[str, Any]] = []
    for method, peak in peaks.items():
        row = {"model": name, "segments": count, "method": method, "peak_bytes": peak}
        if method == "replay":
            row["kept_bytes"] = kept_bytes(model, segments)
        rows.append(row | (times[method]._asdict() if times else {}))
    return rows


def bench_replay(
    size: str = "small",
    device: str = "cpu",
    *,
    horizons: tuple[int, ...] = (4, 16),
    lengths: tuple[int, ...] = (4, 8, 16, 32, 64),
    repeats: int = 4,
    seed: int = 10,
) -> dict[str, Any]:
    """Bytes and times of the ways to go back through segments, as a record.

    `size` is a name in `SIZES`. Bytes are measured at all `lengths`, times at those that are
    `horizons` too; both count segments. `repeats` are rounds at the longest horizon; shorter
    ones have more, in proportion. On CUDA the throughput in bf16 is added. On a CPU give it
    one thread.
    """
    start, where, plan = time.perf_counter(), torch.device(device), SIZES[size]
    torch.manual_seed(seed)
    rounds = {count: repeats * max(horizons) // count for count in horizons}
    rows = [
        row
        for name in plan.layers
        for count in sorted({*horizons, *lengths})
        for row in measure(plan, name, count, where, rounds.get(count, 0))
    ]
    record = {
        "what": "peak bytes and times of the ways to go back through segments",
        "seed": seed,
        "size": {"name": size, **plan._asdict()},
        "rows": rows,
    }
    if where.type == "cuda":
        record["throughput"] = bench_throughput(plan, where, horizons[0], repeats)
    return record | {"machine": describe_machine(), "seconds": time.perf_counter() - start}


PEAK_FLOPS = {  # bf16 with dense matrices, a second, from the makers' data sheets
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def step_flops(model: Any, segments: list[Tensor]) -> int:
    """Operations of a forward and a backward pass through all segments, none of them twice."""
    with FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH):
        full(model, segments)  # the plain kernel, as fused ones are not counted everywhere
    return int(count.get_total_flops())


def bench_throughput(
    size: ReplaySize,
    device: torch.device,
    horizon: int,
    repeats: int,
    backend: str = "inductor",
) -> list[dict[str, Any]]:
    """Tokens a second of the replayed step in bf16, plain and compiled, for each model."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    rows: list[dict[str, Any]] = []
    for title in size.layers:
        model = model_of(size, title).to(device)
        segments = random_segments(size, horizon, device)
        tokens, flops = sum(t.numel() for t in segments), step_flops(model, segments)
        for compiled in (False, True):
            if compiled:  # the parts, as `advance` goes through them and not through the whole
                for part in model.children():
                    part.compile(backend=backend)
            with torch.autocast(device.type, torch.bfloat16):
                took = interleaved({"replay": partial(replay, model, segments)}, repeats)
            seconds = took["replay"].seconds
            row = {"model": title, "segments": horizon, "compiled": compiled}
            row |= {"tokens_per_second": tokens / seconds, "step_flops": flops}
            rows.append(row | {"utilisation": peak and flops / seconds / peak})
    return rows
