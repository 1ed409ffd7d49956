"""Images of ext4: what they are made of, how they are mounted, resized and copied, and what stops that."""

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator

import pytest

from sysctr.errors import NoSpace, NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.storage import images
from tests.disk import disk, fill
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop")]

MIB = 1 << 20


@pytest.fixture
def place(tmp_path) -> Iterator[str]:
    """A directory for images and mount points, unmounted afterwards."""
    yield str(tmp_path)
    for name in os.listdir(tmp_path):
        images.unmount(str(tmp_path / name)) if (tmp_path / name).is_dir() else None


@pytest.fixture
def image(place: str) -> str:
    path = f"{place}/disk.img"
    images.make(path, 64 * MIB)
    return path


def write(path: str, size_bytes: int) -> None:
    with open(path, "wb") as file:
        file.write(os.urandom(size_bytes))
        os.fsync(file.fileno())


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def sync(path: str) -> None:
    subprocess.run(["sync", "--file-system", path], check=True)


def check(image: str) -> None:
    """See that an image is whole and was unmounted in order."""
    subprocess.run(["e2fsck", "-f", "-n", image], check=True, capture_output=True)


def capable_of_growing() -> bool:
    with open("/proc/self/status", encoding="ascii") as file:
        bits = next(line.split()[1] for line in file if line.startswith("CapEff"))
    return bool(int(bits, 16) & 1 << 24)  # CAP_SYS_RESOURCE


def test_an_image_takes_no_room_until_it_is_written(place) -> None:
    images.make(f"{place}/large.img", 100 << 30)
    state = os.stat(f"{place}/large.img")
    assert (state.st_size, stat.S_IMODE(state.st_mode)) == (100 << 30, 0o600)
    assert state.st_blocks * 512 < 16 * MIB
    assert images.size_of(f"{place}/large.img") == 100 << 30


def test_the_content_is_an_empty_directory_of_root_and_setuid_works_in_it(image, place) -> None:
    images.mount(image, f"{place}/m")
    state = os.stat(f"{place}/m/{images.CONTENT}")
    assert (state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)) == (0, 0, 0o755)
    assert os.listdir(f"{place}/m/{images.CONTENT}") == []
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        options = next(line.split()[5] for line in mounts if f" {place}/m " in line).split(",")
    assert "nodev" in options
    assert "nosuid" not in options


def test_mounting_twice_is_fine_and_so_is_unmounting(image, place) -> None:
    images.mount(image, f"{place}/m")
    images.mount(image, f"{place}/m")
    assert images.mounted(f"{place}/m")
    assert images.held(image)
    images.unmount(f"{place}/m")
    assert not os.path.exists(f"{place}/m")
    assert not images.held(image)
    images.unmount(f"{place}/m")


def test_an_image_is_one_file_system_wherever_it_is_mounted(image, place) -> None:
    images.mount(image, f"{place}/m")
    images.mount(image, f"{place}/n")
    write(f"{place}/m/{images.CONTENT}/file", 10)
    assert os.path.exists(f"{place}/n/{images.CONTENT}/file")
    assert os.stat(f"{place}/m").st_dev == os.stat(f"{place}/n").st_dev


def test_an_image_that_somebody_still_holds_is_the_same_file_system_again(image, place) -> None:
    images.mount(image, f"{place}/m")
    with open(f"{place}/m/{images.CONTENT}/open", "w") as file:
        images.unmount(f"{place}/m")
        assert not images.mounted(f"{place}/m")
        assert images.held(image)
        images.mount(image, f"{place}/m")
        file.write("late")
        file.flush()
        assert read(f"{place}/m/{images.CONTENT}/open") == b"late"


def test_a_view_of_an_image_in_use_is_refused_and_the_other_way_round(image, place) -> None:
    images.mount(image, f"{place}/m")
    with pytest.raises(WrongState, match="elsewhere"):
        images.mount(image, f"{place}/n", read_only=True)
    images.unmount(f"{place}/m")
    images.mount(image, f"{place}/n", read_only=True)
    with pytest.raises(WrongState, match="read-only elsewhere"):
        images.mount(image, f"{place}/m")
    with pytest.raises(OSError) as caught:
        write(f"{place}/n/{images.CONTENT}/file", 1)
    assert caught.value.errno == errno.EROFS


