"""Several processes: the README's loop under DistributedDataParallel, torchrun, accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import SMALL
from torch.nn.functional import cross_entropy

from memformer import MemformerConfig, MemformerLM, memory_replay_backward
from memformer.training import Trainer, read_checkpoint, recipe_from


def launch(module, *arguments):
    """Start a launcher, told on which port its two processes meet."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def torchrun(seed, *arguments):
    port = 20000 + seed % 20000
    launch("torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, *arguments)


def test_the_loop_under_distributed_data_parallel_is_the_loop_on_the_whole_batch(
    tmp_path, seed
):
    script = Path(__file__).with_name("parallel_loop.py")
    torchrun(seed, script, tmp_path / "gradients.pt")
    torch.manual_seed(0)
    model = MemformerLM(
        MemformerConfig(19, dim=16, num_heads=2, num_slots=4, segment_length=8)
    ).double()
    tokens = torch.randint(19, (4, 27))

    def step(segment, state):
        logits, state = model(segment[:, :-1], state)
        return cross_entropy(logits.flatten(0, 1), segment[:, 1:].flatten()), state

    memory_replay_backward(step, tokens.split(9, dim=1), model.initial_state(4))
    found = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_both_launchers_train_as_one_process_does(launcher, tmp_path, seed):
    settings = SMALL | {"steps": 3, "seed": seed % 1000, "name": "two"}
    (tmp_path / "r.json").write_text(json.dumps(settings))
    train = ["memformer", "train", tmp_path / "r.json", "--out", tmp_path / "two", "--cpu"]
    if launcher == "torchrun":
        torchrun(seed, "-m", *train)
    else:
        # --multi_gpu is its word for several processes on one machine; train says --cpu.
        how = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1]
        how += ["--mixed_precision", "no"]
        how += ["--dynamo_backend", "no", "--main_process_port", 20000 + seed % 20000]
        launch("accelerate.commands.launch", *how, "-m", *train)
    one = Trainer(recipe_from(settings), tmp_path / "one", cpu=True)
    assert one.run()
    record = json.loads((tmp_path / "two" / "record.json").read_text())
    assert record["processes"] == 2
    tensors, about = read_checkpoint(tmp_path / "two" / "checkpoint.safetensors")
    assert about["step"] == 3
    assert tensors["losses"].tolist() == pytest.approx(one.losses, rel=1e-4)
