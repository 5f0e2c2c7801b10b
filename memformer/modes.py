"""Looking at a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """In eval mode and without gradients; afterwards every module's mode is as it was.

    `model` is a module, a list of all its modules, which need not be looked for again, or
    anything else that has no mode.
    """
    modules = model.modules() if isinstance(model, nn.Module) else model
    modules = modules if isinstance(modules, (list, Iterator)) else ()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
