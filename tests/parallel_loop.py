"""The README's loop under DistributedDataParallel, in one of two processes.

DistributedDataParallel sums gradients inside a backward pass, and replay has many of those.
So replay runs inside `no_sync()`, through the bare module, and one sum follows by hand.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from memformer import MemformerConfig, MemformerLM, memory_replay_backward

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = MemformerLM(MemformerConfig(19, dim=16, num_heads=2, num_slots=4, segment_length=8))
parallel = DistributedDataParallel(model.double(), broadcast_buffers=False)
tokens = torch.randint(19, (4, 27)).chunk(size)[rank]


def step(segment, state):
    logits, state = parallel.module(segment[:, :-1], state)
    return cross_entropy(logits.flatten(0, 1), segment[:, 1:].flatten()), state


with parallel.no_sync():
    state = parallel.module.initial_state(len(tokens))
    memory_replay_backward(step, tokens.split(9, dim=1), state)
gradients = [p.grad for p in parallel.parameters() if p.grad is not None]
flat = torch.cat([gradient.flatten() for gradient in gradients])
dist.all_reduce(flat)
for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
    gradient.copy_(total.view_as(gradient) / size)
if rank == 0:
    torch.save({name: p.grad for name, p in model.named_parameters()}, sys.argv[1])
dist.destroy_process_group()
