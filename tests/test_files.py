"""Files are written whole or not at all, and a folder has one user."""

import os
import subprocess
import sys
import threading

import pytest

from memformer.files import FileError, holding, probe_writable, replace_file


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep" / "a"
    for content in (b"one", b"", b"two" * 1000):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_two_writers_of_one_file_never_meet(tmp_path):
    path = tmp_path / "a"
    failures = []

    def write(sign):
        try:
            for _ in range(50):
                replace_file(path, sign * 5000)
        except FileError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(s,)) for s in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert path.read_bytes() in (b"a" * 5000, b"b" * 5000, b"c" * 5000)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "under", tmp_path / "a\0b", tmp_path / ("n" * 5000)):
        with pytest.raises(FileError, match="could not be written"):
            replace_file(path, b"x")
    with pytest.raises(FileError, match="nothing can be written"):
        probe_writable(tmp_path / "file" / "under")
    with pytest.raises(FileError, match="nothing can be written"):
        probe_writable(tmp_path / "a\0b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_held_by_one_process(tmp_path):
    code = "import sys; from memformer.files import holding\n"
    code += "with holding(sys.argv[1]): print('mine')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with holding(tmp_path), holding(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"in use by process {os.getpid()}" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "mine\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_a_lock_goes_with_its_process(tmp_path):
    code = "import sys, os; from memformer.files import holding\n"
    code += "with holding(sys.argv[1]): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    with holding(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), holding(tmp_path / "runs" / "a"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with holding(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "kept").write_text("")
    assert (tmp_path / "runs" / "a" / "kept").is_file()
