"""The recall task as it is fixed in the book, and scores that cannot flatter."""

from itertools import pairwise

import pytest
import torch
from helpers import build, close, tokens_for
from hypothesis import given
from hypothesis import strategies as st

from memformer.config import MemformerConfig
from memformer.model import MemformerLM
from memformer.modes import evaluating
from memformer.segments import IGNORE, Segment
from memformer.tasks import (
    KEYS,
    NOISE,
    QUERY,
    RECALL_VOCAB,
    VALUES,
    Curriculum,
    RecallTask,
    interleave,
    recall_accuracy,
    scores_and_answers,
)

seeds = st.integers(0, 2**32 - 1)
pairs = st.integers(1, 16)
segments = st.integers(2, 6)
noises = st.sampled_from(["own", "shared"])


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Oracle:
    """Remembers exactly what it was told, as a table from keys to values, in its state."""

    def initial_state(self, batch_size):
        return torch.full((batch_size, 16), -1)

    def __call__(self, tokens, state):
        state, scores = state.clone(), torch.zeros(*tokens.shape, RECALL_VOCAB)
        for b, row in enumerate(tokens.tolist()):
            for key, value in zip(row[::2], row[1::2], strict=True):
                if key in KEYS and value in VALUES and state[b, key] < 0:
                    state[b, key] = value
            for i, token in enumerate(row):
                if token in KEYS and state[b, token] >= 0:
                    scores[b, i, int(state[b, token])] = 1
        return scores, state

    def advance(self, tokens, state):
        return self(tokens, state)[1]


def test_the_vocabularies_are_apart_and_fill_the_whole():
    ids = [*KEYS, *VALUES, QUERY, *NOISE]
    assert sorted(ids) == list(range(RECALL_VOCAB))
    assert len(KEYS) == len(VALUES) == 16


@given(seed=seeds, pairs=pairs, segments=segments, noise=noises, batch=st.integers(1, 5))
def test_a_batch_is_the_task_as_fixed(seed, pairs, segments, noise, batch):
    steps = RecallTask(pairs, segments, noise).batch(batch, generator(seed))
    assert len(steps) == segments
    for t, step in enumerate(steps):
        assert isinstance(step, Segment)
        assert step.tokens.shape == step.targets.shape == step.mask.shape == (batch, 2 * pairs)
        assert step.tokens.dtype == step.targets.dtype == torch.int64
        assert step.mask.all()
        assert step.reset.tolist() == [t == 0] * batch
        assert t == segments - 1 or (step.targets == IGNORE).all()
    told, asked = steps[0].tokens.tolist(), steps[-1].tokens.tolist()
    answers = steps[-1].targets.tolist()
    allowed = set(NOISE) if noise == "own" else {*KEYS, *VALUES}
    for b in range(batch):
        table = dict(zip(told[b][::2], told[b][1::2], strict=True))
        assert len(table) == pairs  # keys are distinct
        assert set(table) <= set(KEYS)
        assert set(table.values()) <= set(VALUES)
        assert sorted(asked[b][::2]) == sorted(table)  # every key once, in some order
        assert asked[b][1::2] == [QUERY] * pairs  # the value is never shown
        assert answers[b][::2] == [table[key] for key in asked[b][::2]]
        assert answers[b][1::2] == [IGNORE] * pairs
        for step in steps[1:-1]:
            assert set(step.tokens[b].tolist()) <= allowed


def test_draws_are_uniform_and_questions_are_shuffled():
    """4,000 problems: every count within six standard deviations of what is uniform."""
    steps = RecallTask(4, 3, "own").batch(4000, generator(int(torch.randint(2**31, ()))))

    def uniform(ids, low, size):
        counts = torch.bincount(ids.flatten() - low, minlength=size).double()
        mean = ids.numel() / size
        return bool(((counts - mean).abs() < 6 * mean**0.5).all())

    told = steps[0].tokens
    assert uniform(told[:, ::2], 0, 16)
    assert uniform(told[:, 1::2], 16, 16)
    assert uniform(steps[1].tokens, 33, 16)
    asked = steps[-1].tokens[:, ::2]
    place = (asked[:, :, None] == told[:, None, ::2]).int().argmax(dim=-1)
    for position in range(4):
        assert uniform(place[:, position], 0, 4)
    assert not uniform(torch.zeros(4000, dtype=torch.int64), 0, 4)


