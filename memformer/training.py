"""Training that survives: recipes, exact gradients through long documents, checkpoints mid-stream, records."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, get_type_hints

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from .forgetting import BiasedMemoryNorm
from .model import Memformer, MemformerConfig, MemformerLM, trace
from .mrbp import Replayed, Watch, leaves_of, memory_replay_backward
from .records import data_folder, describe_machine
from .segments import (
    IGNORE,
    Corpus,
    DocumentStreams,
    Segment,
    State,
    detach_state,
    load_corpus,
    map_state,
    reset_state,
)
from .slots import effective_slots, slot_similarity
from .tasks import RECALL_VOCAB, Curriculum, RecallTask, recall_accuracy

# --- recipes --------------------------------------------------------------------------------


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the setting and what is allowed."""


MODELS: dict[str, Any] = {"lm": MemformerLM, "encoder-decoder": Memformer}
EMBEDDING = {"lm": "stack.embed.weight", "encoder-decoder": "encoder.embed.weight"}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, and nothing that does not. Raises `RecipeError`."""

    name: str = "untitled"
    what: str = ""  # one sentence for the record
    kind: Literal["lm", "encoder-decoder"] = "lm"
    model: dict[str, Any] = field(
        default_factory=dict
    )  # of MemformerConfig; vocab_size is the data's
    corpus: str = "digits"  # any name load_corpus knows, or "recall"
    limit: int | None = None  # documents of the corpus; None: all
    task: dict[str, Any] = field(default_factory=dict)  # of RecallTask, for "recall"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 32  # streams side by side, over all devices
    horizon: int = 8  # segments a step goes back through; recall takes whole documents
    replay: bool = True  # False: full back-propagation, for comparison
    lr: float = 1e-3
    warmup: int = 50  # steps
    decay: float = 0.3  # share of steps at the end in which the rate falls to 0
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    accumulate: int = 1  # parts in which a step's streams are taken, to save memory
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    log_every: int = 25
    evaluate_every: int = 100
    evaluate_segments: int = 64  # of the test split; for recall, the number of problems
    save_every: int = 100

    def __post_init__(self) -> None:
        check_recipe(self)


def check_recipe(recipe: Recipe) -> None:
    """Raise `RecipeError` that names the first setting at fault and says what is allowed."""

    def require(name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise RecipeError(f"{name} is {getattr(recipe, name)!r}; it must be {allowed}")

    for name, kind in get_type_hints(Recipe).items():
        value = getattr(recipe, name)
        if get_args(kind) and isinstance(get_args(kind)[0], str):
            require(name, value in get_args(kind), f"one of {', '.join(get_args(kind))}")
        elif kind is bool:
            require(name, type(value) is bool, "true or false")
        elif kind is str:
            require(name, isinstance(value, str), "text")
        elif kind is float:
            require(name, type(value) in (int, float) and 0 <= value < math.inf, "a number ≥ 0")
        elif kind is int:
            least = 0 if name in ("seed", "warmup") else 1
            require(name, type(value) is int and value >= least, f"a whole number ≥ {least}")
    require(
        "limit",
        recipe.limit is None or (type(recipe.limit) is int and recipe.limit >= 1),
        "≥ 1, or null",
    )
    require("lr", recipe.lr > 0, "above 0")
    require("decay", recipe.decay <= 1, "in [0, 1]")
    require("beta2", recipe.beta2 < 1, "in [0, 1)")
    require("clip", recipe.clip > 0, "above 0")
    require(
        "batch_size",
        recipe.batch_size % recipe.accumulate == 0,
        f"a multiple of accumulate, {recipe.accumulate}",
    )
    require("model", isinstance(recipe.model, dict), "a mapping of MemformerConfig's settings")
    require("task", isinstance(recipe.task, dict), "a mapping of RecallTask's settings")
    require(
        "task",
        bool(recipe.task) == (recipe.corpus == "recall"),
        "given if, and only if, corpus is 'recall'",
    )
    check_settings("model", recipe.model, MemformerConfig, {"vocab_size": 2**31})
    if recipe.task:
        check_settings("task", recipe.task, RecallTask, {})


def check_settings(
    name: str, settings: dict[str, Any], kind: Any, given: dict[str, Any]
) -> None:
    """Raise `RecipeError` unless `kind` can be made from `given` and these settings."""
    known = [f"{name}.{f.name}" for f in fields(kind) if f.name not in given]
    for key in settings:
        if f"{name}.{key}" not in known:
            raise RecipeError(unknown(f"{name}.{key}", known))
    try:
        kind(**given, **settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{name}: {error}") from None


def unknown(name: str, known: Sequence[str]) -> str:
    """What to say about a name that is not known."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown setting {name!r}{hint} Known are {', '.join(known)}"


