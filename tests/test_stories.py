"""Stories and the published recall task: what is told is what is asked, and nothing else is."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memformer.segments import IGNORE
from memformer.tasks import MQARTask, StoryTask
from memformer.tasks.stories import NAMES, PLACES

FACT = r"(\w+) (?:is in|went to) the (\w+) \."
seeds = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def stories():
    return st.builds(
        lambda facts, extra, again, arrival, by: StoryTask(
            facts=facts,
            segments=facts * 2 + 6 + extra,
            length=96 if by == "bytes" else 32,
            overwrite=again,
            arrival=arrival,
            by=by,
        ),
        st.integers(1, 12),
        st.integers(0, 4),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from(["first", "any"]),
        st.sampled_from(["words", "bytes"]),
    )


@given(task=stories(), seed=seeds)
def test_a_story_read_as_a_person_would_gives_every_answer_and_age(task, seed):
    problems = task.draw(3, generator(seed))
    assert len(problems.segments) == task.segments
    assert all(s.tokens.shape == (3, task.length) for s in problems.segments)
    for b in range(3):
        where, when, told, asked = {}, {}, 0, []
        for t, (segment, ages) in enumerate(zip(*problems, strict=True)):
            text = task.decode(segment.tokens[b])
            if t < task.told_segments:
                assert (segment.targets[b] == IGNORE).all()
                for name, place in re.findall(FACT, text):
                    assert name in NAMES[: task.facts]
                    where[name], when[name] = place, t
                    told += 1
                continue
            names = re.findall(r"where is (\w+) \?", text)
            places = (segment.targets[b] != IGNORE).nonzero()[:, 0]
            for name, i in zip(names, places, strict=True):
                answer = task.decode([int(segment.targets[b, i])])
                assert answer == (where[name][0] if task.by == "bytes" else where[name])
                assert int(ages[b, i]) == t - when[name]
            asked += names
        assert told == task.tellings
        assert sorted(asked) == sorted(NAMES[: task.facts])


def test_a_generator_fixes_the_story_and_places_differ_in_their_first_letter():
    task = StoryTask(facts=4, segments=6)
    first, again, other = (task.batch(4, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    assert len({place[0] for place in PLACES[:26]}) == 26
    assert len(set(NAMES)) == len(set(PLACES)) == 32
    assert task.vocab_size < 1700
    assert max(int(s.tokens.max()) for s in first) < task.vocab_size - 1  # the start token


def test_a_story_in_text_of_your_own(tmp_path):
    (tmp_path / "mine.txt").write_text("the cat sat on mary and the mat . " * 50)
    task = StoryTask(facts=1, segments=4, text=str(tmp_path / "mine.txt"))
    text = " ".join(task.decode(s.tokens[0]) for s in task.batch(1, generator(3)))
    assert "cat sat on and the mat" in re.sub(FACT + " ", "", text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"facts": 33}, "facts is 33"),
        ({"length": 3}, "length is 3"),
        ({"segments": 2, "facts": 8}, "cannot be told"),
        ({"by": "bytes", "places": 27, "length": 96}, "at most 26"),
        ({"by": "letters"}, "by is 'letters'"),
        ({"text": "digits"}, "corpus of text"),
    ],
)
def test_stories_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        StoryTask(**settings)


@given(
    seed=seeds,
    pairs=st.integers(1, 16),
    length=st.sampled_from([16, 32, 256]),
)
def test_published_recall_asks_every_key_once_and_never_shows_an_answer(seed, pairs, length):
    task = MQARTask(pairs, 64, 256, length)
    problems = task.draw(3, generator(seed))
    assert len(problems.segments) == task.segments
    tokens = torch.cat([s.tokens for s in problems.segments], dim=1)
    targets = torch.cat([s.targets for s in problems.segments], dim=1)
    ages = torch.cat(problems.ages, dim=1)
    for b in range(3):
        row = tokens[b].tolist()
        table = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(table) == pairs
        assert all(1 <= key < 32 <= value < 64 for key, value in table.items())
        asked = (targets[b] != IGNORE).nonzero()[:, 0].tolist()
        assert sorted(row[i] for i in asked) == sorted(table)
        assert all(table[row[i]] == int(targets[b, i]) for i in asked)
        rest = set(range(2 * pairs, 256)) - set(asked)
        assert all(row[i] == 0 for i in rest)
        for i in asked:
            assert (
                int(ages[b, i]) == i // length - (2 * list(table).index(row[i]) + 1) // length
            )


def test_most_queries_follow_soon():
    problems = MQARTask(8, 64, 256, 32).draw(500, generator(0))
    ages = torch.cat([a[a != IGNORE] for a in problems.ages])
    assert (ages <= 1).float().mean() > 0.5
    for settings in ((40, 64), (8, 64, 24), (8, 64, 256, 33)):
        with pytest.raises(ValueError, match=r"must be|keys|need"):
            MQARTask(*settings)
