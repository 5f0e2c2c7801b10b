"""What can be remembered: recall of pairs, facts in stories, and corpora of text and images."""

from .corpora import EMBEDDED, HUB, Corpus, CorpusError, load_corpus
from .mqar import MQARTask
from .recall import KEYS, NOISE, QUERY, RECALL_VOCAB, VALUES, Curriculum, RecallTask, interleave
from .scoring import Problems, Task, recall_accuracy, scores_and_answers
from .stories import StoryTask
from .tokens import Tokens

__all__ = [
    "EMBEDDED",
    "HUB",
    "KEYS",
    "NOISE",
    "QUERY",
    "RECALL_VOCAB",
    "VALUES",
    "Corpus",
    "CorpusError",
    "Curriculum",
    "MQARTask",
    "Problems",
    "RecallTask",
    "StoryTask",
    "Task",
    "Tokens",
    "interleave",
    "load_corpus",
    "recall_accuracy",
    "scores_and_answers",
]
