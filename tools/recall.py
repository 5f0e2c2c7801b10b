"""Train a Memformer on associative recall by a recipe, and write its record and weights.

python tools/recall.py recall-8x8        reads tools/recipes/recall-8x8.json
python tools/recall.py recall-8x8 --steps 50 --out /somewhere     a small trial
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from memformer import MemformerConfig, MemformerLM, RecallTask, recall_accuracy
from memformer.records import describe_machine, save_record
from memformer.tasks import RECALL_VOCAB, Curriculum, scores_and_answers

ROOT = Path(__file__).resolve().parent.parent


def train(recipe: dict[str, Any]) -> tuple[dict[str, Any], MemformerLM]:
    """Train by `recipe`; returns the record without its frontier, and the model."""
    torch.manual_seed(recipe["seed"])
    torch.set_num_threads(recipe["threads"])
    generator = torch.Generator().manual_seed(recipe["seed"])
    model = MemformerLM(MemformerConfig(RECALL_VOCAB, **recipe["model"]))
    if recipe.get(
        "learn_v"
    ):  # the paper's parameter, at our strength: v itself is what is learned
        forget = model.stack.forget
        forget.bias.data.mul_(forget.strength)
        forget.strength = 1.0
    task = dict(recipe["task"])
    start_at = task.pop("start", 2)
    curriculum = Curriculum(RecallTask(**task), start=start_at, seed=recipe["seed"])
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe["lr"], betas=(0.9, 0.99), weight_decay=0.01
    )
    curve, tokens, start = [], 0, time.perf_counter()
    for step in range(1, recipe["steps"] + 1):
        left = (recipe["steps"] - step) / (recipe["steps"] * recipe["decay"])
        for group in optimiser.param_groups:  # warm up, hold, then down in a straight line
            group["lr"] = recipe["lr"] * min(1.0, step / 50, left)
        task = curriculum.draw()
        batch = task.batch(recipe["batch_size"], generator)
        scores, answers = scores_and_answers(model, batch)
        F.cross_entropy(scores, answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        tokens += sum(segment.tokens.numel() for segment in batch)
        if step % 25 == 0:
            hardest = curriculum.hardest
            accuracy = recall_accuracy(model, hardest, trials=64, seed=step)
            curriculum.report(accuracy)
            seconds = time.perf_counter() - start
            curve.append([step, round(seconds, 1), hardest.segments, round(accuracy, 4)])
            print(
                f"step {step}  {seconds:.0f} s  {hardest}  accuracy {accuracy:.3f}", flush=True
            )
    record = {
        "what": recipe["what"],
        "recipe": recipe,
        "seed": recipe["seed"],
        "machine": describe_machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "tokens": tokens,
        "curve": {"columns": ["step", "seconds", "segments", "accuracy"], "rows": curve},
    }
    return record, model


def frontier(model: MemformerLM, recipe: dict[str, Any], trials: int) -> dict[str, Any]:
    """Accuracy over pairs × segments on fresh problems, and the reset control beside it."""
    noise = recipe["task"].get("noise", "own")
    rows, wiped = [], []
    for pairs in recipe["frontier"]["pairs"]:
        tasks = [RecallTask(pairs, length, noise) for length in recipe["frontier"]["segments"]]
        rows.append([round(recall_accuracy(model, t, trials=trials, seed=1), 4) for t in tasks])
        wiped.append(
            round(recall_accuracy(model, tasks[0], trials=trials, seed=1, wipe=True), 4)
        )
        print(f"{pairs} pairs: {rows[-1]}  wiped {wiped[-1]}", flush=True)
    return {**recipe["frontier"], "trials": trials, "accuracy": rows, "wiped": wiped}


def ablate(recipe: dict[str, Any], trials: int) -> dict[str, Any]:
    """Train every variant with every seed; the record holds the curve and scores of each."""
    start, results = time.perf_counter(), []
    for (name, change), seed in product(recipe["variants"].items(), recipe["seeds"]):
        print(name, seed, flush=True)
        variant = {**recipe, **change, "seed": seed}
        for part in ("model", "task"):
            variant[part] = {**recipe[part], **change.get(part, {})}
        record, model = train(variant)
        scores, forget = frontier(model, variant, trials), model.stack.forget
        length = forget.strength * forget.bias.detach().norm(dim=-1).mean()
        results.append(
            {
                "variant": name,
                "seed": seed,
                "curve": record["curve"]["rows"],
                "accuracy": scores["accuracy"][0],
                "wiped": scores["wiped"][0],
                "length_of_v": round(float(length), 4),
                "seconds": record["seconds"],
            }
        )
    return {
        "what": recipe["what"],
        "recipe": recipe,
        "seed": recipe["seeds"],
        "machine": describe_machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a name in tools/recipes/")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data", help="where runs/ and weights/ go"
    )
    parser.add_argument("--steps", type=int, help="instead of the recipe's, for a trial")
    parser.add_argument("--trials", type=int, default=256, help="problems per place of the map")
    arguments = parser.parse_args()
    recipe = json.loads((ROOT / "tools" / "recipes" / f"{arguments.recipe}.json").read_text())
    recipe["steps"] = arguments.steps or recipe["steps"]
    if "variants" in recipe:
        save_record(arguments.out, arguments.recipe, ablate(recipe, arguments.trials), None)
        return
    record, model = train(recipe)
    record["frontier"] = frontier(model, recipe, arguments.trials)
    save_record(arguments.out, arguments.recipe, record, model.state_dict())


if __name__ == "__main__":
    main()
