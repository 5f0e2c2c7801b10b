"""Corpora: what is read is what there is, and no two share a digest."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from memformer.tasks.corpora import Corpus, _articles, load_corpus


def corpus_of(lists, start=10):
    ids = tuple(torch.tensor(ids, dtype=torch.int64) for ids in lists)
    return Corpus("made up", "train", ids, start)


def test_the_digest_names_ids_and_borders():
    one, same = corpus_of([[1, 2], [3]]), corpus_of([[1, 2], [3]])
    assert one.sha256() == same.sha256()
    digests = {
        corpus_of(lists).sha256()
        for lists in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]], [[1, 2], [4]])
    }
    assert len(digests) == 5
    small, large = (torch.tensor([1, 2, 250], dtype=t) for t in (torch.uint8, torch.int64))
    assert Corpus("a", "b", (small,), 256).sha256() == Corpus("c", "d", (large,), 300).sha256()
    ids = {Corpus("a", "b", (torch.tensor([i]),), 10**6).sha256() for i in (1, 257, 65537)}
    assert len(ids) == 3  # no id is cut to its last byte or two


def test_digits_are_the_scans_of_scikit_learn():
    train, test = load_corpus("digits"), load_corpus("digits", "test")
    assert len(train.documents) + len(test.documents) == 1797
    pixels = torch.from_numpy(load_digits().data).long()
    assert train.vocab_size == test.vocab_size == 18
    held_out = list(test.documents)
    everything = [
        held_out.pop(0) if i % 5 == 4 else document
        for i, document in enumerate(_merge(train.documents, 1797))
    ]
    assert torch.equal(torch.stack(everything).long(), pixels)
    assert train.num_tokens == 64 * len(train.documents)


def _merge(training, total):
    """The training documents at their places, None where a held-out one belongs."""
    rest = iter(training)
    return [None if i % 5 == 4 else next(rest) for i in range(total)]


def test_the_python_reference_is_text_and_its_splits_share_no_paragraph():
    train, test = load_corpus("python-reference"), load_corpus("python-reference", "test")
    assert train.vocab_size == 257
    assert all(int(d.max()) < train.start for d in (*train.documents, *test.documents))
    texts = [[bytes(d.tolist()).decode() for d in c.documents] for c in (train, test)]
    assert any("keyword" in text for text in texts[0])
    seen, held_out = (
        {" ".join(p.split()) for text in split for p in text.split("\n\n") if len(p) >= 40}
        for split in texts
    )
    assert len(held_out) > 10
    assert not seen & held_out


@pytest.mark.parametrize("name", ["digits", "python-reference"])
@given(limit=st.integers(1, 12))
def test_limit_keeps_the_first_documents(name, limit):
    some, every = load_corpus(name, limit=limit), load_corpus(name)
    assert len(some.documents) == limit
    pairs = zip(some.documents, every.documents, strict=False)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert some.start == every.start


def test_a_corpus_is_the_same_each_time():
    for name in ("digits", "python-reference"):
        assert load_corpus(name).sha256() == load_corpus(name).sha256()
        assert load_corpus(name).sha256() != load_corpus(name, "test").sha256()


@given(ids=st.sets(st.integers(0, 2**20), min_size=2, max_size=6), low=st.integers(0, 65535))
def test_no_two_ids_share_a_digest(ids, low):
    ids |= {low, low + 65536}  # alike in their last two bytes
    digests = {Corpus("a", "b", (torch.tensor([i]),), 2**21).sha256() for i in ids}
    assert len(digests) == len(ids)


def test_no_two_topics_of_the_python_reference_share_a_paragraph():
    splits = [load_corpus("python-reference", split) for split in ("train", "test")]
    counts = defaultdict(int)
    for document in (d for corpus in splits for d in corpus.documents):
        text = bytes(document.tolist()).decode()
        for paragraph in {" ".join(p.split()) for p in text.split("\n\n") if len(p) >= 40}:
            counts[paragraph] += 1
    assert len(counts) > 100
    assert set(counts.values()) == {1}


ONE = [" = One = \n", "", " some text \n", "", " = = Part = = \n", "", " more \n"]
TWO = [" = Two = \n", "", " a sum \n", " = 1 + 1 \n", ""]


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_articles_begin_at_a_title_between_empty_lines(blank):
    lines = [""] * blank + ONE + [""] + TWO
    articles = [text for text in _articles(lines) if text.strip()]
    assert articles == ["".join(ONE), "".join(TWO)]


@pytest.mark.parametrize("before", ["", " text \n"])
@pytest.mark.parametrize("after", ["", " text \n"])
def test_a_formula_is_no_title(before, after):
    """A line that begins with the sign, and is not alone, belongs to the text."""
    lines = [*ONE, "", before, " = x + y \n", after]
    alone = not before and not after
    assert len([text for text in _articles(lines) if text.strip()]) == 1 + alone
    assert "".join(_articles(lines)) == "".join(lines)
