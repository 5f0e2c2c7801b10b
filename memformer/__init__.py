"""A transformer with a memory made of slots; written from the chapters of the book.

Every model here is a segment model: `logits, state = model(tokens, state)`.
"""

from memformer.config import MemformerConfig
from memformer.forgetting import BiasedMemoryNorm
from memformer.model import Memformer, MemformerEncoder, MemformerLM, MemformerState
from memformer.mrbp import memory_replay, memory_replay_backward
from memformer.reader import MemoryReader
from memformer.segments import (
    DocumentStreams,
    Segment,
    reset_state,
    run_segments,
    split_segments,
)
from memformer.writer import MemoryWriter

__all__ = [
    "BiasedMemoryNorm",
    "DocumentStreams",
    "Memformer",
    "MemformerConfig",
    "MemformerEncoder",
    "MemformerLM",
    "MemformerState",
    "MemoryReader",
    "MemoryWriter",
    "Segment",
    "memory_replay",
    "memory_replay_backward",
    "reset_state",
    "run_segments",
    "split_segments",
]
