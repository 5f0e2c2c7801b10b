"""Memformer, built from scratch: a transformer with a memory made of slots, chapter by chapter.

Modules:

- `memformer.lab.figures`: Drawings in the book's one visual language: boxes, arrows, timelines, matrices, angles.
- `memformer.settings`: Settings that are checked: frozen dataclasses whose every failure is one line that helps.
- `memformer.tasks.mqar`: Recall as zoology measures it: many pairs at the start, queries scattered over what follows.
- `memformer.tasks.stories`: Stories: who is where, said in passing in a real text, and asked at the end."""

from memformer.config import MemformerConfig
from memformer.forgetting import BiasedMemoryNorm
from memformer.lab.tracing import MemoryTrace, trace
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
from memformer.streaming import generate, stream
from memformer.tasks.corpora import Corpus, CorpusError, load_corpus
from memformer.tasks import RecallTask, StoryTask, recall_accuracy
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
    "StoryTask",
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
