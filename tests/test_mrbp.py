"""Replay against back-propagation through time, on fresh random models, segments and resets."""

import gc
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import small_config, states_close
from torch import nn

from memformer import mrbp
from memformer.again import MixedPrecision, RandomState, disagreement
from memformer.lab.bench_replay import kept_bytes
from memformer.lab.measuring import PeakBytes
from memformer.model import Memformer, MemformerLM
from memformer.mrbp import as_leaves, memory_replay, memory_replay_backward
from memformer.segments import leaves_of, map_state, reset_state

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
BATCH, LENGTH = 3, 5


class Cells(NamedTuple):
    """Rows are streams, as the contract asks."""

    hidden: torch.Tensor
    cell: torch.Tensor


class NestedLSTM(nn.Module):
    """Two layers of cells, a count of tokens and a flag: tensors nested two deep."""

    def __init__(self, vocab_size=11, dim=6, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.cells = nn.ModuleList(nn.LSTMCell(dim, dim) for _ in range(2))
        self.first = nn.Parameter(torch.randn(2, 2, dim))
        self.dropout, self.output = nn.Dropout(dropout), nn.Linear(dim, vocab_size)

    def initial_state(self, batch_size):
        layers = tuple(Cells(*(t.expand(batch_size, -1) for t in pair)) for pair in self.first)
        seen = torch.zeros(batch_size, dtype=torch.int64)
        return layers, (seen, torch.zeros(batch_size, dtype=torch.bool))

    def forward(self, tokens, state):
        layers, (seen, _) = state
        scores = []
        for x in self.embed(tokens).unbind(1):
            new = []
            for cell, old in zip(self.cells, layers, strict=True):
                new.append(Cells(*cell(x, tuple(old))))
                x = self.dropout(new[-1].hidden)
            layers = tuple(new)
            scores.append(self.output(x))
        seen = seen + tokens.shape[1]
        scale = 1 + 0.1 * seen[:, None, None]  # so that a wrong count would show
        return torch.stack(scores, dim=1) * scale, (layers, (seen, seen > 7))

    def advance(self, tokens, state):
        return self(tokens, state)[1]


class Segment(NamedTuple):
    tokens: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor
    asks: bool


def sizes(dropout, **changes):
    """With the short convolution, as by default; `init="paper"` has none."""
    fixed = {"vocab_size": 11, "num_heads": 2, "segment_length": LENGTH, "dropout": dropout}
    return small_config(**(fixed | changes))


def lm(dropout=0.0):
    return MemformerLM(sizes(dropout))


def pair(dropout=0.0):
    return Memformer(sizes(dropout))


def printed_lm(dropout=0.0):
    return MemformerLM(sizes(dropout, init="paper"))


def printed_pair(dropout=0.0):
    return Memformer(sizes(dropout, init="paper"))


def lstm(dropout=0.0):
    return NestedLSTM(dropout=dropout)


class Dicts(nn.Module):
    """A cell whose state is a dict with a list in it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.cell = nn.Embedding(11, 6), nn.GRUCell(6, 6)
        self.start = nn.Parameter(torch.randn(6))
        self.dropout, self.output = nn.Dropout(dropout), nn.Linear(6, 11)

    def initial_state(self, batch_size):
        dtype = self.start.dtype
        seen = [
            torch.zeros(batch_size, dtype=torch.int64),
            torch.zeros(batch_size, dtype=dtype),
        ]
        return {"hidden": self.start.expand(batch_size, -1), "seen": seen}

    def forward(self, tokens, state):
        hidden, (count, mean) = state["hidden"], state["seen"]
        scores = []
        for x in self.embed(tokens).unbind(1):
            hidden = self.cell(self.dropout(x), hidden)
            mean = 0.9 * mean + hidden.mean(dim=1)
            scores.append(self.output(hidden) + mean[:, None])
        seen = [count + tokens.shape[1], mean]
        return torch.stack(scores, dim=1), {"hidden": hidden, "seen": seen}

    def advance(self, tokens, state):
        return self(tokens, state)[1]


def dicts(dropout=0.0):
    return Dicts(dropout)


NETS = (lm, pair, lstm, dicts)
PRINTED = (printed_lm, printed_pair)


def draw(count=6, asks=None):
    """Random segments with resets in mid-batch; `asks` says which have a loss (None: a few)."""
    rows = [torch.randint(11, (2, BATCH, LENGTH)) for _ in range(count)]
    asks = asks or [bool(torch.rand(()) < 0.6) for _ in rows[1:]] + [True]
    resets = torch.rand(count, BATCH) < 0.3
    return [Segment(*r, z, a) for r, z, a in zip(rows, resets, asks, strict=True)]


def step_of(net):
    """Reads a segment of `draw`; the loss is None where it does not ask."""

    def step(segment, memory):
        memory = reset_state(memory, net.initial_state(BATCH), segment.reset)
        if not segment.asks:
            return None, net.advance(segment.tokens, memory)
        logits, memory = net(segment.tokens, memory)
        return F.cross_entropy(logits.flatten(0, 1).float(), segment.targets.flatten()), memory

    def exact(segment, memory):
        memory = reset_state(memory, net.initial_state(BATCH), segment.reset)
        if not segment.asks:
            return None, net.advance(segment.tokens, memory)
        logits, memory = net(segment.tokens, memory)
        return F.cross_entropy(logits.flatten(0, 1), segment.targets.flatten()), memory

    return exact if next(net.parameters()).dtype == torch.float64 else step


def through_time(step, segments, memory):
    """The reference: one graph over everything. Returns the loss and the last memory."""
    losses = []
    for segment in segments:
        loss, memory = step(segment, memory)
        losses += [] if loss is None else [loss]
    return torch.stack(losses).sum(), memory


def by_reference(step, segments, memory):
    loss, memory = through_time(step, segments, memory)
    with torch.autocast("cpu", enabled=False):
        loss.backward()
    return loss.detach(), map_state(torch.Tensor.detach, memory)


def by_loop(step, segments, memory):
    loss, memory = memory_replay(step, segments, memory)
    with torch.autocast("cpu", enabled=False):
        loss.backward()
    return loss.detach(), map_state(torch.Tensor.detach, memory)


WAYS = (memory_replay_backward, by_loop)


def gradients(net):
    """Of all parameters as one vector; those without one count as zeros."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return torch.cat([part.flatten() for part in parts]).clone()


def outcome(way, net, segments, start=None, **options):
    """Gradients, loss, last memory and the next random number of one way, from one seed."""
    net.zero_grad()
    torch.manual_seed(7)
    memory = net.initial_state(BATCH) if start is None else start
    loss, memory = way(step_of(net), segments, memory, **options)
    return gradients(net), loss, memory, torch.rand(())


def apart(found, expected):
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


def assert_same(found, expected, bound):
    assert apart(found[0], expected[0]) <= bound
    torch.testing.assert_close(found[1], expected[1], rtol=bound, atol=bound)
    for left, right in zip(leaves_of(found[2]), leaves_of(expected[2]), strict=True):
        assert not left.requires_grad
        torch.testing.assert_close(left, right, rtol=bound, atol=bound)
    assert torch.equal(found[3], expected[3]), "the random generators stand elsewhere"


# --- the gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("build", [*NETS, *PRINTED])
def test_gradients_are_those_of_back_propagation_through_time(build, dtype, dropout, way):
    """The models with the convolution and without, and other states, nested in other ways."""
    net, segments = build(dropout).to(dtype), draw()
    assert_same(outcome(way, net, segments), outcome(by_reference, net, segments), BOUND[dtype])


@pytest.mark.parametrize("model", [MemformerLM, Memformer])
@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_gradients_are_exact_through_the_convolution(width, model):
    """Wider than a segment too; the taps get the gradient of every segment."""
    net, segments = model(sizes(0.1, convolution=width)).double(), draw()
    expected = outcome(by_reference, net, segments)
    taps = [p.grad.clone() for name, p in net.named_parameters() if "taps" in name]
    assert bool(taps) == (width > 1)
    assert all(t.abs().sum(dim=-1).all() for t in taps if width <= LENGTH)
    for way in WAYS:
        assert_same(outcome(way, net, segments), expected, 1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asks", [[1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]])
def test_losses_on_every_segment_or_some(asks, way):
    net, segments = lm(0.1).double(), draw(4, [bool(a) for a in asks])
    assert_same(outcome(way, net, segments), outcome(by_reference, net, segments), 1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 2])
def test_few_segments(count, way):
    net, segments = pair().double(), draw(count)
    assert_same(outcome(way, net, segments), outcome(by_reference, net, segments), 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_added_to_those_there_are(way):
    net, segments = lm().double(), draw()
    once = outcome(way, net, segments)[0]
    way(step_of(net), iter(segments), net.initial_state(BATCH))
    torch.testing.assert_close(gradients(net), 2 * once, rtol=1e-10, atol=1e-12)


def test_a_model_without_a_memory():
    net = nn.Linear(3, 3).double()
    inputs = [torch.randn(2, 3, dtype=torch.float64) for _ in range(4)]
    memory_replay_backward(lambda x, _: (net(x).square().mean(), ()), inputs, ())
    found = gradients(net)
    net.zero_grad()
    memory_replay(lambda x, _: (net(x).square().mean(), ()), inputs, ())[0].backward()
    looped = gradients(net)
    net.zero_grad()
    sum(net(x).square().mean() for x in inputs).backward()
    for one in (found, looped):
        torch.testing.assert_close(one, gradients(net), rtol=1e-10, atol=1e-12)


def test_a_memory_that_changes_its_shape_and_is_complex():
    """Like a cache that grows; the step returns its memory and a longer one."""
    weight = torch.randn(2, dtype=torch.complex128, requires_grad=True)
    inputs = [torch.randn(2, dtype=torch.complex128) for _ in range(4)]

    def step(x, memory):
        memory = torch.cat([memory * 1.1, (x * weight)[None]])
        return (memory.cumsum(0).abs() ** 2).sum(), memory

    start = torch.zeros(1, 2, dtype=torch.complex128)
    memory_replay_backward(step, inputs, start)
    found, weight.grad = weight.grad, None
    through_time(step, inputs, start)[0].backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-10, atol=1e-12)


# --- random numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", NETS)
def test_without_the_random_state_dropout_makes_the_same_comparison_fail(
    build, way, monkeypatch
):
    net, segments = build(0.1).double(), draw()
    expected = outcome(by_reference, net, segments)
    assert_same(outcome(way, net, segments), expected, 1e-10)
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    with pytest.raises(RuntimeError, match="another memory than in the first pass"):
        outcome(way, net, segments)
    monkeypatch.setattr(mrbp, "check_agreement", lambda worst: None)
    assert apart(outcome(way, net, segments)[0], expected[0]) > 1e-2


@pytest.mark.parametrize("build", NETS)
def test_advance_draws_what_the_step_draws_first(build):
    """The first pass draws no dropout for the decoder: the reference restarts as it does."""
    net = build(0.1).double()
    segments = [s._replace(reset=torch.zeros(BATCH).bool()) for s in draw(5, [True] * 5)]
    step = step_of(net)

    def advance(segment, memory):
        return net.advance(segment.tokens, memory)

    found = outcome(memory_replay_backward, net, segments, advance=advance)[0]
    torch.manual_seed(7)
    memory, states = net.initial_state(BATCH), []
    for segment in segments:
        states.append(torch.get_rng_state())
        memory = advance(segment, memory)

    def restarted(numbered, memory):
        torch.set_rng_state(states[numbered[0]])
        return step(numbered[1], memory)

    net.zero_grad()
    by_reference(restarted, list(enumerate(segments)), net.initial_state(BATCH))
    assert apart(found, gradients(net)) <= 1e-10


def test_a_wrong_advance_is_found_out():
    net, segments = lm().double(), draw()

    def advance(segment, memory):
        return memory + 0.01  # not what the step does

    with pytest.raises(RuntimeError, match="another memory"):
        outcome(memory_replay_backward, net, segments, advance=advance)


def test_a_generator_of_its_own_is_found_out():
    net, segments, own = lm().double(), draw(), torch.Generator().manual_seed(0)

    def step(segment, memory):
        noise = torch.randn(memory.shape, generator=own, dtype=memory.dtype)
        return step_of(net)(segment, memory + 0.05 * noise)

    with pytest.raises(RuntimeError, match="another memory"):
        memory_replay_backward(step, segments, net.initial_state(BATCH))


def test_disagreement_is_measured_in_what_is_allowed():
    kept = torch.randn(4, 5), (torch.arange(3), torch.ones(2).bfloat16())
    assert disagreement(kept, kept, mixed=False) == 0
    near = kept[0] * (1 + 0.5e-3), kept[1]
    torch.testing.assert_close(
        disagreement(near, kept, False), torch.tensor(0.5), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        disagreement(near, kept, True), torch.tensor(0.05), rtol=1e-3, atol=0
    )
    counted = kept[0], (torch.tensor([0, 1, 3]), kept[1][1])
    assert disagreement(counted, kept, False) > 1
    half = kept[0], (kept[1][0], kept[1][1] * (1 + 2**-7))
    torch.testing.assert_close(disagreement(half, kept, False), torch.tensor(0.78125))
    assert disagreement((), (), False) == 0
    lost = torch.full((4, 5), torch.nan), kept[1]
    assert disagreement(lost, lost, False) == 0


@pytest.mark.parametrize("where", ["first", "second"])
def test_an_error_in_the_step_passes_through_and_leaves_the_generators_in_the_document(where):
    """They stand where they stood at some border, not in the middle of a replayed segment."""
    net, segments, calls = lm(0.1).double(), draw(4, [True] * 4), []
    seen = set()

    def step(segment, memory):
        calls.append(segment)
        if len(calls) == (2 if where == "first" else 6):
            torch.rand(3)
            raise KeyError("mine")
        seen.add(tuple(torch.get_rng_state().tolist()))
        out = step_of(net)(segment, memory)
        seen.add(tuple(torch.get_rng_state().tolist()))
        return out

    with pytest.raises(KeyError, match="mine"):
        memory_replay_backward(step, segments, net.initial_state(BATCH))
    if where == "second":
        assert tuple(torch.get_rng_state().tolist()) in seen
    calls.clear()
    calls += segments * 9  # the step works again, and so does everything else
    assert_same(
        outcome(memory_replay_backward, net, segments),
        outcome(by_reference, net, segments),
        1e-10,
    )


def test_random_state_comes_back():
    state = RandomState.now(torch.zeros(2), (torch.zeros(1), [torch.zeros(1)]))
    first = torch.rand(5)
    state.restore()
    assert torch.equal(torch.rand(5), first)


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", NETS)
def test_autocast(build, way):
    """Equal where every cast is made anew. Where casts are kept, the plain way adds in bf16."""
    net, segments = build(0.1).float(), draw(8, [True] * 8)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = outcome(by_reference, net, segments)
        assert_same(outcome(way, net, segments), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        kept = apart(outcome(by_reference, net, segments)[0], expected[0])
        replayed = apart(outcome(way, net, segments)[0], expected[0])
    assert kept > 1e-4
    assert replayed <= kept
    assert apart(outcome(by_reference, net, segments)[0], expected[0]) > 1e-4  # it was on


def test_backward_outside_of_autocast_replays_inside():
    net, segments = lm().float(), draw()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = outcome(by_reference, net, segments)[0]
        net.zero_grad()
        loss, _ = memory_replay(step_of(net), segments, net.initial_state(BATCH))
    loss.backward()
    assert apart(gradients(net), expected) <= 1e-5


def test_autocast_is_entered_as_it_was_and_left_without_casts():
    weight = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        mixed = MixedPrecision.now(["cpu"])
    assert mixed.enabled
    with mixed.enter():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert not torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert not MixedPrecision.now([]).enabled
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            weight(torch.randn(2, 4))  # a cast without a graph
        with MixedPrecision.now([]).enter():
            weight(torch.randn(2, 4)).sum().backward()
    assert weight.weight.grad is not None


# --- the memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_an_initial_memory_gets_its_gradient(way):
    """As a leaf, and as something computed from one."""
    net, segments = (
        lm().double(),
        [s._replace(reset=torch.zeros(BATCH).bool()) for s in draw(4, [True] * 4)],
    )
    leaf = torch.randn(BATCH, 5, 12, dtype=torch.float64, requires_grad=True)
    found = []
    for each in (way, by_reference):
        for start in (leaf, leaf.tanh() * 2):
            leaf.grad = None
            weights = outcome(each, net, segments, start)[0]
            found.append(torch.cat([leaf.grad.flatten(), weights]))
    assert apart(found[0], found[2]) <= 1e-10
    assert apart(found[1], found[3]) <= 1e-10
    assert apart(found[0], found[1]) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_an_initial_memory_without_gradient_gets_none(way):
    net, segments = lm().double(), draw(3)
    start = net.initial_state(BATCH).detach()
    outcome(way, net, segments, start)
    assert start.grad is None
    assert not start.requires_grad


def test_the_start_of_a_stream_is_learned():
    net, segments = (
        lm().double(),
        [s._replace(reset=torch.zeros(BATCH).bool()) for s in draw(3, [True] * 3)],
    )
    outcome(memory_replay_backward, net, segments)
    whole = net.stack.forget.bias.grad.clone()
    outcome(memory_replay_backward, net, segments, net.initial_state(BATCH).detach())
    assert apart(net.stack.forget.bias.grad, whole) > 1e-3


def test_integers_are_left_alone_by_a_step_that_counts_in_place():
    def step(x, state):
        memory, count = state
        count += 1
        memory = memory * x * count.double()
        return memory.sum(), (memory, count)

    inputs = [torch.randn(3, dtype=torch.float64) for _ in range(4)]
    for way in (memory_replay_backward, by_loop):
        start = torch.ones(3, dtype=torch.float64, requires_grad=True)
        count = torch.zeros(3, dtype=torch.int64)
        _, (_, last) = way(step, inputs, (start, count))
        assert last.tolist() == [4, 4, 4]
        assert count.tolist() == [0, 0, 0]
        plain = start.detach().clone().requires_grad_()
        through_time(step, inputs, (plain, count.clone()))[0].backward()
        torch.testing.assert_close(start.grad, plain.grad, rtol=1e-10, atol=1e-12)


def test_a_step_that_writes_into_its_memory_is_refused():
    def step(x, memory):
        memory.mul_(x)
        return memory.sum(), memory

    start = torch.ones(3)
    with pytest.raises(RuntimeError, match="in-place"):
        memory_replay_backward(step, [torch.randn(3)] * 3, start)


@pytest.mark.parametrize("way", WAYS)
def test_a_chain_of_two_models(way):
    """The scores of one are the input of the other; both states travel together."""
    one, two = lm(0.1).double(), nn.LSTM(11, 6, num_layers=2, batch_first=True).double()
    start = nn.Parameter(torch.randn(2, BATCH, 6, dtype=torch.float64))
    net = nn.ModuleList([one, two, nn.ParameterList([start])])
    segments = draw(5, [True] * 5)

    def step(segment, state):
        memory, cells = state
        scores, memory = one(segment.tokens, memory)
        hidden, cells = two(scores, cells)
        return hidden.square().mean() + scores.logsumexp(-1).mean(), (memory, cells)

    found = []
    for each in (way, by_reference):
        net.zero_grad()
        torch.manual_seed(4)
        each(step, segments, (one.initial_state(BATCH), (start, start.sin())))
        assert start.grad.any()
        found.append(gradients(net))
    assert apart(*found) <= 1e-10


def test_leaves_in_order_and_new_leaves():
    state = (torch.zeros(1), (torch.ones(2).int(), Cells(torch.zeros(3), torch.zeros(4))))
    assert [len(leaf) for leaf in leaves_of(state)] == [1, 2, 3, 4]
    new = as_leaves(state)
    assert isinstance(new[1][1], Cells)
    assert [leaf.requires_grad for leaf in leaves_of(new)] == [True, False, True, True]
    assert not any(leaf.requires_grad for leaf in leaves_of(state))
    assert new[0].data_ptr() == state[0].data_ptr()
    assert new[1][0].data_ptr() != state[1][0].data_ptr()


# --- the ordinary loop ----------------------------------------------------------------------


def test_loss_and_memory_can_be_computed_with():
    net, segments = lm(0.1).double(), draw(4, [True] * 4)
    weight = torch.randn(BATCH, 5, 12, dtype=torch.float64)
    found = []
    for way in (through_time, memory_replay):
        for end in (
            lambda loss, memory: loss / 3,
            lambda loss, memory: loss * loss + (memory * weight).sum(),
            lambda loss, memory: (memory * weight).sum(),  # the loss is not used at all
        ):
            net.zero_grad()
            torch.manual_seed(5)
            end(*way(step_of(net), segments, net.initial_state(BATCH))).backward()
            found.append(gradients(net))
    for one, other in zip(found[:3], found[3:], strict=True):
        assert apart(other, one) <= 1e-10


def test_replays_can_be_chained_and_gone_through_twice():
    """The memory of one replay starts the next; random numbers are those of one pass."""
    net, segments = pair(0.1).double(), draw(6, [True] * 6)
    expected = outcome(by_reference, net, segments)

    def chained(step, segments, memory):
        one, memory = memory_replay(step, segments[:2], memory)
        two, memory = memory_replay(step, segments[2:], memory)
        before = torch.get_rng_state()
        (one + two).backward(retain_graph=True)
        assert torch.equal(torch.get_rng_state(), before)
        first = gradients(net)
        (one + two).backward(retain_graph=True)
        torch.testing.assert_close(gradients(net), 2 * first, rtol=1e-10, atol=1e-12)
        net.zero_grad()
        (one + two).backward()
        return (one + two).detach(), map_state(torch.Tensor.detach, memory)

    assert_same(outcome(chained, net, segments), expected, 1e-10)


def test_without_grad_it_only_runs():
    net, segments = lm().double(), draw()
    with torch.no_grad():
        loss, memory = memory_replay(step_of(net), segments, net.initial_state(BATCH))
        expected = through_time(step_of(net), segments, net.initial_state(BATCH))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected[0])
    states_close(memory, expected[1])


def test_nothing_is_held_after_a_loop():
    """No cycle keeps the buffer alive until the garbage collector comes by."""
    net, segments = lm(), draw(8)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with PeakBytes():  # the first of all imports half of PyTorch, and frames linger
        memory_replay_backward(step_of(net), segments, net.initial_state(BATCH))
    gc.collect()
    gc.disable()
    try:
        with PeakBytes() as count:
            for way in WAYS:
                way(step_of(net), segments, net.initial_state(BATCH))
        assert count.now == 0
    finally:
        gc.enable()


# --- watching -------------------------------------------------------------------------------


@pytest.mark.parametrize("build", NETS)
def test_watch_sees_losses_and_gradients_at_every_memory(build):
    net, segments, seen = build().double(), draw(), []
    outcome(memory_replay_backward, net, segments, watch=seen.append)
    assert [s.segment for s in seen] == [5, 4, 3, 2, 1, 0]
    step, memory, read, losses = step_of(net), net.initial_state(BATCH), [], []

    def joint(t):  # a tensor between two segments, of which a gradient can be asked
        if not t.is_floating_point():
            return t
        return t * 1 if t.requires_grad else t.clone().requires_grad_()

    for segment in segments:
        memory = map_state(joint, memory)
        read.append(leaves_of(memory))
        loss, memory = step(segment, memory)
        losses.append(loss)
    total = sum(loss for loss in losses if loss is not None)
    for one in seen:
        loss = losses[one.segment]
        assert (one.loss is None) == (loss is None)
        if loss is not None:
            assert not one.loss.requires_grad
            torch.testing.assert_close(one.loss, loss.detach(), rtol=1e-10, atol=1e-12)
        for leaf, found in zip(read[one.segment], one.gradient, strict=True):
            if not leaf.is_floating_point():
                assert found is None
                continue
            (expected,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
            expected = torch.zeros_like(leaf) if expected is None else expected
            found = torch.zeros_like(leaf) if found is None else found
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- what it holds --------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MemformerLM, Memformer])
def test_peak_is_flat_in_the_number_of_segments(model):
    net, peaks = model(sizes(0.0, encoder_layers=1, decoder_layers=1)), {}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for count in (4, 40):
        segments = draw(count, [True] * count)
        with PeakBytes() as counted:
            memory_replay_backward(
                step_of(net),
                segments,
                net.initial_state(BATCH),
                advance=lambda s, m: step_of(net)(s._replace(asks=False), m)[1],
            )
        peaks[count] = counted.peak - kept_bytes(net, [s.tokens for s in segments])
    assert peaks[40] <= 1.05 * peaks[4]