def test_what_is_not_there_or_no_image_is_told(place) -> None:
    with pytest.raises(NotFound):
        images.mount(f"{place}/none.img", f"{place}/m")
    write(f"{place}/noise.img", MIB)
    with pytest.raises(SysctrError, match="damaged"):
        images.mount(f"{place}/noise.img", f"{place}/m")
    assert not images.held(f"{place}/noise.img")


@pytest.mark.parametrize("size_bytes", [0, 1, images.MIN_SIZE_BYTES - 1, images.MAX_SIZE_BYTES + 1])
def test_a_size_that_cannot_be_makes_nothing(place, size_bytes) -> None:
    with pytest.raises(UsageError):
        images.make(f"{place}/disk.img", size_bytes)
    assert os.listdir(place) == []


def test_the_smallest_can_be_used_and_nothing_is_made_over_another(place) -> None:
    images.make(f"{place}/disk.img", images.MIN_SIZE_BYTES)
    images.mount(f"{place}/disk.img", f"{place}/m")
    write(f"{place}/m/{images.CONTENT}/file", 8 * MIB)
    with pytest.raises(WrongState, match="exists already"):
        images.make(f"{place}/disk.img", 64 * MIB)


def test_the_size_holds(image, place) -> None:
    images.mount(image, f"{place}/m")
    with pytest.raises(OSError) as caught:
        write(f"{place}/m/{images.CONTENT}/file", 65 * MIB)
    assert caught.value.errno == errno.ENOSPC


def test_what_is_deleted_inside_gives_its_room_back(image, place) -> None:
    images.mount(image, f"{place}/m")
    write(f"{place}/m/{images.CONTENT}/file", 32 * MIB)
    sync(f"{place}/m")
    full = os.stat(image).st_blocks * 512
    os.unlink(f"{place}/m/{images.CONTENT}/file")
    sync(f"{place}/m")
    wait_until(lambda: os.stat(image).st_blocks * 512 < full - 30 * MIB)


def test_an_image_grows_and_shrinks_with_its_files(image, place) -> None:
    images.mount(image, f"{place}/m")
    write(f"{place}/m/{images.CONTENT}/file", 20 * MIB)
    content = read(f"{place}/m/{images.CONTENT}/file")
    images.unmount(f"{place}/m")
    images.grow(image, None, 200 * MIB)
    assert images.size_of(image) == os.stat(image).st_size == 200 * MIB
    images.shrink(image, 48 * MIB)
    assert images.size_of(image) == os.stat(image).st_size == 48 * MIB
    images.mount(image, f"{place}/m")
    assert read(f"{place}/m/{images.CONTENT}/file") == content
    images.unmount(f"{place}/m")
    check(image)


def test_an_image_does_not_shrink_below_its_files(image, place) -> None:
    images.mount(image, f"{place}/m")
    write(f"{place}/m/{images.CONTENT}/file", 40 * MIB)
    with pytest.raises(WrongState, match="in use"):
        images.shrink(image, 20 * MIB)
    images.unmount(f"{place}/m")
    with pytest.raises(Refused, match=r"its files need \d+ MiB, which is more than 20 MiB"):
        images.shrink(image, 20 * MIB)
    assert images.size_of(image) == os.stat(image).st_size == 64 * MIB
    with pytest.raises(UsageError, match="less than the 64 MiB"):
        images.grow(image, None, 20 * MIB)


def test_an_image_grows_while_it_is_in_use_or_says_what_it_takes(image, place) -> None:
    images.mount(image, f"{place}/m")
    if capable_of_growing():
        images.grow(image, f"{place}/m", 200 * MIB)
        assert images.size_of(image) == 200 * MIB
        write(f"{place}/m/{images.CONTENT}/file", 100 * MIB)
    else:
        with pytest.raises(Refused, match="CAP_SYS_RESOURCE"):
            images.grow(image, f"{place}/m", 200 * MIB)
        assert images.size_of(image) == os.stat(image).st_size == 64 * MIB
        write(f"{place}/m/{images.CONTENT}/file", MIB)


