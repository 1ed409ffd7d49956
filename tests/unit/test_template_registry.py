"""A template is there completely or not at all, and is not taken from under those who use it."""

import json
import os

import pytest

from sysctr.errors import NotFound, SysctrError, UsageError, WrongState
from sysctr.paths import Layout
from sysctr.template.base import Made, Source
from sysctr.template.registry import Registry
from sysctr.template.rootfs_check import NotARootfs
from tests.unit.test_template_rootfs import program

SOURCE = Source("recipe", "test", "sha256:0")


def make_tree(building: str) -> Made:
    os.makedirs(f"{building}/rootfs/sbin")
    with open(f"{building}/rootfs/sbin/init", "wb") as file:
        file.write(program())
    os.chmod(f"{building}/rootfs/sbin/init", 0o755)
    return Made(SOURCE, version="1", description="a test", labels={"family": "test"})


@pytest.fixture
def registry(tmp_path) -> Registry:
    made = Registry(Layout(str(tmp_path)))
    made.prepare()
    return made


def left(registry: Registry) -> set[str]:
    return set(os.listdir(registry.directory))


def test_an_added_template_is_listed_and_found(registry) -> None:
    added = registry.add("one", make_tree)
    assert registry.list() == [added]
    assert registry.get("one") == added
    assert added.source == SOURCE
    assert added.size_bytes > 0
    assert os.path.isdir(registry.rootfs("one") + "/dev")
    assert os.stat(registry.rootfs("one")).st_mode & 0o777 == 0o755
    assert os.stat(registry.directory).st_mode & 0o777 == 0o700


def test_a_builder_that_fails_leaves_nothing(registry) -> None:
    def fail(building: str) -> Made:
        make_tree(building)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        registry.add("one", fail)
    assert left(registry) == set()


def test_a_tree_that_is_no_rootfs_leaves_nothing(registry) -> None:
    with pytest.raises(NotARootfs):
        registry.add("one", lambda building: Made(SOURCE))
    assert left(registry) == set()


def test_a_template_is_never_replaced(registry) -> None:
    registry.add("one", make_tree)
    with pytest.raises(WrongState, match="exists already"):
        registry.add("one", make_tree)

    def overtaken(building: str) -> Made:
        registry.add("two", make_tree)
        return make_tree(building)

    with pytest.raises(WrongState, match="exists already"):
        registry.add("two", overtaken)
    assert left(registry) == {"one", "two"}


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "A", "a/b", "a" * 64, "-a", "a\n", ".building-x"])
def test_a_name_that_is_a_path_is_refused(registry, name: str) -> None:
    for action in (lambda: registry.add(name, make_tree), lambda: registry.get(name)):
        with pytest.raises(UsageError):
            action()
    with pytest.raises(SysctrError):
        registry.remove(name, lambda: ())


def test_an_unknown_template_names_the_nearest(registry) -> None:
    with pytest.raises(NotFound) as caught:
        registry.get("one")
    assert "template build" in caught.value.hint
    registry.add("debian-12", make_tree)
    with pytest.raises(NotFound) as caught:
        registry.get("debian12")
    assert "debian-12" in caught.value.hint


def test_a_template_in_use_stays(registry) -> None:
    registry.add("one", make_tree)
    with pytest.raises(WrongState, match="used by 100, 101"):
        registry.remove("one", lambda: ("100", "101"))
    answers = iter([(), ("102",)])
    with pytest.raises(WrongState, match="used by 102"):
        registry.remove("one", lambda: next(answers))
    assert left(registry) == {"one"}
    assert registry.get("one")


def test_a_removed_template_is_gone_and_can_be_made_again(registry) -> None:
    registry.add("one", make_tree)
    registry.remove("one", lambda: ())
    assert left(registry) == set()
    registry.trash.empty()
    assert os.listdir(registry.trash.directory) == []
    assert registry.add("one", make_tree)


def test_what_a_crash_left_is_swept(registry) -> None:
    registry.add("one", make_tree)
    os.makedirs(f"{registry.directory}/.building-two-1234/rootfs/etc")
    registry.sweep()
    assert left(registry) == {"one"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "\0", '{"schema": "1", "name": 3}'])
def test_a_damaged_record_hides_one_template_only_and_can_be_removed(registry, text: str) -> None:
    registry.add("good", make_tree)
    registry.add("bad", make_tree)
    with open(f"{registry.directory}/bad/template.json", "w") as file:
        file.write(text)
    assert [template.name for template in registry.list()] == ["good"]
    with pytest.raises(SysctrError, match="damaged"):
        registry.get("bad")
    registry.remove("bad", lambda: ())
    assert left(registry) == {"good"}


def test_a_record_of_a_newer_sysctr_is_refused(registry) -> None:
    registry.add("one", make_tree)
    path = f"{registry.directory}/one/template.json"
    with open(path) as file:
        record = json.load(file)
    with open(path, "w") as file:
        json.dump({**record, "schema": 2}, file)
    with pytest.raises(SysctrError, match="newer sysctr"):
        registry.get("one")
