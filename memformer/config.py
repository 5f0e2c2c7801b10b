"""Sizes and settings of a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .checks import check_heads
from .positions import Positions
from .settings import Count, Positive, setting_names, settings

# What `init="paper"` sets, where it is not set by hand: the method as printed.
PAPER = {
    "self_weight": None,
    "query_start": 1.0,
    "forget_strength": 1.0,
    "convolution": 1,
    "reader_start": 1.0,
}


@settings()
class MemformerConfig:
    """Sizes and settings of a model; nonsense is refused with `ValueError`.

    The defaults are what learns. `init="paper"` is the method as printed: as many writer heads
    as elsewhere, no bias on a slot's own score, the forgetting bias learned itself, no
    convolution. What is set by hand counts in either case.

    `init` acts when a config is made, and never again. `dataclasses.replace(config, init=...)`
    hands every setting over by hand, so it changes the word and nothing else: make a new
    config instead, `MemformerConfig(vocab_size, ..., init="paper")`.
    """

    vocab_size: Count
    dim: Count = 64
    num_heads: Count = 4
    ffn_dim: Count | None = None  # None: 4 · dim
    encoder_layers: Count = 2
    decoder_layers: Count = 2
    num_slots: Count = 16
    segment_length: Count = 64
    temperature: Positive = 0.25
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    positions: Positions = "rotary"
    start_token: Annotated[int, Field(ge=0)] | None = None  # None: the last id
    init: Literal["learn", "paper"] = "learn"
    writer_heads: Count = 1
    self_weight: Annotated[float, Field(gt=0, lt=1)] | None = 0.8  # of an untrained writer
    query_start: Positive = 0.1  # size of an untrained writer's queries
    forget_strength: Positive = 0.01
    normalise: bool = True  # slots, when they are read and when they write
    convolution: Count = 6  # tokens that meet before the layers (centred: made odd); 1: none
    reader_start: Annotated[float, Field(ge=0)] = 0.0  # size of what an untrained reader adds

    @model_validator(mode="before")
    @classmethod
    def _as_printed(cls, given: Any) -> Any:
        by_place = zip(setting_names(cls), given.args or (), strict=False)
        named = {**dict(by_place), **(given.kwargs or {})}
        if named.get("init") != "paper":
            return given
        heads = {"writer_heads": named.get("num_heads", cls.num_heads)}
        return type(given)((), {**PAPER, **heads, **named})

    def __post_init__(self) -> None:
        check_heads(self.dim, self.num_heads)
        if self.dim % self.writer_heads:
            allowed = f"at least 1 and divide dim, which is {self.dim}"
            raise ValueError(f"writer_heads is {self.writer_heads}; it must be {allowed}")
        if self.start >= self.vocab_size:
            allowed = f"None or an id, at least 0 and below vocab_size, {self.vocab_size}"
            raise ValueError(f"start_token is {self.start_token}; it must be {allowed}")
        if self.positions == "rotary" and (self.dim // self.num_heads) % 2:
            width = f"dim / num_heads is {self.dim // self.num_heads} features"
            raise ValueError(f"{width} a head; rotary positions turn pairs, so it must be even")

    @property
    def start(self) -> int:
        """The id of the start token."""
        return self.vocab_size - 1 if self.start_token is None else self.start_token