def test_a_frozen_image_is_whole_in_its_file_and_its_writers_wait(image, place) -> None:
    images.mount(image, f"{place}/m")
    write(f"{place}/m/{images.CONTENT}/before", MIB)
    writer = threading.Thread(target=write, args=(f"{place}/m/{images.CONTENT}/during", MIB))
    with images.frozen(f"{place}/m"):
        writer.start()
        images.copy(image, f"{place}/copy.img")
        assert writer.is_alive()
    writer.join()
    check(f"{place}/copy.img")
    images.mount(f"{place}/copy.img", f"{place}/n", read_only=True)
    assert os.listdir(f"{place}/n/{images.CONTENT}") == ["before"]


def test_what_a_crash_left_frozen_is_thawed(image, place) -> None:
    images.mount(image, f"{place}/m")
    subprocess.run(["fsfreeze", "--freeze", f"{place}/m"], check=True)
    images.thaw(f"{place}/m")
    write(f"{place}/m/{images.CONTENT}/after", MIB)
    images.thaw(f"{place}/m")


def test_an_image_that_was_not_unmounted_is_settled_before_it_is_looked_at(image, place) -> None:
    images.mount(image, f"{place}/m")
    write(f"{place}/m/{images.CONTENT}/file", MIB)
    # The state that a crash of the host leaves: all is written, and nothing closed.
    sync(f"{place}/m")
    subprocess.run(["cp", "--sparse=always", image, f"{place}/crashed.img"], check=True)
    shown = subprocess.run(
        ["dumpe2fs", "-h", f"{place}/crashed.img"], capture_output=True, text=True, check=True
    )
    assert "needs_recovery" in shown.stdout
    images.mount(f"{place}/crashed.img", f"{place}/n", read_only=True)
    assert len(read(f"{place}/n/{images.CONTENT}/file")) == MIB


@pytest.mark.parametrize(("fstype", "shares"), [("ext4", False), ("xfs", True), ("btrfs", True)])
def test_copies_share_blocks_where_the_file_system_can(tmp_path, fstype, shares) -> None:
    os.mkdir(tmp_path / "disk")
    with disk(str(tmp_path / "disk"), fstype):
        place = str(tmp_path / "disk")
        assert images.can_reflink(place) is shares
        images.make(f"{place}/a.img", 1 << 30)
        images.mount(f"{place}/a.img", f"{tmp_path}/m")
        number = os.stat(f"{tmp_path}/m").st_dev
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/dio", encoding="ascii") as dio:
            assert dio.read().strip() == ("0" if fstype == "btrfs" else "1")
        write(f"{tmp_path}/m/{images.CONTENT}/file", 16 * MIB)
        images.unmount(f"{tmp_path}/m")
        sync(place)
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        images.copy(f"{place}/a.img", f"{place}/b.img")
        sync(place)
        taken = free - os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        assert (taken < 4 * MIB) is shares
        assert os.stat(f"{place}/b.img").st_blocks * 512 < 32 * MIB
        assert subprocess.run(["cmp", f"{place}/a.img", f"{place}/b.img"], check=False).returncode == 0


def test_on_a_full_disk_nothing_is_left_half_made(tmp_path) -> None:
    os.mkdir(tmp_path / "disk")
    with disk(str(tmp_path / "disk"), "ext4"):
        place = str(tmp_path / "disk")
        images.make(f"{place}/a.img", 32 * MIB)
        images.mount(f"{place}/a.img", f"{tmp_path}/m")
        write(f"{tmp_path}/m/{images.CONTENT}/file", 8 * MIB)
        images.unmount(f"{tmp_path}/m")
        fill(place)
        before = sorted(os.listdir(place))
        with pytest.raises(NoSpace):
            images.make(f"{place}/b.img", 1 << 30)
        with pytest.raises(NoSpace):
            images.copy(f"{place}/a.img", f"{place}/b.img")
        assert sorted(os.listdir(place)) == before