def preset_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in (data_folder() / "recipes").glob("*.json"))


def load_recipe(source: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a JSON file, or the preset of that name, with `key=value` changes.

    A key may have a dot, as in `model.dim=128`; a value is read as JSON, else as text. Raises
    `RecipeError` for a file or setting that is not there, and for nonsense.
    """
    path = Path(source)
    if not path.is_file():
        path = data_folder() / "recipes" / f"{source}.json"
    if not path.is_file():
        raise RecipeError(
            f"no recipe {str(source)!r}: neither a file nor one of {', '.join(preset_names())}"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise RecipeError(
            f"{path} holds {type(settings).__name__}; an object of settings is expected"
        )
    settings.setdefault("name", path.stem)
    return recipe_from(changed(settings, changes))


def changed(settings: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Settings with `key=value` changes; a key may have a dot, a value is JSON or else text."""
    settings = json.loads(json.dumps(settings))
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise RecipeError(f"{change!r} is no change; write key=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        section, dot, inner = key.partition(".")
        if not dot:
            settings[key] = value
        elif isinstance(settings.setdefault(section, {}), dict):
            settings[section][inner] = value
        else:
            raise RecipeError(f"{section} has no settings inside, so {key!r} cannot be set")
    return settings


def recipe_from(settings: dict[str, Any]) -> Recipe:
    """A recipe from a mapping; `RecipeError` for a setting that does not exist."""
    known = [f.name for f in fields(Recipe)]
    for key in settings:
        if key not in known:
            raise RecipeError(unknown(key, known))
    return Recipe(**settings)


# --- data -----------------------------------------------------------------------------------


class Feed(Protocol):
    """Where a step's segments come from; it can be put back to where it stood."""

    vocab_size: int
    digest: str  # of the data, so that a run is never continued on other data

    def draw(self) -> list[Segment]:
        """The next segments of all streams."""

    def position(self) -> dict[str, Any]:
        """Where it stands, as JSON."""

    def seek(self, position: dict[str, Any]) -> None:
        """Go back to a position."""


class CorpusFeed:
    """Horizon after horizon through a corpus, pass after pass, each in a new order."""

    def __init__(self, corpus: Corpus, recipe: Recipe, length: int) -> None:
        self.corpus, self.recipe, self.length = corpus, recipe, length
        self.vocab_size, self.digest = corpus.vocab_size, corpus.sha256()
        self.seek({"epoch": 0, "segment": 0})

    def draw(self) -> list[Segment]:
        segments: list[Segment] = []
        while len(segments) < self.recipe.horizon:
            segment = next(self.segments, None)
            if segment is None:
                if segments:
                    break  # a step does not reach across two passes
                self.seek({"epoch": self.epoch + 1, "segment": 0})
                continue
            segments.append(segment)
            self.segment += 1
        return segments

    def position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "segment": self.segment}

    def seek(self, position: dict[str, Any]) -> None:
        self.epoch, self.segment = position["epoch"], position["segment"]
        order = self.recipe.seed + self.epoch
        streams = DocumentStreams(self.corpus, self.recipe.batch_size, self.length, order)
        self.segments: Iterator[Segment] = iter(streams)
        for _ in range(self.segment):
            next(self.segments)


class RecallFeed:
    """Whole recall documents, drawn by a curriculum that grows with success."""

    vocab_size = RECALL_VOCAB

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.curriculum = Curriculum(RecallTask(**recipe.task))
        self.digest = "generated"
        self.step = 0

    def draw(self) -> list[Segment]:
        self.step += 1  # every step has its own seeds: there is no state of generators to keep
        seed = self.recipe.seed * 1_000_003 + self.step
        self.curriculum.random.seed(seed)
        return self.curriculum.draw().batch(
            self.recipe.batch_size, torch.Generator().manual_seed(seed)
        )

    def position(self) -> dict[str, Any]:
        c = self.curriculum
        return {"step": self.step, "limit": c.limit, "formed": c.formed}

    def report(self, model: Any) -> dict[str, Any]:
        """Try the hardest task so far, and let the curriculum grow if it is solved."""
        hardest = self.curriculum.hardest
        with evaluating(model):
            accuracy = recall_accuracy(model, hardest, trials=64, seed=self.step)
        self.curriculum.report(accuracy)
        return {"hardest": hardest.segments, "hardest_accuracy": accuracy}

    def seek(self, position: dict[str, Any]) -> None:
        self.step = position["step"]
        self.curriculum.limit, self.curriculum.formed = position["limit"], position["formed"]


def make_feed(recipe: Recipe) -> CorpusFeed | RecallFeed:
    """The training data of a recipe."""
    if recipe.corpus == "recall":
        return RecallFeed(recipe)
    corpus = load_corpus(recipe.corpus, "train", limit=recipe.limit)
    return CorpusFeed(corpus, recipe, segment_length(recipe))


def segment_length(recipe: Recipe) -> int:
    """Tokens a segment."""
    default = MemformerConfig.segment_length
    length: int = recipe.model.get("segment_length", default)
    return length


def build_model(recipe: Recipe, vocab_size: int) -> Any:
    """The recipe's model with weights drawn from its seed; `RecipeError` where it cannot be."""
    if recipe.corpus == "recall" and segment_length(recipe) < 2 * recipe.task["pairs"]:
        raise RecipeError(
            f"model.segment_length is {segment_length(recipe)}; {recipe.task['pairs']} pairs "
            f"need at least {2 * recipe.task['pairs']}"
        )
    torch.manual_seed(recipe.seed)
    try:
        config = MemformerConfig(vocab_size, **recipe.model)
    except ValueError as error:
        raise RecipeError(f"model: {error}") from None
    return MODELS[recipe.kind](config)


# --- one step -------------------------------------------------------------------------------


class Ready(NamedTuple):
    """A segment on its device. What the CPU knows in advance, no device has to be asked."""

    tokens: Tensor  # (B, L)
    targets: Tensor | None  # (B, L); None where nothing is asked
    mask: Tensor | None  # (B, L); None where nothing is padded
    reset: Tensor | None  # (B,); None where no document begins

    @classmethod
    def of(cls, segment: Segment, rows: slice, device: torch.device) -> Ready:
        """Some rows of a segment that is on the CPU."""
        tokens, targets, mask, reset = (part[rows] for part in segment)

        def put(part: Tensor, needed: bool) -> Any:
            return part.to(device, non_blocking=True) if needed else None

        return cls(
            put(tokens, True),
            put(targets, bool((targets != IGNORE).any())),
            put(mask, not bool(mask.all())),
            put(reset, bool(reset.any())),
        )


def begin(model: Any, segment: Ready, state: State) -> tuple[Any, ...]:
    """The arguments of a model for this segment: streams that begin here start afresh."""
    if segment.reset is not None:
        fresh = model.initial_state(len(segment.tokens))
        state = reset_state(state, fresh, segment.reset)
    arguments = segment.tokens, state
    return arguments if segment.mask is None else (*arguments, segment.mask)


def back_propagate_through(
    step: Callable[[Ready, State], tuple[Tensor | None, State]],
    segments: Sequence[Ready],
    state: State,
) -> tuple[Tensor, State]:
    """Full back-propagation, with the graph of all segments at once: what replay must equal."""
    losses = []
    for segment in segments:
        loss, state = step(segment, state)
        losses += [] if loss is None else [loss]
    total = torch.stack(losses).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return total.detach(), detach_state(state)


class Learner:
    """A model, its optimiser, and the memory of its streams: what a step changes."""

    def __init__(self, model: Any, recipe: Recipe, team: Team) -> None:
        parts = team.size * recipe.accumulate
        if recipe.batch_size % parts:
            raise RecipeError(
                f"batch_size is {recipe.batch_size}; it must be a multiple of {parts}, the "
                "processes times accumulate"
            )
        self.model = model.to(team.device)
        self.recipe, self.team = recipe, team
        self.advance = self.model.advance
        if recipe.compile:
            self.model.compile()
            self.advance = torch.compile(self.advance)
        self.optimiser = make_optimiser(model, recipe)
        half = recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=half)
        own = recipe.batch_size // team.size
        self.state: State = detach_state(self.model.initial_state(own))

    def precision(self) -> Any:
        """Mixed precision as the recipe has it."""
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.team.device.type, getattr(torch, self.recipe.precision))

    def update(self, segments: Sequence[Segment], rate: float, watch: Watch) -> float:
        """Change the weights by the mean loss of all targets in the segments; returns it."""
        targets = sum(int((segment.targets != IGNORE).sum()) for segment in segments)
        losses, states, parts = [], [], self.recipe.accumulate
        for part in range(parts):
            rows = self.team.rows(self.recipe.batch_size, part, parts)
            ready = [Ready.of(segment, rows, self.team.device) for segment in segments]
            own = map_state(lambda t, part=part: t.chunk(parts)[part], self.state)
            loss, state = learn(self, ready, own, targets, watch)
            losses.append(loss)
            states.append(state)
        self.state = map_state(lambda *t: torch.cat(t), *states)
        loss = torch.stack(losses).sum()
        share_gradients(self.team, self.model, loss)
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        return float(loss)


