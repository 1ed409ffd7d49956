"""Files are there whole or not at all."""

import os
import stat
import threading

import pytest

from sysctr.linux import files


def test_a_file_appears_with_content_and_mode(tmp_path) -> None:
    old_umask = os.umask(0o077)
    try:
        files.write_atomically(f"{tmp_path}/a", b"one", 0o644)
    finally:
        os.umask(old_umask)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    files.write_atomically(f"{tmp_path}/a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "directory" / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        files.write_atomically(f"{tmp_path}/directory", b"new")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(f"{tmp_path}/a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a", "directory"]


def test_readers_never_see_half_a_file(tmp_path) -> None:
    path = f"{tmp_path}/a"
    contents = (b"x" * 100_000, b"y" * 200_000)
    files.write_atomically(path, contents[0])
    seen = set()
    stopped = threading.Event()

    def read() -> None:
        while not stopped.is_set():
            with open(path, "rb") as file:
                seen.add(file.read())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(20):
            files.write_atomically(path, contents[turn % 2])
    finally:
        stopped.set()
        reader.join()
    assert seen <= set(contents)


def test_a_link_is_replaced_and_not_followed(tmp_path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("target")
    files.write_atomically(f"{tmp_path}/link", b"new")
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "link").is_symlink()


def test_the_longest_name_can_be_written(tmp_path) -> None:
    name = "é" * 127
    files.write_atomically(f"{tmp_path}/{name}", b"x")
    assert os.listdir(tmp_path) == [name]


def test_what_dead_writers_left_is_removed_and_what_live_ones_write_is_not(tmp_path) -> None:
    dead, live, foreign = ".a.0123456789ab.unfinished", ".b.0123456789ab.unfinished", ".a.unfinished"
    for name in (dead, live, foreign):
        (tmp_path / name).write_bytes(b"")
    for name in (dead, foreign):
        os.utime(tmp_path / name, (1, 1))
    assert files.remove_unfinished(str(tmp_path)) == [dead]
    assert sorted(os.listdir(tmp_path)) == sorted([live, foreign])


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    data, state = files.read_bounded(f"{tmp_path}/a", 5)
    assert (data, state.st_size) == (b"12345", 5)
    with pytest.raises(OSError, match="larger than 4"):
        files.read_bounded(f"{tmp_path}/a", 4)
    # Opening this one in the usual way would wait for a writer for ever.
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="not a regular file"):
            files.read_bounded(f"{tmp_path}/{name}", 5)


@pytest.mark.parametrize("name", ["lock", "."])
def test_a_lock_keeps_threads_apart(tmp_path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    count = 0

    def work() -> None:
        nonlocal count
        for _ in range(50):
            with files.locked(path):
                seen = count
                os.listdir(tmp_path)
                count = seen + 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == 200
