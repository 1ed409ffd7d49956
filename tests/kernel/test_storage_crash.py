"""The daemon killed at every step of all that a storage driver does: nothing is lost, nothing left over."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sysctr.engine.job import JobRunner
from sysctr.linux import fault
from tests import storage
from tests.storage import MIB, Pool

pytestmark = [pytest.mark.root, pytest.mark.kernel]


@dataclass(frozen=True)
class Action:
    """A call of a driver, with $base and $worker for what no other process can be given."""

    method: str
    arguments: tuple
    needs_snapshots: bool = False
    needs_limit: bool = False
    size_bytes: int | None = None  # the limit of volume 101 afterwards, if it changes


ACTIONS = {
    "first create": Action("create", ("102", "$base", "$worker")),
    "create": Action("create", ("102", "$base", "$worker")),
    "create empty": Action("create", ("102", None, "$worker")),
    "snapshot": Action("snapshot", ("101", "two", {"text": "two"}, "$worker"), True),
    "running snapshot": Action("snapshot", ("101", "two", {"text": "two"}, "$worker"), True),
    "rollback": Action("rollback", ("101", "one"), True),
    "delete_snapshot": Action("delete_snapshot", ("101", "one"), True),
    "clone": Action("clone", ("101", "one", "102", "$worker"), True),
    "clone of a volume": Action("clone", ("101", "", "102", "$worker")),
    "grow": Action("resize", ("101", 100 * MIB, "$worker"), needs_limit=True, size_bytes=100 * MIB),
    "shrink": Action("resize", ("101", 40 * MIB, "$worker"), needs_limit=True, size_bytes=40 * MIB),
    "destroy": Action("destroy", ("102",)),
    "compact": Action("compact", ("101", "$worker")),
}


@pytest.fixture(params=storage.parameters())
def pool(request, tmp_path, jobs: JobRunner) -> Iterator[Pool]:
    """A pool of each kind."""
    with storage.pool(request.param, str(tmp_path), jobs) as made:
        yield made


def prepare(pool: Pool, of: str) -> None:
    """Make the state before an action: 101 with "one" kept and "now" written, 102 to be destroyed."""
    for volume in pool.driver.list():
        pool.driver.deactivate(volume)
        pool.driver.destroy(volume)
    pool.driver.empty_trash()
    if of == "first create" and pool.kind.driver != "overlay":
        pool.forget_template()
    if of == "first create":
        return
    pool.create("101")
    pool.write("101", "state", "one")
    if pool.driver.traits.cheap_snapshots:
        pool.snapshot("101", "one", text="one")
    pool.write("101", "state", "now")
    pool.driver.set_note("101", {"kept": True})
    if of == "destroy":
        pool.clone("101", "", "102")
    if of == "running snapshot":
        pool.driver.activate("101")


@pytest.mark.parametrize("of", ACTIONS)
def test_a_crash_at_any_step_loses_nothing_and_leaves_nothing(pool: Pool, monkeypatch, of: str) -> None:
    action = ACTIONS[of]
    if action.needs_limit and pool.kind.size_bytes is None:
        pytest.skip("this kind of pool is tried without a limit")
    if action.needs_snapshots and not pool.driver.traits.cheap_snapshots:
        pytest.skip("this kind of pool refuses snapshots")
    options = {"size_bytes": pool.kind.size_bytes} if action.method == "create" else {}
    points: list[str] = []
    prepare(pool, of)
    with monkeypatch.context() as recording:
        recording.setattr(fault, "point", points.append)
        pool.call(action.method, *action.arguments, **options)
    assert points or of == "compact", "there is no step to be killed at"
    for at, name in enumerate(points):
        point = f"{name}:{points[: at + 1].count(name)}"
        prepare(pool, of)
        assert pool.process(action.method, *action.arguments, fault=point, **options) == -9, point
        pool.restart()
        assert garbage(pool) == [], point
        if of != "first create":
            check(pool, of, point)
        do_again(pool, of, options)
        assert garbage(pool) == [], point


def check(pool: Pool, of: str, point: str) -> None:
    """See that 101 is what it was before the action, or what it is to be after it."""
    driver = pool.driver
    if of == "running snapshot":
        assert driver.active() == {"101"}, point
        with storage.shown(driver.activate("101")) as root:
            Path(root, "goes on").write_text("yes")
        driver.deactivate("101")
    assert set(driver.list()) - {"102"} == {"101"}, point
    assert driver.note("101") == {"kept": True}, point
    assert pool.read("101", "state") in ({"now", "one"} if of == "rollback" else {"now"}), point
    kept = {each.name: each.error for each in driver.snapshots("101")}
    assert not any(kept.values()), point
    before = {"one"} if driver.traits.cheap_snapshots else set()
    gone = {"one"} if of == "delete_snapshot" else set()
    assert before - gone <= kept.keys() <= before | {"two"}, point
    for name in kept:
        assert pool.read("101", "state", snapshot=name) == {"one": "one", "two": "now"}[name], point
    assert driver.size("101") in {pool.kind.size_bytes, ACTIONS[of].size_bytes or pool.kind.size_bytes}, point
    if "102" in driver.list():
        assert pool.read("102", "etc/motd") == ("" if of == "create empty" else "base"), point


def do_again(pool: Pool, of: str, options: dict) -> None:
    """Do the action once more, after taking back what it did before it was killed."""
    action = ACTIONS[of]
    if action.method in ("create", "clone"):
        pool.driver.destroy("102")
    kept = [each.name for each in pool.driver.snapshots("101")] if pool.driver.exists("101") else []
    if action.method == "snapshot" and "two" in kept:
        pool.driver.delete_snapshot("101", "two")
    if action.method == "delete_snapshot" and "one" not in kept:
        return
    pool.call(action.method, *action.arguments, **options)
    pool.driver.empty_trash()


def garbage(pool: Pool) -> list[str]:
    """Return what is in a pool or below its run directory and belongs to no volume."""
    found = os.listdir(f"{pool.directory}/.trash")
    for directory in (f"{pool.directory}/volumes", f"{pool.directory}/layers", pool.run):
        found += [f"{directory}/{name}" for name in os.listdir(directory) if name.startswith(".")]
    if pool.kind.driver == "zfs":
        found += storage.stray_datasets(pool)
    records = [path.read_text() for path in Path(pool.directory, "volumes").rglob("*.json")]
    known = " ".join(records)
    for path in Path(pool.directory, "uppers").glob("*"):
        if path.name not in known:
            found.append(str(path))
    for volume in pool.driver.list():
        directory = Path(pool.directory, "volumes", volume)
        disk = json.loads(Path(directory, "volume.json").read_text()).get("disk")
        own = {"volume.json", "snapshots", "disk.img", disk}
        found += [str(path) for path in directory.iterdir() if path.name not in own]
        names = {path.name.removesuffix(".json") for path in directory.glob("snapshots/*.json")}
        found += [str(path) for path in directory.glob("snapshots/*") if path.name.split(".")[0] not in names]
    return found + wrong_limits(pool)


def wrong_limits(pool: Pool) -> list[str]:
    """Return the quotas on a pool's file system that are not the limit of a volume."""
    if not pool.kind.quotas:
        return []
    wanted = {}
    for volume in pool.driver.list():
        record = json.loads(Path(pool.directory, "volumes", volume, "volume.json").read_text())
        if record["size_bytes"]:
            wanted[record["project"]] = record["size_bytes"]
    limits = {each.project: each.limit_bytes for each in pool.quotas() if each.limit_bytes}
    return [] if limits == wanted else [f"limits {limits} instead of {wanted}"]