def learn(
    learner: Learner, segments: Sequence[Ready], state: State, targets: int, watch: Watch
) -> tuple[Tensor, State]:
    """Add the gradients of the loss summed over tokens and divided by `targets`."""
    model, scaler = learner.model, learner.scaler

    def advance(segment: Ready, state: State) -> State:
        with learner.precision():
            return learner.advance(*begin(model, segment, state))

    def step(segment: Ready, state: State) -> tuple[Tensor | None, State]:
        if segment.targets is None:
            return None, advance(segment, state)
        with learner.precision():
            logits, state = model(*begin(model, segment, state))
            flat = logits.flatten(0, 1), segment.targets.flatten()
            loss = F.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")
        return scaler.scale(loss / targets), state

    if all(segment.targets is None for segment in segments):  # streams that have ended
        with torch.no_grad():
            for segment in segments:
                state = advance(segment, state)
        return torch.zeros((), device=learner.team.device), state
    if learner.recipe.replay:
        loss, state = memory_replay_backward(
            step, segments, state, advance=advance, watch=watch
        )
    else:
        loss, state = back_propagate_through(step, segments, state)
    return loss / scaler.get_scale(), detach_state(state)


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices decay, and among them neither embeddings nor the forgetting bias."""
    spared = {
        id(weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, BiasedMemoryNorm))
        for weight in module.parameters(recurse=False)
    }
    decays = [w for w in model.parameters() if w.ndim == 2 and id(w) not in spared]
    chosen = {id(weight) for weight in decays}
    rest = [w for w in model.parameters() if id(w) not in chosen]
    groups = [
        {"params": decays, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=fused)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step, from 1: up in a line over `warmup`, held, down in a line at the end."""
    left = (recipe.steps + 1 - step) / max(1.0, recipe.steps * recipe.decay)
    return recipe.lr * min(1.0, step / max(1, recipe.warmup), left)


