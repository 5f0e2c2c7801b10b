"""Writing for ever: tokens drawn from the scores of the last one, and read in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from memformer.segments import State, leaves_of
from memformer.streaming.decoders import IncrementalDecoder, incremental


@dataclass(frozen=True)
class Sampler:
    """Draws tokens from scores. Temperature 0 takes the best one.

    The scores are divided by `temperature`, then the `top_k` best are kept (with equal scores,
    of the lower ids), then the fewest of the best that together have the share `top_p`.

    Raises `ValueError` for nonsense, and when it draws, for scores that are NaN or infinite.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None  # None: the global one

    def __post_init__(self) -> None:
        heat, k, p = self.temperature, self.top_k, self.top_p
        warm = isinstance(heat, Real) and 0 <= heat < math.inf
        several = k is None or (isinstance(k, Integral) and k is not True and k >= 1)
        share = p is None or (isinstance(p, Real) and 0 < p <= 1)
        for name, ok, allowed in (
            ("temperature", warm, "a finite number, at least 0"),
            ("top_k", several, "a whole number, at least 1, or None"),
            ("top_p", share, "a number in (0, 1], or None"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores `(B, V)` → the chance of every token, `(B, V)`."""
        return token_chances(scores, self.temperature, self.top_k, self.top_p)

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores `(B, V)` → tokens `(B,)`."""
        if self.temperature == 0:
            best_scores(scores)
            return scores.argmax(dim=-1)
        chances = self.probabilities(scores)
        # As torch.multinomial draws one, without its checks: the first of V clocks to ring wins.
        rate = torch.empty_like(chances).exponential_(generator=self.generator)
        return (chances / rate).argmax(dim=-1)


def best_scores(scores: Tensor) -> Tensor:
    """The best of each row, `(B, V)` → `(B, 1)`; `ValueError` where it is NaN or infinite."""
    best = scores.amax(dim=-1, keepdim=True)  # NaN, if one of them is
    if not all(map(math.isfinite, best.flatten().tolist())):
        raise ValueError(
            "scores are NaN or infinite, so nothing can be drawn from them. The model's weights "
            "or its memory overflowed: load weights that are finite, or train again with a "
            "lower learning rate"
        )
    return best


def token_chances(
    scores: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The chance of every token, `(B, V)` → `(B, V)`; settings and errors as of a `Sampler`."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    best = best_scores(scores)
    if temperature == 0:
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
    # The best stands at 0, so a tiny temperature sends the others to −inf and none to inf.
    scores = (scores - best) / temperature if temperature != 1 else scores - best
    if top_k is None and top_p is None:
        return scores.softmax(dim=-1)
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    chances = ordered[..., :top_k].softmax(dim=-1)
    if top_p is not None:
        before = chances.cumsum(dim=-1) - chances
        chances = chances * (before < top_p)
        chances = chances / chances.sum(dim=-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, ids[..., :top_k], chances)


def count_streams(prompt: Tensor | None, state: State | None) -> int:
    """How many rows the prompt or else the state has; 1 if neither has any.

    Raises `TypeError` for a prompt that is no tensor.
    """
    if prompt is not None and not isinstance(prompt, Tensor):
        raise TypeError(
            f"the prompt is of type {type(prompt).__name__}; a tensor (batch, time) of int64 is "
            "expected, as from torch.tensor([[1, 2, 3]])"
        )
    given = state if prompt is None else prompt
    leaves = [] if given is None else leaves_of(given)
    return next((len(leaf) for leaf in leaves if leaf.ndim and len(leaf)), 1)


def read_prompt(decoder: IncrementalDecoder, prompt: Tensor | None) -> None:
    """Feed a prompt a segment at a time; None is the start token, if nothing was read yet."""
    if prompt is None:
        if decoder.scores is not None:
            return
        start = getattr(getattr(decoder.model, "config", None), "start", None)
        if start is None:
            raise ValueError("prompt is None and the model has no config.start; give a prompt")
        prompt = torch.full_like(decoder.segment.tokens[:, :1], start)
    decoder.check(prompt)
    for piece in torch.split(prompt, decoder.segment.length, dim=1):  # never all scores
        decoder.go_on(piece)


def draw_forever(decoder: IncrementalDecoder, sampler: Sampler) -> Iterator[Tensor]:
    """Draw a token, read it, yield it."""
    while True:
        if decoder.scores is None:
            raise ValueError("the decoder has read nothing; feed it a token first")
        token = sampler(decoder.scores)
        decoder.go_on(token[:, None])
        yield token


def generate_forever(
    model: Any,
    prompt: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    state: State | IncrementalDecoder | None = None,
    cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of every stream, `(B,)`, for ever and in constant memory.

    `prompt (B, N)` is read first, however long; None is the start token. `state` is where to
    go on: a state of the model, or an incremental decoder, which is advanced in place, and with
    which None is no prompt at all. Everything yielded was read. The numbers are drawn from
    `generator`, from a new one with `seed`, or from the global one.

    Raises `ValueError` for settings as a `Sampler` does, for both `seed` and `generator`, for
    scores that are NaN or infinite, and with `TypeError` for prompts as `check_tokens` does:
    at the call, before the first token.
    """
    sampler = Sampler(temperature, top_k, top_p, generator)
    if seed is not None and generator is not None:
        raise ValueError(f"seed is {seed} and there is a generator too; give one of them")
    streams = count_streams(prompt, None if isinstance(state, IncrementalDecoder) else state)
    decoder = state
    if not isinstance(decoder, IncrementalDecoder):
        decoder = incremental(model, streams, state, cache=cache)
    read_prompt(decoder, prompt)
    if decoder.scores is not None:
        best_scores(decoder.scores)
    if seed is not None:
        own = torch.Generator(decoder.segment.tokens.device).manual_seed(seed)
        sampler = replace(sampler, generator=own)
    return draw_forever(decoder, sampler)


def generate(model: Any, prompt: Tensor | None, num_tokens: int, **settings: Any) -> Tensor:
    """The next tokens, `(B, num_tokens)`. Settings and errors are those of `generate_forever`.

    Raises `ValueError` for fewer than one token, or a number that is not whole.
    """
    if not isinstance(num_tokens, Integral) or num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; it must be at least 1, and whole")
    tokens = islice(generate_forever(model, prompt, **settings), int(num_tokens))
    return torch.stack(list(tokens), dim=1)
