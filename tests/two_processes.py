"""One of the processes of some runs; the first writes down which collectives there were.

two_processes.py FOLDER KIND…        FOLDER holds the recipes KIND.json
"""

import json
import sys
from pathlib import Path

import torch
from test_training import double

from memformer.training import Trainer, load_recipe

torch.set_num_threads(1)
seen = []


def count(name):
    real = getattr(torch.distributed, name)

    def counted(*args, **kwargs):
        seen.append(name)
        return real(*args, **kwargs)

    setattr(torch.distributed, name, counted)


for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce"):
    count(name)
folder = Path(sys.argv[1])
for kind in sys.argv[2:]:
    trainer = double(Trainer(load_recipe(folder / f"{kind}.json"), folder / kind, cpu=True))
    seen.clear()
    for _ in range(4):
        trainer.take_step()
    result = {"collectives": [*seen], "losses": trainer.losses, "processes": trainer.team.size}
    trainer.save()
    if trainer.team.leads:
        (folder / f"{kind}-seen.json").write_text(json.dumps(result))
torch.distributed.destroy_process_group()
