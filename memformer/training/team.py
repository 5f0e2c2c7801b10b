"""The processes that train together: one, or as many as torchrun or accelerate start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Team:
    """The processes that share a step.

    All of them hold the whole model and draw the same segments; each takes its own rows, and
    one sum over all gradients a step keeps them alike.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        from accelerate import PartialState  # slow to import, and only training needs it

        shared = PartialState(cpu=cpu)
        self.rank, self.size = shared.process_index, shared.num_processes
        self.device: torch.device = shared.device
        self.leads = self.rank == 0
        self.asked = self.stops = False  # this process was asked to stop; all of them do

    def ask_to_stop(self) -> None:
        """This process wants to stop; alone it does, together all do after the next step."""
        self.asked = True
        self.stops = self.stops or self.size == 1

    def rows(self, batch_size: int, part: int = 0, parts: int = 1) -> slice:
        """This process's rows of a batch, or a part of them."""
        size = batch_size // self.size // parts
        start = (self.rank * parts + part) * size
        return slice(start, start + size)

    def share(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Sum gradients in place, and the loss, over all processes, in one round."""
        from accelerate.utils import reduce

        asked = torch.tensor(float(self.asked), device=self.device)
        own = [*gradients, loss, asked]
        flat = reduce(torch.cat([part.flatten() for part in own]), "sum")
        *sums, loss, asked = flat.split([part.numel() for part in own])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))
        self.stops = bool(asked)  # in the same round, so that no process stops alone
        return loss.squeeze()

    def collect(self, tensor: Tensor) -> Tensor:
        """The rows of all processes."""
        from accelerate.utils import gather

        whole: Tensor = gather(tensor.contiguous()) if self.size > 1 else tensor
        return whole
