"""Trains by a recipe in a child that is killed N times at random moments and started again.

    killable.py RECIPE FOLDER KILLS [SEED]

Children are forked from one process that has imported everything, so that a life is short.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from memformer.training import Trainer, load_recipe, read_checkpoint

torch.set_num_threads(1)  # forked children must not inherit a pool
RECIPE, FOLDER, KILLS = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
CHECKPOINT = FOLDER / "checkpoint.safetensors"


def live() -> int:
    """One life of the run, in a child; its process id."""
    child = os.fork()
    if child:
        return child
    trainer = Trainer(RECIPE, FOLDER, cpu=True)
    if CHECKPOINT.is_file():
        trainer.resume()
    trainer.run()
    os._exit(0)


def step_saved() -> int:
    """Of the checkpoint, which is whole whenever one looks."""
    return read_checkpoint(CHECKPOINT)[1]["step"] if CHECKPOINT.is_file() else 0


def main() -> None:
    Trainer(RECIPE, FOLDER, cpu=True)  # imports and data are there before a child is born
    draw = random.Random(int(sys.argv[4]) if KILLS else 0)
    # Drawn in steps, not seconds, so that a fast machine does not end before the last kill.
    moments = sorted(draw.sample(range(RECIPE.steps * 3 // 4), KILLS))
    kills: list[int] = []
    for moment in moments:
        child = live()
        while step_saved() < moment:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            raise SystemExit("a run ended by itself before it was killed")
        kills.append(step_saved())
    if os.waitpid(live(), 0)[1]:
        raise SystemExit("the last life failed")
    if KILLS:
        (FOLDER / "kills.json").write_text(json.dumps(kills))


main()
