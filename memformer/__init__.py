"""A transformer with a memory made of slots; written from the chapters of the book.

Every model here is a segment model: `logits, state = model(tokens, state)`.
"""

from memformer.forgetting import BiasedMemoryNorm
from memformer.model import (
    Memformer,
    MemformerConfig,
    MemformerEncoder,
    MemformerLM,
    MemformerState,
    MemoryTrace,
    trace,
)
from memformer.mrbp import memory_replay, memory_replay_backward
from memformer.reader import MemoryReader
from memformer.segments import (
    Corpus,
    CorpusError,
    DocumentStreams,
    Segment,
    load_corpus,
    reset_state,
    run_segments,
    split_segments,
)
from memformer.streaming import generate, stream
from memformer.tasks import RecallTask, recall_accuracy
from memformer.writer import MemoryWriter

__all__ = [
    "BiasedMemoryNorm",
    "Corpus",
    "CorpusError",
    "DocumentStreams",
    "Memformer",
    "MemformerConfig",
    "MemformerEncoder",
    "MemformerLM",
    "MemformerState",
    "MemoryReader",
    "MemoryTrace",
    "MemoryWriter",
    "RecallTask",
    "Segment",
    "generate",
    "load_corpus",
    "memory_replay",
    "memory_replay_backward",
    "recall_accuracy",
    "reset_state",
    "run_segments",
    "split_segments",
    "stream",
    "trace",
]
