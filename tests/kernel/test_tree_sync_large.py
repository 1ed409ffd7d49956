"""Many files, large files, and how fast they go: a synchronisation against plain rsync in the same minute."""

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.engine.job import JobRunner
from sysctr.linux.mount import MNT_DETACH, mount, umount2
from tests.storage import MIB
from tests.syncing import Pair, plain, runner_with
from tests.trees import describe, difference
from tests.wait import wait_until

pytestmark = [
    pytest.mark.root, pytest.mark.kernel, pytest.mark.slow, pytest.mark.needs("userns", "idmap"),
]  # fmt: skip

_PORT = 18730
# Its own network, so that no port is taken and none is open.
_PLAIN = f"""
set -eu
ip link set lo up
printf 'use chroot = no\\n[tree]\\npath = %s\\nuid = 0\\ngid = 0\\n' "$1" >"$3"
rsync --daemon --no-detach --address=127.0.0.1 --port={_PORT} --config="$3" &
trap 'kill $!' EXIT
until rsync rsync://127.0.0.1:{_PORT}/ >/dev/null 2>&1; do :; done
begin=$(date +%s%N)
rsync -aHAX --numeric-ids --sparse --delete rsync://127.0.0.1:{_PORT}/tree/ "$2/"
echo $(($(date +%s%N) - begin))
"""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory on no disk: what is measured is the way, not what others write to the disk meanwhile."""
    path = tmp_path / "memory"
    path.mkdir()
    mount("tmpfs", str(path), "tmpfs", 0, "size=4g,mode=0755")
    try:
        yield path
    finally:
        umount2(str(path), MNT_DETACH)


def pair_in(place: Path, jobs: JobRunner) -> Pair:
    for name in ("source", "target"):
        os.mkdir(place / name, 0o755)
    return Pair(jobs, runner_with(jobs, 1_900_400_000), plain(place / "source"), plain(place / "target"))


def test_a_hundred_thousand_files(jobs: JobRunner, memory: Path) -> None:
    pair = pair_in(memory, jobs)
    for number in range(500):
        directory = memory / "source" / f"d{number % 20}" / f"s{number}"
        directory.mkdir(parents=True)
        for each in range(200):
            Path(directory, f"file-{each}").write_text(f"{number} {each}")
    begin_s = time.monotonic()
    (first,) = pair.pass_()
    first_s, begin_s = time.monotonic() - begin_s, time.monotonic()
    Path(memory, "source/d0/s0/file-0").write_text("changed")
    pair.pass_()
    print(f"100000 files: first pass {first_s:.1f} s, a later one {time.monotonic() - begin_s:.1f} s")
    assert first.files == 100_000
    assert difference(describe(str(memory / "source")), describe(str(memory / "target"))) == {}


def test_a_gigabyte_that_changes_while_it_is_copied(jobs: JobRunner, memory: Path) -> None:
    pair = pair_in(memory, jobs)
    path = memory / "source/large"
    chance = random.Random(7)
    block = chance.randbytes(64 * MIB)
    with open(path, "wb") as file:
        for number in range(16):
            file.write(block[number * MIB :] + block[: number * MIB])
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        with open(path, "r+b", buffering=0) as file:
            while not stop.is_set():
                file.seek(chance.randrange(1024) * MIB)
                file.write(chance.randbytes(4096))
                written += 1
                stop.wait(0.0002)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_until(lambda: written > 10, what="the first writes")
        before = written
        pair.pass_()
        assert written > before
    finally:
        stop.set()
        writer.join()
    pair.bytes = 0
    begin_s = time.monotonic()
    pair.pass_()
    took_s = time.monotonic() - begin_s
    print(f"1 GiB with {written} writes: last pass {took_s:.1f} s, {pair.bytes / MIB:.1f} MiB")
    assert subprocess.run(["cmp", str(path), str(memory / "target/large")], check=False).returncode == 0
    assert pair.bytes < 512 * MIB, "of an old copy only what differs is sent"


def test_the_first_pass_is_as_fast_as_plain_rsync(jobs: JobRunner, memory: Path) -> None:
    """600 MB in 25000 files, as a container has them: against rsync over an unencrypted socket."""
    pair = pair_in(memory, jobs)
    sizes = random.Random(3)
    data = sizes.randbytes(8 * MIB)
    total_bytes = 0
    for number in range(500):
        directory = memory / "source" / f"d{number % 20}" / f"s{number}"
        directory.mkdir(parents=True)
        for each in range(50):
            size_bytes = min(int(sizes.paretovariate(1.1) * 4000), 4 * MIB)
            at = sizes.randrange(4 * MIB)
            Path(directory, f"file-{each}").write_bytes(data[at : at + size_bytes])
            total_bytes += size_bytes
    best = {"plain": 1e9, "ours": 1e9}
    for _ in range(3):
        shutil.rmtree(memory / "target")
        (memory / "target").mkdir(mode=0o755)
        argv = ["unshare", "--net", "sh", "-c", _PLAIN, "plain", memory / "source", memory / "target"]
        done = subprocess.run([*argv, memory / "rsyncd.conf"], check=True, capture_output=True, text=True)
        best["plain"] = min(best["plain"], int(done.stdout) / 1e9)
        shutil.rmtree(memory / "target")
        (memory / "target").mkdir(mode=0o755)
        pair.since = None
        begin_s = time.monotonic()
        pair.pass_()
        best["ours"] = min(best["ours"], time.monotonic() - begin_s)
    ratio = best["plain"] / best["ours"]
    rates = {name: total_bytes / took_s / 1e6 for name, took_s in best.items()}
    words = f"{rates['ours']:.0f} MB/s, rsync {rates['plain']:.0f}, {ratio:.2f} times"
    print(f"{total_bytes / 1e6:.0f} MB in 25000 files: {words}")
    assert ratio > 0.6
