"""Training that survives: recipes, exact gradients, checkpoints mid-stream, records, sweeps."""

from ..files import FileError, replace_file
from .checkpoints import (
    CheckpointError,
    digest_of,
    load_weights_into,
    pack_learner,
    read_checkpoint,
    unpack_learner,
    write_checkpoint,
)
from .feeds import CorpusFeed, Feed, TaskFeed, held_out, make_feed
from .learner import Learner, Ready, TrainingError, build_model, check_finite
from .optimiser import learning_rate, make_optimiser
from .recipes import (
    Recipe,
    RecipeError,
    changed,
    load_recipe,
    preset_names,
    recipe_from,
    recipe_schema,
)
from .runs import Loaded, find_without, load_model, load_run, score_run
from .scores import bits_per_token, evaluate, frontier
from .sweeps import Sweep, load_sweep, run_sweep
from .team import Team
from .trainer import Run, Trainer, finish, stopping_at_signals

__all__ = [
    "CheckpointError",
    "CorpusFeed",
    "Feed",
    "FileError",
    "Learner",
    "Loaded",
    "Ready",
    "Recipe",
    "RecipeError",
    "Run",
    "Sweep",
    "TaskFeed",
    "Team",
    "Trainer",
    "TrainingError",
    "bits_per_token",
    "build_model",
    "changed",
    "check_finite",
    "digest_of",
    "evaluate",
    "find_without",
    "finish",
    "frontier",
    "held_out",
    "learning_rate",
    "load_model",
    "load_recipe",
    "load_run",
    "load_sweep",
    "load_weights_into",
    "make_feed",
    "make_optimiser",
    "pack_learner",
    "preset_names",
    "read_checkpoint",
    "recipe_from",
    "recipe_schema",
    "replace_file",
    "run_sweep",
    "score_run",
    "stopping_at_signals",
    "unpack_learner",
    "write_checkpoint",
]
