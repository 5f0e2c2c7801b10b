"""Stories: who is where, said in passing in a real text, and asked at the end.

Facts such as "mary is in the garden ." stand at any place of a text that is about something
else. After it come the questions, "where is mary ?", and the place is the answer. The idea of
facts in sentences is that of bAbI (Weston et al. 2015), of hiding them in a long text that of
BABILong (Kuratov et al. 2024); sentences, names and places are our own.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property, lru_cache
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from ..segments import IGNORE, Segment
from ..settings import Count, Field, Share, settings
from .corpora import load_corpus
from .scoring import Problems, as_segments

NAMES = [
    "mary",
    "john",
    "sandra",
    "daniel",
    "emma",
    "peter",
    "laura",
    "oscar",
    "alice",
    "henry",
    "clara",
    "simon",
    "nora",
    "felix",
    "ruth",
    "hugo",
    "vera",
    "arthur",
    "irene",
    "victor",
    "helen",
    "walter",
    "diana",
    "edgar",
    "sophie",
    "martin",
    "agnes",
    "robert",
    "julia",
    "thomas",
    "paula",
    "george",
]
# By bytes a place is asked for by its first letter, so the first 26 differ in it.
PLACES = [
    "attic",
    "barn",
    "cellar",
    "den",
    "elevator",
    "forest",
    "garden",
    "hall",
    "inn",
    "jail",
    "kitchen",
    "library",
    "market",
    "nursery",
    "office",
    "park",
    "quarry",
    "river",
    "school",
    "tower",
    "university",
    "village",
    "workshop",
    "xenodochium",
    "yard",
    "zoo",
    "bathroom",
    "chapel",
    "factory",
    "harbour",
    "museum",
    "station",
]
TOLD, MOVED, ASKED = "is in the", "went to the", "where is"
UNKNOWN = "…"  # a word of the text that is not among the frequent ones


@lru_cache(maxsize=8)
def words_of(corpus: str) -> tuple[str, ...]:
    """The words and signs of a corpus in order, in lower case."""
    found = load_corpus(corpus)
    if found.tokens is None:
        raise ValueError(f"text is {corpus!r}; stories need a corpus of text")
    whole = b"\n".join(found.tokens.decode(d.tolist()) for d in found.documents)
    return tuple(re.findall(r"[a-z]+|[.,;:!?]", whole.decode(errors="replace").lower()))


@lru_cache(maxsize=8)
def vocabulary_of(corpus: str, words: int, names: int, places: int) -> tuple[str, ...]:
    """Names, places, the words of the sentences, then the most frequent words of the text."""
    fixed = [*NAMES[:names], *PLACES[:places], *f"{TOLD} {MOVED} {ASKED} . ?".split(), UNKNOWN]
    counts = Counter(words_of(corpus))
    own = {*NAMES, *PLACES, *fixed}
    frequent = sorted((w for w in counts if w not in own), key=lambda w: (-counts[w], w))
    return tuple(dict.fromkeys([*fixed, *frequent[:words]]))


@lru_cache(maxsize=8)
def filler_of(task: StoryTask) -> Tensor:
    """The text around the facts as ids; names and places that are asked for never stand in it."""
    known = {word: id for id, word in enumerate(task.vocabulary)}
    asked = {*NAMES, *PLACES}
    if task.by == "words":
        unknown = known[UNKNOWN]
        ids = [known.get(w, unknown) for w in words_of(task.text) if w not in asked]
    else:
        ids = list(" ".join(w for w in words_of(task.text) if w not in asked).encode())
    return torch.tensor(ids)


class Fact(NamedTuple):
    """One sentence to be told: its ids, and which question it answers."""

    ids: list[int]
    fact: int
    counts: bool  # False where a later sentence says otherwise


@settings()
class StoryTask:
    """Facts about who is where, in a text at any of its segments, all asked at the end.

    A story has `segments` segments of `length` tokens. Of `facts` names each is told to be in
    one of `places` places, at the start (`arrival="first"`) or anywhere ("any"), and a share
    `overwrite` of them moves later: "mary went to the office ." counts then. The last segments
    ask "where is mary ?", at whose last token the place is to be predicted; it is never shown.

    Tokens are words, of which the `words` most frequent ones of the text are known; or, with
    `by="bytes"`, bytes, and the answer is the first letter of the place. `text` is any corpus
    of text (see `load_corpus`). Raises `ValueError` where segments cannot hold all facts.
    """

    facts: Annotated[int, Field(ge=1, le=len(NAMES))] = 8
    segments: Annotated[int, Field(ge=2)] = 16
    length: Count = 32
    places: Annotated[int, Field(ge=2, le=len(PLACES))] = 8
    arrival: Literal["first", "any"] = "any"
    overwrite: Share = 0.0
    words: Count = 1500
    by: Literal["words", "bytes"] = "words"
    text: str = "python-reference"

    def __post_init__(self) -> None:
        if self.by == "bytes" and self.places > 26:
            raise ValueError(
                f"places is {self.places}; by bytes it must be at most 26, as the first letter "
                "is the answer"
            )
        longest = max(len(self.encode(self.sentence(n, 0))) for n in range(self.facts))
        most = max(longest, self.longest_question)
        if self.length < most:
            raise ValueError(f"length is {self.length}; a sentence needs {most} tokens")
        room = max(0, self.told_segments) * (self.length // self.longest_sentence)
        if room < self.tellings:
            raise ValueError(
                f"segments is {self.segments}; {self.asked_segments} ask, and the others hold "
                f"{room} sentences, so {self.tellings} cannot be told. Take more segments, or a "
                "greater length"
            )

    # --- words and sentences ---

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, by their ids; the letters where tokens are bytes."""
        if self.by == "bytes":
            return tuple(map(chr, range(256)))
        # Names of all tasks are there, so that a model for 8 facts can be asked for 16.
        return vocabulary_of(self.text, self.words, len(NAMES), len(PLACES))

    @property
    def vocab_size(self) -> int:
        """How many ids stories are made of, one for the start token among them."""
        return len(self.vocabulary) + 1

    def sentence(self, name: int, place: int, moved: bool = False) -> str:
        """A fact in words."""
        return f"{NAMES[name]} {MOVED if moved else TOLD} {PLACES[place]} ."

    def question(self, name: int) -> str:
        """A question in words."""
        return f"{ASKED} {NAMES[name]} ?"

    def encode(self, text: str) -> list[int]:
        """The ids of a sentence. Raises `ValueError` for words that are not known."""
        if self.by == "bytes":
            return list(f"{text} ".encode())
        known = _ids_of(self.vocabulary)
        unknown = [word for word in text.split() if word not in known]
        if unknown:
            raise ValueError(f"the word {unknown[0]!r} is not known to this task")
        return [known[word] for word in text.split()]

    def decode(self, ids: Tensor | list[int]) -> str:
        """Text to read. The start token is left out."""
        numbers = [int(id) for id in ids if 0 <= int(id) < self.vocab_size - 1]
        if self.by == "bytes":
            return bytes(numbers).decode(errors="replace")
        return " ".join(self.vocabulary[id] for id in numbers)

    def answer(self, place: int) -> int:
        """The id that is the answer of a question."""
        return ord(PLACES[place][0]) if self.by == "bytes" else self.encode(PLACES[place])[0]

    # --- how much there is room for ---

    @cached_property
    def longest_sentence(self) -> int:
        texts = (
            self.sentence(n, p, moved)
            for n in range(self.facts)
            for p in range(self.places)
            for moved in ([False, True] if self.told_again else [False])
        )
        return 6 if self.by == "words" else max(len(text) + 1 for text in texts)

    @cached_property
    def longest_question(self) -> int:
        return max(len(self.encode(self.question(n))) for n in range(self.facts))

    @cached_property
    def asked_segments(self) -> int:
        """How many of the last segments ask: each holds as many whole questions as fit."""
        return -(-self.facts // max(1, self.length // self.longest_question))

    @property
    def told_segments(self) -> int:
        return self.segments - self.asked_segments

    @property
    def told_again(self) -> int:
        """How many of the names move."""
        return round(self.overwrite * self.facts)

    @property
    def tellings(self) -> int:
        return self.facts + self.told_again

    # --- problems ---

    def batch(self, batch_size: int, generator: torch.Generator) -> list[Segment]:
        """`segments` timesteps of `batch_size` fresh stories; only the last ask."""
        return self.draw(batch_size, generator).segments

    def draw(self, batch_size: int, generator: torch.Generator) -> Problems:
        """The same, with the age of every answer."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        rows = [self._story(generator) for _ in range(batch_size)]
        tokens, targets, ages = (
            torch.split(torch.tensor([row[part] for row in rows]), self.length, dim=1)
            for part in range(3)
        )
        return Problems(as_segments(tokens, targets), list(ages))

    def _story(self, generator: torch.Generator) -> tuple[list[int], list[int], list[int]]:
        """Tokens, targets and ages of one story, segment after segment."""

        def order(size: int) -> list[int]:
            return torch.randperm(size, generator=generator).tolist()

        places = torch.randint(self.places, (self.facts,), generator=generator).tolist()
        steps = torch.randint(1, self.places, (self.facts,), generator=generator).tolist()
        seats = self._seats(order)
        told: list[list[Fact]] = [[] for _ in range(self.told_segments)]
        when = [0] * self.facts
        for name, seat in enumerate(seats[: self.facts]):
            again = name < self.told_again
            late = seats[self.facts + name] if again else seat
            first, last = min(seat, late), max(seat, late)
            if again:
                old = (places[name] + steps[name]) % self.places
                told[first[0]].append(Fact(self.encode(self.sentence(name, old)), name, False))
            ids = self.encode(self.sentence(name, places[name], again))
            told[last[0]].append(Fact(ids, name, True))
            when[name] = last[0]
        tokens: list[int] = []
        filler = filler_of(self)
        at = int(torch.randint(len(filler), (), generator=generator))
        for facts in told:
            tokens += self._segment(facts, filler, at, generator)
            at += self.length
        silent = [IGNORE] * len(tokens)
        return self._questions(tokens, silent, places, when, order(self.facts))

    def _seats(self, order: object) -> list[tuple[int, int]]:
        """Where each telling has its place: segments, and an order inside them."""
        room = self.length // self.longest_sentence
        every = [(t, k) for t in range(self.told_segments) for k in range(room)]
        if self.arrival == "first":
            return every[: self.tellings]
        drawn = order(len(every))  # type: ignore[operator]
        return [every[i] for i in drawn[: self.tellings]]

    def _segment(
        self, facts: list[Fact], filler: Tensor, at: int, generator: torch.Generator
    ) -> list[int]:
        """One segment of text with facts between its words, the earlier telling first."""
        facts = sorted(facts, key=lambda fact: fact.counts)
        rest = self.length - sum(len(fact.ids) for fact in facts)
        text = filler[(torch.arange(rest) + at) % len(filler)].tolist()
        cuts = sorted(torch.randint(rest + 1, (len(facts),), generator=generator).tolist())
        if self.by == "bytes":  # between words, not inside them
            cuts = [max(i for i in range(c + 1) if i == 0 or text[i - 1] == 32) for c in cuts]
        tokens: list[int] = []
        for start, end, fact in zip([0, *cuts], cuts, facts, strict=False):
            tokens += [*text[start:end], *fact.ids]
        return [*tokens, *text[cuts[-1] if cuts else 0 :]]

    def _questions(
        self,
        tokens: list[int],
        silent: list[int],
        places: list[int],
        when: list[int],
        order: list[int],
    ) -> tuple[list[int], list[int], list[int]]:
        """The story with its questions: tokens, targets, ages."""
        targets, ages = silent, list(silent)
        room = max(1, self.length // self.longest_question)
        padding = self.encode(".")
        for number, begin in enumerate(range(0, self.facts, room)):
            here: list[int] = []
            answers, since = [IGNORE] * self.length, [IGNORE] * self.length
            for name in order[begin : begin + room]:
                here += self.encode(self.question(name))
                answers[len(here) - 1] = self.answer(places[name])
                since[len(here) - 1] = self.told_segments + number - when[name]
            tokens += here + (padding * self.length)[: self.length - len(here)]
            targets, ages = targets + answers, ages + since
        return tokens, targets, ages


@lru_cache(maxsize=16)
def _ids_of(vocabulary: tuple[str, ...]) -> dict[str, int]:
    return {word: id for id, word in enumerate(vocabulary)}