# --- several devices ------------------------------------------------------------------------


class Team:
    """The processes that share a step, started by `torchrun` or `accelerate launch`; often one.

    Each holds the whole model and a share of the streams.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        from accelerate import PartialState  # slow to import, and only training needs it

        self.shared = PartialState(cpu=cpu)
        self.rank, self.size = self.shared.process_index, self.shared.num_processes
        self.device: torch.device = self.shared.device
        self.leads: bool = self.shared.is_main_process

    def rows(self, batch_size: int, part: int = 0, parts: int = 1) -> slice:
        """This process's rows of a batch, or a part of them."""
        share = batch_size // self.size
        size = share // parts
        start = self.rank * share + part * size
        return slice(start, start + size)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes in place, all of them in one round."""
        if self.size == 1:
            return
        from accelerate.utils import reduce

        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, total in zip(tensors, reduce(flat, "sum").split(sizes), strict=True):
            tensor.detach().copy_(total.view_as(tensor))

    def collect(self, tensor: Tensor) -> Tensor:
        """The rows of all processes."""
        if self.size == 1:
            return tensor
        from accelerate.utils import gather

        whole: Tensor = gather(tensor.contiguous())
        return whole


def share_gradients(team: Team, model: nn.Module, loss: Tensor) -> None:
    """Sum gradients and loss over the team: one round a step, however many segments it had."""
    if team.size == 1:
        return
    for weight in model.parameters():
        if weight.grad is None:  # every process must bring the same
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    team.sum([*gradients, loss])


# --- what to watch --------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; training flags afterwards are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def bits_per_token(
    model: Any,
    corpus: Corpus,
    *,
    batch_size: int,
    length: int,
    segments: int,
    wipe: bool = False,
) -> float:
    """Cross-entropy in bits over the first `segments` timesteps of a corpus.

    `wipe` is the reset control: every stream starts afresh at every segment.
    """
    device = next(model.parameters()).device
    streams = DocumentStreams(corpus, batch_size, length)
    state: State = model.initial_state(batch_size)
    total, count = 0.0, 0
    with evaluating(model):
        for segment, _ in zip(streams, range(segments), strict=False):
            if wipe:
                segment = segment._replace(reset=torch.ones_like(segment.reset))
            ready = Ready.of(segment, slice(None), device)
            logits, state = model(*begin(model, ready, state))
            if ready.targets is not None:
                flat = logits.flatten(0, 1).float(), ready.targets.flatten()
                total += float(F.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum"))
                count += int((segment.targets != IGNORE).sum())
    if not count:
        raise ValueError(f"corpus {corpus.name!r} asks for nothing in {segments} segments")
    return total / count / math.log(2)


def evaluate(model: Any, recipe: Recipe, corpus: Corpus | None) -> dict[str, float]:
    """The score with memory and, as `…_wiped`, without: bits per token, or recall accuracy."""
    if corpus is None:
        task, trials = RecallTask(**recipe.task), recipe.evaluate_segments
        with evaluating(model):
            kept, wiped = (
                recall_accuracy(model, task, trials=trials, seed=-1 - recipe.seed, wipe=wipe)
                for wipe in (False, True)
            )
        return {"accuracy": kept, "accuracy_wiped": wiped}
    how: dict[str, Any] = {
        "batch_size": min(recipe.batch_size, len(corpus.documents)),
        "length": segment_length(recipe),
        "segments": recipe.evaluate_segments,
    }
    return {
        "bits": bits_per_token(model, corpus, **how),
        "bits_wiped": bits_per_token(model, corpus, **how, wipe=True),
    }


def slot_health(model: Any, segments: Sequence[Segment]) -> dict[str, float]:
    """Whether the slots are alive: what they keep, how alike they are, how fast they forget.

    `keepers` and `overwriters` are the shares of slots with self-weight above 0.9 and below
    0.1, `cosine` is the mean absolute cosine between two slots, `slots` how many the memory
    is worth (`effective_slots`), `v` the mean length of the forgetting bias.
    """
    device = next(model.parameters()).device
    moved = [Segment(*(part.to(device) for part in segment)) for segment in segments]
    seen = trace(model, moved, model.initial_state(len(segments[0].tokens)))
    kept, last = seen.self_weight, seen.memories[-1]
    cosines = slot_similarity(last).abs()
    pairs = max(1, last.shape[1] * (last.shape[1] - 1))
    apart = (cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)) / pairs
    norms = [m for m in model.modules() if isinstance(m, BiasedMemoryNorm)]
    return {
        "self_weight": float(kept.mean()),
        "keepers": float((kept > 0.9).float().mean()),
        "overwriters": float((kept < 0.1).float().mean()),
        "cosine": float(apart.mean()),
        "slots": float(effective_slots(last).mean()),
        "v": float(norms[0].strength * norms[0].bias.detach().norm(dim=-1).mean()),
    }


class GradientByAge:
    """Watches a replay: how large the gradient at the memory is, by segments to the end."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def __call__(self, seen: Replayed) -> None:
        parts = [g.float().norm() for g in seen.gradient if g is not None]
        self.norms.append(torch.stack(parts).norm() if parts else torch.zeros(()))

    def result(self, scale: float = 1.0) -> list[float]:
        """The first is the memory that the last segment read."""
        return [float(norm) / scale for norm in self.norms]