@given(seed=seeds, pairs=pairs, segments=segments)
def test_a_generator_fixes_the_batch(seed, pairs, segments):
    task = RecallTask(pairs, segments)
    one, same, other = (task.batch(8, generator(s)) for s in (seed, seed, seed + 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    source = generator(seed)
    first, second = task.batch(8, source), task.batch(8, source)
    assert not torch.equal(first[0].tokens, second[0].tokens)  # fresh on every call


@given(seed=seeds, batch=st.integers(1, 4), size=st.integers(0, 5))
def test_interleave_takes_turns(seed, batch, size):
    torch.manual_seed(seed)
    left, right = torch.randint(99, (2, batch, size))
    both = interleave(left, right)
    assert torch.equal(both[:, ::2], left)
    assert torch.equal(both[:, 1::2], right)


@given(seed=seeds, pairs=pairs, segments=segments)
def test_who_remembers_scores_one_and_who_is_wiped_scores_nothing(seed, pairs, segments):
    task = RecallTask(pairs, segments)
    assert recall_accuracy(Oracle(), task, trials=8, seed=seed) == 1.0
    assert recall_accuracy(Oracle(), task, trials=8, seed=seed, wipe=True) == 0.0


def test_accuracy_is_the_share_of_right_answers():
    """An oracle that lies about some keys is right about the others."""

    class Forgetful(Oracle):
        def __call__(self, tokens, state):
            scores, state = super().__call__(tokens, state)
            scores[tokens % 2 == 1] = 0  # odd keys are forgotten; argmax says token 0
            return scores, state

    task = RecallTask(8, 3)
    keys = task.batch(64, generator(5))[-1].tokens[:, ::2]
    expected = float((keys % 2 == 0).float().mean())
    accuracy = recall_accuracy(Forgetful(), task, trials=64, seed=5)
    assert accuracy == pytest.approx(expected)
    assert 0.3 < expected < 0.7


def test_a_stream_of_tasks_starts_afresh_where_it_says_so():
    task, source = RecallTask(8, 3), generator(int(torch.randint(2**31, ())))
    stream = [step for _ in range(3) for step in task.batch(16, source)]
    scores, answers = scores_and_answers(Oracle(), stream)
    assert scores.shape == (3 * 16 * 8, RECALL_VOCAB)
    assert torch.equal(scores.argmax(dim=-1), answers)
    without = [step._replace(reset=step.reset & (i == 0)) for i, step in enumerate(stream)]
    scores, answers = scores_and_answers(Oracle(), without)
    assert not torch.equal(scores.argmax(dim=-1), answers)  # old pairs would be in the way


def test_scores_are_those_of_plain_calls_and_carry_gradients():
    net = build(MemformerLM, vocab_size=RECALL_VOCAB, segment_length=6, reader_start=1.0)
    steps = RecallTask(3, 4).batch(5, generator(int(torch.randint(2**31, ()))))
    scores, answers = scores_and_answers(net, steps)
    state = net.initial_state(5)
    for step in steps:
        logits, state = net(step.tokens, state)
    asked = steps[-1].targets != IGNORE
    close(scores, logits[asked])
    assert torch.equal(answers, steps[-1].targets[asked])
    scores.sum().backward()
    assert net.stack.writer.value.weight.grad.any()


def test_without_training_a_model_is_near_chance():
    net = build(MemformerLM, vocab_size=RECALL_VOCAB, segment_length=8)
    assert recall_accuracy(net, RecallTask(4, 3), trials=64) < 0.35
    assert all(p.grad is None for p in net.parameters())
    tokens = tokens_for(net, 1, 8)
    assert net(tokens, net.initial_state(1))[0].shape[-1] == RECALL_VOCAB


@given(seed=seeds, pairs=pairs, segments=segments, noise=noises, solved=st.integers(0, 30))
def test_a_curriculum_draws_up_to_what_is_solved(seed, pairs, segments, noise, solved):
    curriculum = Curriculum(RecallTask(pairs, segments, noise), threshold=0.9, seed=seed)
    limits = [curriculum.limit]
    for _ in range(solved):
        curriculum.report(0.9)  # not above
        assert curriculum.limit == limits[-1]
        curriculum.report(0.91)
        limits.append(curriculum.limit)
    assert limits[0] == 2
    assert limits == sorted(limits)
    assert limits[-1] <= segments
    assert solved < segments or limits[-1] == segments
    assert curriculum.hardest == RecallTask(pairs, curriculum.limit, noise)
    for task in (curriculum.draw() for _ in range(20)):
        assert (1 if solved else pairs) <= task.pairs <= pairs
        assert 2 <= task.segments <= curriculum.limit
        assert task.noise == noise


def test_a_curriculum_is_fixed_by_its_seed_and_reaches_everything():
    def drawn(seed):
        curriculum = Curriculum(RecallTask(4, 9), seed=seed)
        for _ in range(20):
            curriculum.report(1.0)
        return [curriculum.draw() for _ in range(600)]

    first = drawn(1)
    assert first == drawn(1)
    assert first != drawn(2)
    assert {task.pairs for task in first} == {1, 2, 3, 4}
    assert {task.segments for task in first} == set(range(2, 10))


def test_scores_are_those_of_eval_mode_and_modes_come_back(seed):
    config = MemformerConfig(RECALL_VOCAB, dim=16, segment_length=8, dropout=0.9)
    model, task = MemformerLM(config), RecallTask(2, 3)
    model.output.eval()
    modes = [module.training for module in model.modules()]
    first, second = (recall_accuracy(model, task, seed=seed) for _ in "ab")
    assert first == second
    assert modes == [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="pairs"), evaluating(model):
        RecallTask(0, 3)
    assert modes == [module.training for module in model.modules()]


# --- pairs at any time, told again, and their ages ------------------------------------------


def tasks_of_recall():
    return st.builds(
        lambda pairs, extra, noise, arrival, again, length: RecallTask(
            pairs, 2 * pairs + 2 + extra, noise, arrival, again, length
        ),
        st.integers(1, 16),
        st.integers(0, 4),
        noises,
        st.sampled_from(["first", "any"]),
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        st.sampled_from([None, 4, 8, 32]),
    )


@given(task=tasks_of_recall(), seed=seeds)
def test_the_last_telling_counts_and_every_age_is_true(task, seed):
    """Read a batch as a person would: keep a table, and check every answer against it."""
    problems = task.draw(4, generator(seed))
    length = task.segment_length
    assert [s.tokens.shape for s in problems.segments] == [(4, length)] * task.segments
    keep_first = task.arrival == "first" and not task.told_again
    for b in range(4):
        whole = torch.cat([s.tokens[b] for s in problems.segments[: task.told_segments]])
        table, told, asked = {}, [], []
        for place, (key, value) in enumerate(pairwise(whole.tolist())):
            if key in KEYS and value in VALUES and not (keep_first and key in table):
                table[key] = value, place // length
                told.append(key)
        for t, (segment, ages) in enumerate(zip(*problems, strict=True)):
            assert torch.equal(segment.targets[b] == IGNORE, ages[b] == IGNORE)
            for i in (segment.targets[b] != IGNORE).nonzero()[:, 0].tolist():
                key = int(segment.tokens[b, i])
                value, when = table[key]
                assert value == int(segment.targets[b, i])
                assert int(segment.tokens[b, i + 1]) == QUERY
                assert int(ages[b, i]) == t - when
                asked.append(key)
        assert len(asked) == len(set(asked)) == task.pairs
        if task.noise == "own":
            again = [key for key in set(told) if told.count(key) == 2]
            assert len(told) == task.tellings
            assert len(again) == task.told_again


def test_pairs_at_any_time_are_spread_over_all_segments():
    task = RecallTask(4, 9, arrival="any", length=8)
    problems = task.draw(2000, generator(int(torch.randint(2**31, ()))))
    ages = torch.cat([a[a != IGNORE] for a in problems.ages])
    counts = torch.bincount(ages, minlength=9)[1:].double()
    mean = len(ages) / 8
    assert ((counts - mean).abs() < 6 * mean**0.5).all()


def test_accuracy_by_age_splits_the_whole():
    class LastTwo(Oracle):
        """Forgets what it was told more than two segments ago."""

        def initial_state(self, batch_size):
            return torch.full((batch_size, 16, 2), -1)

        def __call__(self, tokens, state):
            table, since = state[..., 0].clone(), state[..., 1] + 1
            fresh = torch.full_like(table, -1)
            _, told = Oracle.__call__(self, tokens, fresh)
            table = torch.where(told >= 0, told, torch.where(since > 2, -1, table))
            since = torch.where(told >= 0, 0, since)
            scores, _ = Oracle.__call__(self, tokens, table)
            return scores, torch.stack((table, since), dim=-1)

    task = RecallTask(4, 7, "own", "any", length=8)
    ages = recall_accuracy(LastTwo(), task, trials=64, by_age=True)
    assert set(ages) <= set(range(1, 7))
    assert ages[1] == ages[2] == 1.0
    assert max(share for age, share in ages.items() if age > 2) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 16, "segments": 3, "arrival": "any", "length": 4}, "cannot be told"),
        ({"pairs": 2, "segments": 2, "overwrite": 0.5}, "cannot be told"),
        ({"pairs": 2, "segments": 3, "length": 3}, "length is 3"),
        ({"pairs": 2, "segments": 3, "overwrite": 1.5}, "overwrite is 1.5"),
        ({"pairs": 2, "segments": 3, "arrival": "last"}, "arrival is 'last'"),
    ],
)
def test_recall_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        RecallTask(**settings)
