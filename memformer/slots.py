"""A memory of K vectors: how it starts, and how to see whether its slots differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_at_least_one


def separate_slots(
    num_slots: int, dim: int, generator: torch.Generator | None = None
) -> Tensor:
    """`(K, D)` random unit vectors, orthogonal to one another as far as the width allows.

    Slots that start alike get equal updates and stay alike, so they start far apart. Beyond
    `dim` slots, further orthogonal sets follow, at random angles to the ones before.

    Raises `ValueError` below one slot or one feature.
    """
    check_at_least_one(num_slots=num_slots, dim=dim)
    sets = -(-num_slots // dim)
    q, r = torch.linalg.qr(torch.randn(sets, dim, dim, generator=generator))
    # The routine has its own rule for signs; with those of R the sets are uniformly random.
    slots: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return slots.flatten(0, 1)[:num_slots].contiguous()


def unit_rows(x: Tensor) -> Tensor:
    """`x (…, D)` with every row divided by its length, or by 1e-6 where it is shorter.

    The guard is a number that float16 can hold: a row of zeros stays zero, never NaN.
    """
    return F.normalize(x, dim=-1, eps=1e-6)


def slot_similarity(memory: Tensor) -> Tensor:
    """Cosines between the slots of each stream: `(B, K, D)` → `(B, K, K)`, 0 for zero slots."""
    wide = torch.promote_types(memory.dtype, torch.float32)  # 16 bits overflow in the norm
    unit = unit_rows(memory.to(wide))
    return unit @ unit.mT


def effective_slots(memory: Tensor) -> Tensor:
    """How many slots a memory is worth, `(B, K, D)` → `(B,)`, from 1 (all alike) to min(K, D).

    The exponential of the entropy of the squared singular values of the unit slots (the
    effective rank of Roy and Vetterli 2007, on energies). A slot of zeros adds nothing, and a
    memory of zeros is worth 0.
    """
    wide = torch.promote_types(memory.dtype, torch.float32)  # 16 bits have no SVD
    energy = torch.linalg.svdvals(unit_rows(memory.to(wide))).square()
    total = energy.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(energy / total.clamp_min(1e-30)).sum(dim=-1)
    worth: Tensor = entropy.exp() * (total.squeeze(-1) > 0)
    return worth