# --- checkpoints ----------------------------------------------------------------------------


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or followed; the message says why."""


FORMAT = "memformer checkpoint, version 1"


def digest_of(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 over names, shapes, bytes and the JSON beside them."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place of another at once: at any moment there is one, and it is whole.

    Raises `CheckpointError` where it cannot be written; then the old one is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too must survive a loss of power
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        kept = f"; {path.name} as it was before is still there" if path.is_file() else ""
        raise CheckpointError(f"{path} could not be written: {error.strerror}{kept}") from error


def write_checkpoint(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Tensors and JSON in one safetensors file, so that they can never be of two moments."""
    text = json.dumps(about)
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    labels = {"format": FORMAT, "about": text, "sha256": digest_of(packed, text)}
    replace_file(path, save(packed, labels))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checkpoint` wrote; `CheckpointError` for anything else, saying what is wrong."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            labels = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None
    if labels.get("format") != FORMAT:
        found = labels.get("format", "no format")
        raise CheckpointError(f"{path} is not a {FORMAT!r}: it says {found!r}")
    if digest_of(tensors, labels.get("about", "")) != labels.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its contents do not match its own digest")
    about: dict[str, Any] = json.loads(labels["about"])
    return tensors, about


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimiser, flat: `optimiser/<number of the weight>/<name>`."""
    state = optimiser.state_dict()["state"]
    return {
        f"optimiser/{number}/{name}": value
        for number, moments in state.items()
        for name, value in moments.items()
    }


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put moments back, bit for bit."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimiser/"):
            _, number, name = key.split("/")
            state.setdefault(int(number), {})[name] = tensor
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


FREE = {"what", "steps", "evaluate_every", "evaluate_segments", "save_every"}


def check_same_run(recipe: Recipe, digest: str, about: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless the checkpoint is of this recipe and this data."""
    now, then = asdict(recipe), about["recipe"]
    changed = [key for key in now if key not in FREE and now[key] != then.get(key)]
    if changed:
        was = ", ".join(f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in changed)
        raise CheckpointError(
            f"the checkpoint is of another recipe: {was}. Begin a new run in another folder; "
            f"only {', '.join(sorted(FREE))} may change"
        )
    if digest != about["digest"]:
        raise CheckpointError(
            f"the checkpoint was trained on other data under the name {recipe.corpus!r}: their "
            "digests differ"
        )


def pack_learner(learner: Learner) -> dict[str, Tensor]:
    """Weights, moments, memories and random states, the last two of all processes."""
    team, device = learner.team, learner.team.device
    tensors = {f"model/{k}": v for k, v in learner.model.state_dict().items()}
    tensors |= pack_optimiser(learner.optimiser)
    for number, leaf in enumerate(leaves_of(learner.state)):
        tensors[f"memory/{number}"] = team.collect(leaf)
    tensors["random/cpu"] = team.collect(torch.get_rng_state()[None].to(device))
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        tensors["random/cuda"] = team.collect(state[None].to(device))
    return tensors


def unpack_learner(learner: Learner, tensors: dict[str, Tensor]) -> None:
    """Put back what `pack_learner` took; `CheckpointError` where it does not fit."""
    team = learner.team
    if len(tensors["random/cpu"]) != team.size:
        raise CheckpointError(
            f"the checkpoint is of {len(tensors['random/cpu'])} processes and this run has "
            f"{team.size}; start as many"
        )
    try:
        learner.model.load_state_dict(under("model/", tensors))
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit the recipe's model: {error}") from None
    unpack_optimiser(learner.optimiser, tensors)
    rows = team.rows(learner.recipe.batch_size)
    saved = (tensors[f"memory/{number}"] for number in range(len(tensors)))
    learner.state = map_state(lambda leaf: next(saved)[rows].to(leaf.device), learner.state)
    torch.set_rng_state(tensors["random/cpu"][team.rank])
    if team.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"][team.rank], team.device)


# --- the trainer ----------------------------------------------------------------------------


@contextmanager
def stopping_at_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM only ask the trainer to stop after its step; a second one kills."""

    def stop(number: int, frame: Any) -> None:
        trainer.stopped = True
        signal.signal(number, signal.SIG_DFL)

    wanted = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, stop) for number in wanted]
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)


def sample(recipe: Recipe, corpus: Corpus | None, feed: Feed) -> list[Segment]:
    """A few streams to look at the memory with, the same every time."""
    if isinstance(feed, RecallFeed):
        return feed.curriculum.hardest.batch(16, torch.Generator().manual_seed(recipe.seed))
    assert corpus is not None
    streams = DocumentStreams(corpus, min(16, recipe.batch_size), segment_length(recipe))
    return [segment for segment, _ in zip(streams, range(recipe.horizon), strict=False)]


class TrainingError(RuntimeError):
    """A run that makes no sense any more; the last checkpoint is from before."""


class Trainer:
    """A run in a folder: `run()` trains, after `resume()` from where a killed run was saved.

    The folder gets `checkpoint.safetensors` while it trains and, at the end, `record.json` and
    `model/`. Raises `RecipeError`, `CorpusError`, `CheckpointError` and `TrainingError`.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, *, cpu: bool = False) -> None:
        self.recipe, self.team = recipe, Team(cpu=cpu)
        self.checkpoint = Path(folder) / "checkpoint.safetensors"
        self.feed = make_feed(recipe)
        self.learner = Learner(build_model(recipe, self.feed.vocab_size), recipe, self.team)
        self.test = None if recipe.corpus == "recall" else load_corpus(recipe.corpus, "test")
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []  # of every step, in nats a target
        self.log: list[dict[str, Any]] = []
        self.stopped = False  # by a signal
        torch.manual_seed(recipe.seed + 1 + self.team.rank)  # dropout of each process its own

    def resume(self) -> None:
        """Go on from the checkpoint in the folder, memory and random numbers included."""
        tensors, about = read_checkpoint(self.checkpoint)
        check_same_run(self.recipe, self.feed.digest, about)
        unpack_learner(self.learner, tensors)
        self.feed.seek(about["position"])
        self.step, self.tokens, self.seconds = (about[k] for k in ("step", "tokens", "seconds"))
        self.losses, self.log = tensors["losses"].tolist(), about["log"]
        if about["scaler"]:
            self.learner.scaler.load_state_dict(about["scaler"])

    def save(self) -> None:
        """Write the checkpoint; only the leader of a team does."""
        tensors = pack_learner(self.learner)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        about = {
            "recipe": asdict(self.recipe),
            "digest": self.feed.digest,
            "position": self.feed.position(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "scaler": self.learner.scaler.state_dict(),
            "log": self.log,
        }
        if self.team.leads:
            write_checkpoint(self.checkpoint, tensors, about)

    def take_step(self) -> GradientByAge:
        """One update of the weights."""
        start = time.perf_counter()
        self.step += 1
        segments, ages = self.feed.draw(), GradientByAge()
        rate = learning_rate(self.recipe, self.step)
        loss = self.learner.update(segments, rate, ages)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.step} is {loss}; lower lr ({self.recipe.lr}) or clip "
                f"({self.recipe.clip}), and go on from the last checkpoint with --resume"
            )
        self.losses.append(loss)
        self.tokens += sum(int(segment.mask.sum()) for segment in segments)
        self.seconds += time.perf_counter() - start
        return ages

    def observe(self, ages: GradientByAge) -> None:
        """Add a line to the log; evaluate where it is time."""
        recent = self.losses[-self.recipe.log_every :]
        row: dict[str, Any] = {
            "step": self.step,
            "loss": sum(recent) / len(recent),
            "lr": learning_rate(self.recipe, self.step),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
            "gradient_by_age": ages.result(self.learner.scaler.get_scale()),
        }
        row |= slot_health(self.learner.model, sample(self.recipe, self.test, self.feed))
        if isinstance(self.feed, RecallFeed):
            row |= self.feed.report(self.learner.model)
        if self.due(self.recipe.evaluate_every):
            row |= evaluate(self.learner.model, self.recipe, self.test)
        self.log.append(row)

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    def run(self, tell: Callable[[dict[str, Any]], None] | None = None) -> bool:
        """Train to the end, or until a signal; True if the end was reached.

        `tell` gets every line of the log. SIGINT and SIGTERM let the step end, then save.
        """
        with stopping_at_signals(self), progress(self) as bar:
            while self.step < self.recipe.steps and not self.stopped:
                ages = self.take_step()
                bar.update()
                if self.due(self.recipe.log_every):
                    self.observe(ages)
                    if tell is not None and self.team.leads:
                        tell(self.log[-1])
                if self.due(self.recipe.save_every):
                    self.save()
            if self.stopped and not self.due(self.recipe.save_every):
                self.save()
        if self.step == self.recipe.steps and self.team.leads:
            finish(self)
        return self.step == self.recipe.steps


def progress(trainer: Trainer) -> Any:
    """A bar with the time that is left, where there is a terminal to show it."""
    off = None if trainer.team.leads else True
    done, total = trainer.step, trainer.recipe.steps
    return tqdm(initial=done, total=total, unit="step", disable=off, desc=trainer.recipe.name)


SCORES = ("bits", "bits_wiped", "accuracy", "accuracy_wiped")


def finish(trainer: Trainer) -> None:
    """Write what a run leaves behind: its record, and a model to load with `from_pretrained`."""
    recipe, folder = trainer.recipe, trainer.checkpoint.parent
    record = {
        "what": recipe.what,
        "recipe": asdict(recipe),
        "seed": recipe.seed,
        "machine": describe_machine(),
        "processes": trainer.team.size,
        "data": {"name": recipe.corpus, "sha256": trainer.feed.digest},
        "seconds": round(trainer.seconds, 1),
        "tokens": trainer.tokens,
        "log": trainer.log,
        "score": {key: value for key, value in trainer.log[-1].items() if key in SCORES},
    }
    replace_file(folder / "record.json", (json.dumps(record) + "\n").encode())
    trainer.learner.model.save_pretrained(folder / "model")


def load_run(
    folder: str | Path, changes: Sequence[str] = (), *, cpu: bool = False
) -> tuple[Any, Recipe, int]:
    """A run's model as of its last checkpoint, ready to be evaluated, its recipe and its step.

    Raises `CheckpointError` where there is none, `RecipeError` for changes that are nonsense.
    """
    tensors, about = read_checkpoint(Path(folder) / "checkpoint.safetensors")
    recipe = recipe_from(changed(about["recipe"], changes))
    vocab_size = tensors["model/" + EMBEDDING[recipe.kind]].shape[0]
    model = build_model(recipe, vocab_size).eval()
    try:
        model.load_state_dict(under("model/", tensors))
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit the recipe's model: {error}") from None
    return model.to(Team(cpu=cpu).device), recipe, about["step"]
