"""The benchmarks under one name: what is measured, and with what."""

from memformer.lab.bench_replay import (
    METHODS,
    SIZES,
    ReplaySize,
    bench_replay,
    bench_throughput,
)
from memformer.lab.bench_stream import STREAMS, StreamSize, bench_stream
from memformer.lab.measuring import PeakBytes, Timing, interleaved, peak_bytes

__all__ = [
    "METHODS",
    "SIZES",
    "STREAMS",
    "PeakBytes",
    "ReplaySize",
    "StreamSize",
    "Timing",
    "bench_replay",
    "bench_stream",
    "bench_throughput",
    "interleaved",
    "peak_bytes",
]
