"""What benchmarks measure with: bytes counted by hand, the allocator's log, a false clock."""

import math

import pytest
import torch
from torch import nn

from memformer.lab.bench_replay import (
    METHODS,
    SIZES,
    bench_replay,
    bench_throughput,
    full,
    kept_bytes,
    layers_checkpointed,
    measure_bytes,
    model_of,
    random_segments,
    step_flops,
)
from memformer.lab.measuring import PeakBytes, Timing, interleaved, peak_bytes

TINY, CPU = SIZES["tiny"], torch.device("cpu")


# --- bytes ----------------------------------------------------------------------------------


def test_bytes_by_hand():
    n = int(torch.randint(1, 1000, ()))
    old = torch.randn(n)
    with PeakBytes() as count:
        assert (count.now, count.peak) == (0, 0)
        old.add_(1)
        view = old.view(1, n)
        assert count.now == 0  # what was there before
        new = old * 2
        assert count.now == 4 * n
        wide = new.double()
        assert count.now == 12 * n
        part = wide[: n // 2].view(-1)  # the whole storage stays
        del wide
        assert count.now == 12 * n
        del part
        assert (count.now, count.peak) == (4 * n, 12 * n)
        new.exp_()
        assert count.peak == 12 * n
        torch.sort(new)  # two outputs, 4 and 8 bytes a number, gone at once
        assert (count.now, count.peak) == (4 * n, 16 * n)
    del new, view
    assert count.now == 0  # the callbacks outlive the block


def test_old_storages_do_not_count_when_they_go():
    with PeakBytes() as count:
        old = torch.zeros(10)
        with PeakBytes() as inner:
            old += 1
            del old
            assert inner.now == inner.peak == 0
            torch.zeros(3)
            assert inner.peak == 12
        assert (count.now, count.peak) == (0, 40)  # the outer one sees both, in turn
        assert count.alive == {}


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_known_chain(steps):
    """Inputs are saved forward; backward there are a gradient, a cosine and their product."""
    n = int(torch.randint(1, 500, ()))
    x = torch.randn(n, requires_grad=True)
    x.grad = torch.zeros(n)
    with PeakBytes() as count:
        y = x
        for _ in range(steps):
            y = y.sin()
        assert count.now == 4 * n * steps
        y.backward(torch.ones(n))
        del y
    assert count.peak == 4 * n * (steps + 3)
    assert count.now == 0


def logged_peak(fn):
    """The allocator's own account, from the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        fn()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TINY.layers)
def test_the_allocators_log_agrees(name, method):
    """It also sees random states and the scratch space of kernels, so it may be above."""
    size = TINY._replace(
        batch_size=8, settings=TINY.settings | {"dim": 32, "segment_length": 16}
    )
    model, segments = model_of(size, name), random_segments(size, 3, CPU)
    counted = measure_bytes(model, segments, CPU)[method]
    logged = logged_peak(lambda: METHODS[method](model, segments))
    assert counted <= logged <= 1.03 * counted + 3 * 5_100


def test_methods_give_the_same_gradients():
    for name in TINY.layers:
        model, segments = model_of(TINY, name).double(), random_segments(TINY, 4, CPU)
        found = {}
        for method, run in METHODS.items():
            model.zero_grad()
            run(model, segments)
            found[method] = torch.cat([p.grad.flatten() for p in model.parameters()])
        for gradient in found.values():
            torch.testing.assert_close(gradient, found["full"], rtol=1e-10, atol=1e-12)


def test_layers_are_restored_after_an_error():
    model = model_of(TINY, next(iter(TINY.layers)))
    before = [vars(m).keys() for m in model.modules()]
    segments = random_segments(
        TINY._replace(settings=TINY.settings | {"vocab_size": 999}), 9, CPU
    )
    with pytest.raises(ValueError, match="hold id"):
        METHODS["layers"](model, segments)
    with layers_checkpointed(model):
        assert any("forward" in vars(m) for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    assert before == [vars(m).keys() for m in model.modules()]


def test_kept_bytes():
    name = next(iter(TINY.layers))
    memory = TINY.batch_size * TINY.settings["num_slots"] * TINY.settings["dim"] * 4
    assert kept_bytes(model_of(TINY, name), random_segments(TINY, 5, CPU)) == 5 * memory


def test_peak_bytes_on_the_cpu():
    assert peak_bytes(lambda: torch.zeros(25) + 1, CPU) == 200


# --- times ----------------------------------------------------------------------------------


def test_times_are_taken_in_turns():
    calls, now = [], [0.0]
    costs = {"a": [9, 2, 4, 6], "b": [9, 1, 8, 2], "c": [9, 4, 4, 4]}

    def work(name):
        def fn():
            now[0] += costs[name][sum(c == name for c in calls)]
            calls.append(name)

        return fn

    found = interleaved({name: work(name) for name in costs}, 3, clock=lambda: now[0])
    assert "".join(calls) == "abc" * 4
    assert found == {"a": Timing(4, 1.0), "b": Timing(2, 2.0), "c": Timing(4, 1.0)}


def test_times_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 repeats"):
        interleaved({"a": lambda: None}, 0)
    with pytest.raises(ValueError, match="0 functions"):
        interleaved({}, 3)


# --- records --------------------------------------------------------------------------------


def test_a_record_holds_every_method_and_length():
    record = bench_replay("tiny", horizons=(1, 2), lengths=(2, 4), repeats=1, seed=3)
    assert {"what", "seed", "machine", "seconds", "size", "rows"} <= record.keys()
    assert "throughput" not in record
    found = {(r["model"], r["segments"], r["method"]) for r in record["rows"]}
    assert found == {(m, t, k) for m in TINY.layers for t in (1, 2, 4) for k in METHODS}
    assert len(record["rows"]) == len(found)
    for row in record["rows"]:
        assert row["peak_bytes"] > 0
        assert ("seconds" in row) == (row["segments"] in (1, 2))
        assert ("kept_bytes" in row) == (row["method"] == "replay")
        if row["method"] == "full" and "speed" in row:
            assert row["speed"] == 1.0


def test_more_segments_cost_replay_nothing_but_their_memories():
    """The full length, 64, is in test_mrbp.py."""
    model, net = model_of(TINY, "encoder–decoder 1+1"), {}
    measure_bytes(model, random_segments(TINY, 1, CPU), CPU)  # gradients are there
    for count in (4, 24):
        segments = random_segments(TINY, count, CPU)
        for method in ("replay", "both", "full"):
            peak = peak_bytes(lambda m=method, s=segments: METHODS[m](model, s), CPU)
            net[method, count] = peak - kept_bytes(model, segments)
    assert net["replay", 24] <= 1.02 * net["replay", 4]
    assert net["both", 24] <= 1.02 * net["both", 4]
    assert net["full", 24] > 5 * net["full", 4]


def test_operations_are_those_of_the_matrices():
    """A model's step, against a count by hand of one linear layer's forward and backward."""

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(8, 31, bias=False)

        def initial_state(self, batch_size):
            return torch.zeros(batch_size, 8, requires_grad=True)

        def forward(self, tokens, state):
            return self.line(state)[:, None].expand(-1, tokens.shape[1], -1), state

    segments = random_segments(TINY, 3, CPU)
    assert step_flops(Tiny(), segments) == 3 * 3 * 2 * TINY.batch_size * 8 * 31


def test_throughput_runs_plain_and_compiled():
    rows = bench_throughput(TINY, CPU, 2, 1, backend="eager")
    assert [(r["model"], r["compiled"]) for r in rows] == [
        (name, compiled) for name in TINY.layers for compiled in (False, True)
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["step_flops"] > 0
        assert row["utilisation"] is None  # no data sheet for a CPU


def test_sizes_are_the_papers():
    paper = SIZES["paper"]
    assert paper.settings["dim"] == 512
    assert paper.settings["num_slots"] == 32
    assert math.prod(paper.layers["encoder–decoder 4+8"]) == 32
    model = model_of(SIZES["small"], "decoder-only 12")
    assert len(model.stack.layers.layers) == 12
    assert model.training
    full(model_of(TINY, "decoder-only 2"), random_segments(TINY, 1, CPU))
