"""Reading and writing for ever: constant memory, and a cache that never outgrows a segment."""

from memformer.streaming.decoders import (
    CachedDecoder,
    CachedLM,
    CachedMemformer,
    IncrementalDecoder,
    OpenSegment,
    RecomputingDecoder,
    count_bytes,
    incremental,
)
from memformer.streaming.reading import (
    Reading,
    cut_stream,
    read_pieces,
    segment_length,
    stream,
)
from memformer.streaming.sampling import (
    Sampler,
    draw_forever,
    generate,
    generate_forever,
    token_chances,
)

__all__ = [
    "CachedDecoder",
    "CachedLM",
    "CachedMemformer",
    "IncrementalDecoder",
    "OpenSegment",
    "Reading",
    "RecomputingDecoder",
    "Sampler",
    "count_bytes",
    "cut_stream",
    "draw_forever",
    "generate",
    "generate_forever",
    "incremental",
    "read_pieces",
    "segment_length",
    "stream",
    "token_chances",
]