def test_the_step_runs_as_often_as_it_must():
    net, segments, calls = lm().double(), draw(5), {"step": 0, "advance": 0}

    def step(segment, memory):
        calls["step"] += 1
        return step_of(net)(segment, memory)

    def advance(segment, memory):
        calls["advance"] += 1
        assert not torch.is_grad_enabled()
        return step_of(net)(segment, memory)[1]

    memory_replay_backward(step, segments, net.initial_state(BATCH), advance=advance)
    assert calls == {"step": 5, "advance": 4}


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_what_is_refused(way):
    net = nn.Linear(2, 2)
    x, start = [torch.randn(3, 2)] * 3, torch.zeros(3, 2)
    with pytest.raises(ValueError, match="no segments"):
        way(lambda s, m: (net(s).sum(), m), [], start)
    with pytest.raises(ValueError, match="no segment gave a loss"):
        way(lambda s, m: (None, net(s)), x, start)
    with pytest.raises(ValueError, match=r"loss has shape \(3,\)"):
        way(lambda s, m: (net(s).sum(-1), m), x, start)
    with pytest.raises(TypeError, match="nested like"):
        way(lambda s, m: (net(s).sum(), (m, m)), x, start)
    with pytest.raises(TypeError, match="nested like"):
        way(lambda s, m: (net(s).sum(), m[:1]), x, (start, start))
    with pytest.raises(TypeError, match="made of tensors; it holds a int"):
        way(lambda s, m: (net(s).sum(), m), x, [start, 1])
    with pytest.raises(RuntimeError, match="requires a gradient"):
        way(lambda s, m: (s.sum(), m), x, start)


def test_an_advance_that_changes_the_nesting_is_refused():
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="nested like"):
        memory_replay_backward(
            lambda s, m: (net(s).sum(), m),
            [torch.randn(3, 2)] * 3,
            torch.zeros(3, 2),
            advance=lambda s, m: (m, m),
        )
