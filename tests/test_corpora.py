"""Corpora: embedded, from a mirror, of the reader's own files; what cannot be read is said."""

import os
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from memformer.segments import DocumentStreams
from memformer.tasks import EMBEDDED, HUB, Corpus, CorpusError, load_corpus
from memformer.tasks.corpora import _articles, names_files
from memformer.tasks.tokens import tokens_from_json


def corpus_of(lists, start=10):
    return Corpus(
        "made up", "train", tuple(torch.tensor(ids, dtype=torch.int64) for ids in lists), start
    )


not_positive = st.integers(-1000, 0)
words = st.text("abcdefghijklmnopqrstuvwxyz-_ ", max_size=12)


@contextmanager
def refused(*mentions, kind=ValueError):
    """The block raises `kind`, and every one of `mentions` stands in the message."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    for mention in mentions:
        assert str(mention) in message, f"{mention!r} is not named in {message!r}"


# --- what is refused ------------------------------------------------------------------------


@given(batch=st.integers(-3, 3), length=st.integers(-3, 3))
def test_streams_of_nonsense_sizes(batch, length):
    corpus = Corpus("made up", "train", (torch.arange(5),), 9)
    if batch < 1 or length < 1:
        named = f"batch_size is {batch}" if batch < 1 else f"segment_length is {length}"
        with refused(named, "at least 1"):
            DocumentStreams(corpus, batch, length)
    else:
        DocumentStreams(corpus, batch, length)


def test_a_corpus_without_tokens():
    for documents in ((), (torch.zeros(0).long(),)):
        with refused("no tokens", "at least one"):
            Corpus("made up", "train", documents, 9)


@given(bad=st.integers(-99, -1) | st.integers(9, 99), start=st.just(9))
def test_a_corpus_with_ids_out_of_range(bad, start):
    with refused(bad, "[0, 9)"):
        Corpus("made up", "train", (torch.arange(5), torch.tensor([1, bad])), start)


@given(shape=st.sampled_from([(), (2, 3)]), dtype=st.sampled_from([torch.float32, torch.bool]))
def test_a_corpus_of_something_else(shape, dtype):
    for document in (torch.zeros(shape, dtype=torch.int64), torch.zeros(4, dtype=dtype)):
        with refused(document.dtype, tuple(document.shape), "integers", kind=TypeError):
            Corpus("made up", "train", (document,), 9)


@given(name=words.filter(lambda name: name not in {*EMBEDDED, *HUB}))
def test_an_unknown_corpus(name):
    with refused(repr(name), "digits", "python-reference", "owner/name", kind=CorpusError):
        load_corpus(name)


@pytest.mark.parametrize("name", sorted(EMBEDDED))
@given(split=words.filter(lambda split: split not in ("train", "test")))
def test_an_unknown_split(name, split):
    with refused(repr(name), repr(split), "'train'", "'test'", kind=CorpusError):
        load_corpus(name, split)


@pytest.mark.parametrize("name", [*sorted(EMBEDDED), "mnist", "someone/something"])
@given(limit=not_positive)
def test_limits_below_one(name, limit):
    with refused(f"limit is {limit}", "at least 1"):
        load_corpus(name, limit=limit)


@pytest.mark.parametrize("name", [*sorted(HUB), "someone/something"])
def test_a_corpus_that_cannot_be_reached(name, monkeypatch):
    def unplugged(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unplugged)
    monkeypatch.delenv("MEMFORMER_DATA_DIR", raising=False)
    hub_id = HUB.get(name, name).partition(":")[0]
    mentions = [repr(name), hub_id, "MEMFORMER_DATA_DIR"]
    if "/" in hub_id:
        mentions += ["no route to the hub", "network"]
    with refused(*mentions, kind=CorpusError):
        load_corpus(name)


def test_a_machine_without_network_is_told_at_once(tmp_path):
    """The real library, told to stay offline, in a process of its own."""
    code = "from memformer.tasks import load_corpus; load_corpus('mnist')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("MEMFORMER_DATA_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "CorpusError" in done.stderr
    assert "'mnist'" in last or "'mnist'" in done.stderr.rpartition("CorpusError")[2]
    assert "MEMFORMER_DATA_DIR" in done.stderr.rpartition("CorpusError")[2]


# --- a copy on this machine -----------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An empty `MEMFORMER_DATA_DIR`, a cache of its own, and no way to the hub."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("MEMFORMER_DATA_DIR", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return folder


def write_rows(folder, **splits):
    """A data set as it lies on the hub: one parquet file per split, and its card."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        features = None
        if "image" in rows:
            features = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def card(folder, configuration):
    lines = ["---", "configs:", f"- config_name: {configuration}", "  data_files:"]
    for split in ("train", "test"):
        lines += [f"  - split: {split}", f"    path: {configuration}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def random_text(length):
    return "".join(chr(int(c)) for c in torch.randint(32, 0x250, (length,)))


def test_text_from_a_local_copy(mirror):
    train, test = [random_text(n) for n in (40, 1, 300)], [random_text(9)]
    write_rows(mirror / "someone" / "stories", train={"text": train}, test={"text": test})
    for split, texts in (("train", train), ("test", test)):
        corpus = load_corpus("someone/stories", split)
        assert [bytes(d.tolist()).decode() for d in corpus.documents] == texts
        assert corpus.vocab_size == 257
    assert len(load_corpus("someone/stories", limit=2).documents) == 2
    with refused("someone/stories", "nowhere", "train", "test", kind=CorpusError):
        load_corpus("someone/stories", "nowhere")
    streams = DocumentStreams(load_corpus("someone/stories"), 2, 16, 0)
    assert sum(int(segment.mask.sum()) for segment in streams) == sum(
        len(text.encode()) for text in train
    )


def test_a_book_from_a_local_copy(mirror):
    write_rows(mirror / "books", train={"title": ["a"], "text": ["It was a dark night."]})
    corpus = load_corpus("books")
    assert bytes(corpus.documents[0].tolist()) == b"It was a dark night."


def test_empty_texts_of_a_local_copy_do_no_harm(mirror):
    write_rows(mirror / "someone" / "gaps", train={"text": ["", "one", "", "two"]})
    corpus = load_corpus("someone/gaps")
    texts = [bytes(d.tolist()) for d in corpus.documents]
    assert [text for text in texts if text] == [b"one", b"two"]
    write_rows(mirror / "someone" / "void", train={"text": ["", ""]})
    with refused("someone/void", "no tokens"):
        load_corpus("someone/void")  # the name too: who reads the log did not write the call


def test_articles_from_a_local_copy_of_wikitext(mirror):
    folder = mirror / "Salesforce" / "wikitext"
    lines = ["", " = First = \n", "", " text of it \n", " = = Section = = \n", " more \n", ""]
    lines += [" = Second = \n", "", " other text \n"]
    write_rows(folder / "wikitext-2-v1", train={"text": lines}, test={"text": lines[7:]})
    card(folder, "wikitext-2-v1")
    texts = [bytes(d.tolist()).decode() for d in load_corpus("wikitext-2").documents]
    texts = [text for text in texts if text]
    assert len(texts) == 2
    assert texts[0].startswith(" = First = \n")
    assert " more \n" in texts[0]
    assert texts[1] == " = Second = \n other text \n"
    assert len(load_corpus("wikitext-2", "test").documents) == 1


def test_images_from_a_local_copy(mirror):
    pixels = torch.randint(256, (5, 6, 4), dtype=torch.uint8).numpy()
    images = [Image.fromarray(p) for p in pixels]
    folder = mirror / "ylecun" / "mnist"
    write_rows(folder / "mnist", train={"image": images[:3]}, test={"image": images[3:]})
    card(folder, "mnist")
    for split, expected in (("train", pixels[:3]), ("test", pixels[3:])):
        corpus = load_corpus("mnist", split)
        assert corpus.vocab_size == 257
        found = np.stack([d.numpy() for d in corpus.documents])
        assert np.array_equal(found, expected.reshape(len(expected), 24))
    assert len(load_corpus("mnist", limit=2).documents) == 2
    assert len(load_corpus("mnist", limit=99).documents) == 3


def test_a_local_copy_without_text_or_images(mirror):
    write_rows(mirror / "someone" / "numbers", train={"number": [1, 2]})
    with refused("someone/numbers", "number", "text", "image", kind=CorpusError):
        load_corpus("someone/numbers")


def test_a_name_that_the_mirror_lacks_is_looked_for_on_the_hub(mirror):
    with refused("someone/else", "MEMFORMER_DATA_DIR", kind=CorpusError):
        load_corpus("someone/else")


# --- the reader's own files -----------------------------------------------------------------


def text_of(corpus):
    return [corpus.tokens.decode(d.tolist()).decode() for d in corpus.documents]


def test_one_file_is_one_document_and_its_tail_is_held_out(tmp_path):
    text = "".join(f"line {i} is wörth\n\nsaying\n" for i in range(200))
    path = tmp_path / "notes.txt"
    path.write_text(text)
    train, test = (load_corpus(str(path), split) for split in ("train", "test"))
    assert text_of(train)[0] + text_of(test)[0] == text  # newlines and all
    assert 0.05 < test.num_tokens / len(text.encode()) < 0.15
    assert text_of(test)[0].startswith(("line", "saying", "\n"))
    for name in (path, f"{tmp_path}/*.txt", str(tmp_path), tmp_path):
        assert load_corpus(name).sha256() == train.sha256()


def test_many_files_are_documents_and_every_tenth_is_held_out(tmp_path):
    for i in range(23):
        (tmp_path / f"{i:02}.md").write_text(f"document {i}\n")
    (tmp_path / "program.py").write_text("no text")
    (tmp_path / ".hidden.txt").write_text("not meant")
    (tmp_path / "empty.txt").write_text(" ")
    train, test = load_corpus(tmp_path), load_corpus(tmp_path, "test")
    assert text_of(test) == ["document 4\n", "document 14\n"]
    assert len(train.documents) == 21
    assert not set(text_of(train)) & set(text_of(test))
    assert load_corpus(f"{tmp_path}/*.py").num_tokens == 6  # the tail of seven is held out
    assert len(load_corpus(tmp_path, limit=3).documents) == 3


def test_two_files_leave_one_for_each_split(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 9)
    assert text_of(load_corpus(tmp_path)) == ["a" * 9]
    assert text_of(load_corpus(tmp_path, "test")) == ["b" * 9]


def test_pieces_are_learned_from_training_text_and_written_back_exactly(tmp_path):
    text = "the cat sät on the mat, the cat\n" * 100
    (tmp_path / "a.txt").write_text(text)
    train = load_corpus(tmp_path, tokens="bpe:300")
    test = load_corpus(tmp_path, "test", tokens=train.tokens)
    assert train.vocab_size <= 301
    assert train.num_tokens < len(text) / 2
    assert text_of(train)[0] + text_of(test)[0] == text
    again = tokens_from_json(train.tokens.to_json())
    odd = "naïve ☃ \x00 \r\n"
    assert again.decode(again.encode(odd).tolist()).decode() == odd
    assert load_corpus(tmp_path, "test", tokens="bpe:300").sha256() == test.sha256()
    for wrong in ("bpe", "bpe:3", "words", "bpe:x", "bpe:٣٠٠"):
        with refused(repr(wrong), "'bytes'", "'bpe:N'"):
            load_corpus(tmp_path, tokens=wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no text"), (b" \n", "no text"), (b"\xff\xfe\x00", "UTF-8"), (b"a", "single")],
)
def test_files_without_text(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with refused(message, "a.txt", kind=CorpusError):
        load_corpus(str(tmp_path / "a.txt"))


def test_names_that_are_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "void").mkdir()
    for name in ("nowhere.txt", "./nowhere", "*.txt", "a\0b.txt", "x" * 5000 + ".txt"):
        with refused("corpus", kind=CorpusError):
            load_corpus(name)
    with refused("no .txt or .md", kind=CorpusError):
        load_corpus("./void")
    with refused("int", kind=CorpusError):
        load_corpus(3)
    with refused("'train' or 'test'", kind=CorpusError):
        load_corpus(Path("void"), "valid")


def test_a_folder_never_shadows_a_data_set(tmp_path, monkeypatch):
    """`evilorg/ds` in the working folder is read only where it is named as a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMFORMER_DATA_DIR", raising=False)
    folder = tmp_path / "evilorg" / "ds"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("mine, all mine")
    with refused("./evilorg/ds", "lies here", kind=CorpusError):
        load_corpus("evilorg/ds")
    assert text_of(load_corpus("./evilorg/ds"))[0].startswith("mine")
    (tmp_path / "digits").mkdir()
    assert load_corpus("digits", limit=1).vocab_size == 18


def test_what_is_named_as_files():
    for name in ("notes.txt", "./x", "/x", "~/x", "../x", "a/b.MD", "a/*", "x?"):
        assert names_files(name), name
    for name in ("digits", "owner/name", "owner/name:config", "books", "mnist"):
        assert not names_files(name), name


def test_a_column_of_numbers_and_images_of_16_bits(mirror):
    write_rows(mirror / "someone" / "counts", train={"text": [1, 2]})
    with refused("someone/counts", "int", kind=CorpusError):
        load_corpus("someone/counts")
    deep = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    write_rows(mirror / "someone" / "deep", train={"image": [deep]})
    with refused("someone/deep", "8 bits", kind=CorpusError):
        load_corpus("someone/deep")


# --- embedded corpora -------------------------------------------------------------------------


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
