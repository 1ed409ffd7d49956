"""Kills at every step, and lost state: what was there is there again, and nothing belongs to nobody."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node import Node, TemplateStore, kill
from tests.system.guests import inside, new_name, shell
from tests.system.pools import KINDS, Kept, host_keeping
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]

_SNAPSHOT = ("snapshot.volume.taken", "snapshot.taken")
_RUNNING = ("snapshot.journal.written", "snapshot.frozen", *_SNAPSHOT)
_ROLLBACK = (
    "rollback.journal.written", "rollback.volume.restored", "rollback.config.written",
    "rollback.record.written", "rollback.network.done",
)  # fmt: skip
_CLONE = ("clone.volume.copied", "clone.enrolled", "clone.renewed", "clone.created")
_COPY = ("clone.volume.copying", *_CLONE)
_TEMPLATE = ("template.copied", "template.cleaned")


@pytest.fixture(scope="module", params=KINDS)
def kept(
    request: pytest.FixtureRequest, templates: TemplateStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kept]:
    """A host for the tests of this module, once for each storage driver."""
    directory = tmp_path_factory.mktemp(request.param)
    keep = request.config.getoption("keep")
    with host_keeping(request.param, templates, directory, keep=keep) as one:
        yield one


@pytest.fixture
def subject(kept: Kept) -> Iterator[str]:
    """A stopped container whose file says "new", with a snapshot `old` that says "old"."""
    kept.host.run("daemon", "start")
    ref = kept.create()
    kept.write(ref, "/root/file", "old")
    kept.host.run("snapshot", ref, "old")
    kept.write(ref, "/root/file", "new")
    yield ref
    kept.host.run("destroy", "--all", "--yes", "--force")


def die_at(host: Node, point: str, *arguments: str) -> None:
    """Run a command in which the daemon dies at a named place, and start the next daemon."""
    host.run("daemon", "stop")
    host.run("daemon", "start", env={"SYSCTR_FAULT": point})
    daemon = host.pids()["daemon"]
    done = host.run(*arguments, check=False)
    assert done.status != 0, f"{point} was not reached: {done}"
    wait_until(lambda: host.pids().get("daemon") != daemon, 20, f"death at {point}")
    host.run("daemon", "start")


def is_whole(kept: Kept, ref: str) -> None:
    """Assert that nothing is left over, and that the container can still do everything."""
    assert kept.leftovers() == []
    known = {str(one["id"]) for one in kept.host.json("list")}
    own = {name.split("-")[0] for name in kept.volumes() if name[0].isdigit()}
    assert own <= known
    assert not [name for name in kept.volumes() if name.startswith(".")]
    assert not list(Path(kept.host.layout.containers).glob("*/journal.json*"))
    if kept.host.state(ref) == "stopped":
        kept.host.run("start", ref)
    assert inside(kept.host, ref, "echo on") == "on"
    kept.host.run("snapshot", ref, "afterwards")
    kept.host.run("rollback", ref, "old", "--yes")
    assert inside(kept.host, ref, "cat /root/file") == "old"
    kept.host.run("delsnapshot", ref, "--all")
    assert kept.names(ref) == []


@pytest.mark.parametrize("point", _SNAPSHOT)
def test_a_daemon_killed_in_a_snapshot(kept: Kept, subject: str, point: str) -> None:
    die_at(kept.host, point, "snapshot", subject, "second")
    assert kept.read(subject, "/root/file") == "new"
    # It is one whole, or none of it: the driver says when it is.
    assert kept.names(subject) in (["old"], ["old", "second"])
    is_whole(kept, subject)


@pytest.mark.parametrize("point", _RUNNING)
def test_a_daemon_killed_in_a_snapshot_of_a_running_container(kept: Kept, subject: str, point: str) -> None:
    kept.host.run("start", subject)
    die_at(kept.host, point, "snapshot", subject, "second")
    assert kept.host.state(subject) == "running"
    # Not frozen: it answers.
    assert inside(kept.host, subject, "cat /root/file") == "new"
    assert kept.names(subject) in (["old"], ["old", "second"])
    is_whole(kept, subject)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    ("point", "arguments"),
    [
        ("snapshot.journal.written", ("snapshot", "second")),
        ("snapshot.volume.taken", ("snapshot", "second")),
        ("snapshot.volume.taken:2", ("snapshot", "second")),
        ("snapshot.taken", ("snapshot", "second")),
        ("snapshot.volume.deleted", ("delsnapshot", "both")),
        ("rollback.volume.restored", ("rollback", "both", "--yes")),
        ("rollback.volume.restored:2", ("rollback", "both", "--yes")),
    ],
)
def test_a_daemon_killed_between_two_volumes(
    kept: Kept, subject: str, point: str, arguments: tuple[str, ...], running: bool
) -> None:
    host = kept.host
    host.run("set", subject, kept.mount(0, "/data"))
    host.run("start", subject)
    shell(host, subject, "echo old > /root/file; echo old > /data/file")
    host.run("snapshot", subject, "both")
    shell(host, subject, "echo new > /root/file; echo new > /data/file")
    if not running:
        host.run("stop", subject, "--kill")
    die_at(host, point, arguments[0], subject, *arguments[1:])
    assert kept.leftovers() == []
    if running:
        host.wait(subject, "running")
    else:
        host.run("start", subject)
    # Both are of one time, whatever the time is.
    found = inside(host, subject, "cat /root/file /data/file").split()
    assert found == (["old", "old"] if arguments[0] == "rollback" else ["new", "new"])
    if "both" in kept.names(subject):
        host.run("rollback", subject, "both", "--yes")
        assert inside(host, subject, "cat /root/file /data/file").split() == ["old", "old"]
    is_whole(kept, subject)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("point", _ROLLBACK)
def test_a_daemon_killed_in_a_rollback(kept: Kept, subject: str, point: str, running: bool) -> None:
    kept.host.run("set", subject, "description=new")
    if running:
        kept.host.run("start", subject)
    before = kept.host.json("info", subject)
    die_at(kept.host, point, "rollback", subject, "old", "--yes")
    if running:
        kept.host.wait(subject, "running")
        assert inside(kept.host, subject, "cat /root/file") == "old"
    else:
        assert kept.host.state(subject) == "stopped"
        assert kept.read(subject, "/root/file") == "old"
    after = kept.host.json("info", subject)
    assert after["description"] == ""
    assert after["generation"] == before["generation"] + 1
    assert after["uuid"] == before["uuid"]
    is_whole(kept, subject)


@pytest.mark.parametrize(
    ("point", "arguments"),
    [
        ("restart.journal.written", ("reboot",)), ("restart.stopped", ("reboot",)),
        ("restart.journal.written", ("rollback", "old", "--yes")),
        ("rollback.stopped", ("rollback", "old", "--yes")),
    ],
)  # fmt: skip
def test_what_was_stopped_to_be_started_again_runs_after_a_kill(
    kept: Kept, subject: str, point: str, arguments: tuple[str, ...]
) -> None:
    kept.host.run("start", subject)
    die_at(kept.host, point, arguments[0], subject, *arguments[1:])
    kept.host.wait(subject, "running")
    assert inside(kept.host, subject, "cat /root/file") == "new"
    if point == "restart.journal.written":
        # Nobody knows whether init was asked to end: when it does, it is started again, this once.
        pid = kept.host.json("info", subject)["pid"]
        shell(kept.host, subject, "poweroff -f", check=False)
        wait_until(lambda: kept.host.json("info", subject)["pid"] not in (None, pid), 20, "the start")
    is_whole(kept, subject)


@pytest.mark.parametrize(
    ("point", "options"),
    [*((point, ()) for point in _CLONE), *((point, ("--pool", "default")) for point in _COPY)],
)
def test_a_daemon_killed_in_a_clone(kept: Kept, subject: str, point: str, options: tuple[str, ...]) -> None:
    if kept.pool == "default" and options:
        options = ("--full",)
    if kept.kind == "loop" and options:
        options = (*options, "--set", "limits.disk=")
    name = new_name("clone")
    die_at(kept.host, point, "clone", subject, name, *options)
    made = [one["name"] for one in kept.host.json("list") if one["name"] == name]
    assert made == ([name] if point == "clone.created" else [])
    if made:
        assert kept.read(name, "/root/file") == "new"
    assert kept.read(subject, "/root/file") == "new"
    assert kept.names(subject) == ["old"]
    is_whole(kept, subject)


def test_a_daemon_killed_in_a_clone_of_a_running_container(kept: Kept, subject: str) -> None:
    kept.host.run("start", subject)
    for point in ("snapshot.temporary", "clone.volume.copied"):
        die_at(kept.host, point, "clone", subject, new_name("clone"))
        assert kept.names(subject) == ["old"]
        assert len(kept.host.json("list")) == 1
    is_whole(kept, subject)


@pytest.mark.parametrize("point", _TEMPLATE)
def test_a_daemon_killed_in_the_making_of_a_template(kept: Kept, subject: str, point: str) -> None:
    before = kept.host.run("template", "list", "-q").out
    die_at(kept.host, point, "template", "create", subject, new_name("made"))
    assert kept.host.run("template", "list", "-q").out == before
    assert not list(Path(f"{kept.host.layout.pool}/layers").glob(".building*"))
    is_whole(kept, subject)


def test_what_the_state_directories_lose_the_volumes_remember(kept: Kept, subject: str) -> None:
    host = kept.host
    second = kept.create("--memory", "100M")
    host.run("rename", second, "renamed")
    host.run("set", "renamed", "description=mine", "tags=a,b")
    wanted = {ref: host.json("info", ref) for ref in (subject, "renamed")}
    # As an editor or a restored backup of /etc left it: what exists is nobody's to overwrite.
    third = kept.create()
    number = host.json("info", third)["id"]
    host.run("daemon", "stop")
    for one in wanted.values():
        shutil.rmtree(host.layout.container_dir(one["id"]))
        Path(host.layout.container_config(one["id"])).unlink()
    shutil.rmtree(host.layout.container_dir(number))
    edited = Path(host.layout.container_config(number))
    edited.write_text(edited.read_text() + "# edited\n")
    host.run("daemon", "start")
    assert [one["name"] for one in host.json("list")] == [third]
    dry = host.json("recover", "--dry-run")
    assert {one["name"] for one in dry["recovered"]} == {subject, "renamed", third}
    assert len(host.json("list")) == 1
    host.run("recover")
    for ref, one in wanted.items():
        again = host.json("info", ref)
        keys = ("id", "uuid", "name", "idmap", "template", "pool", "description", "tags", "limits", "created")
        assert {key: again[key] for key in keys} == {key: one[key] for key in keys}
        assert [nic["mac"] for nic in again["nets"]] == [nic["mac"] for nic in one["nets"]]
        host.run("start", ref)
        shell(host, ref, "echo on")
    assert edited.read_text().endswith("# edited\n")
    assert host.json("info", third)["error"] == ""
    assert kept.names(subject) == ["old"]
    assert host.json("recover")["recovered"] == []
    host.run("stop", "--all", "--kill")
    is_whole(kept, subject)


def test_a_container_whose_records_are_lost_while_it_runs_goes_on(kept: Kept, subject: str) -> None:
    host = kept.host
    host.run("start", subject)
    before = host.json("info", subject)
    host.run("daemon", "stop")
    shutil.rmtree(host.layout.container_dir(before["id"]))
    Path(host.layout.container_config(before["id"])).unlink()
    host.run("daemon", "start")
    assert host.json("list") == []
    host.run("recover")
    after = host.json("info", subject)
    assert {key: after[key] for key in ("state", "pid", "addresses", "idmap")} == {
        key: before[key] for key in ("state", "pid", "addresses", "idmap")
    }
    assert inside(host, subject, "ip -o address show eth0; cat /root/file").endswith("new")
    is_whole(kept, subject)


def test_a_volume_without_a_container_is_found_and_told(kept: Kept, subject: str) -> None:
    host = kept.host
    number = host.json("info", subject)["id"]
    kill(host.pids()["daemon"])
    shutil.move(host.layout.container_dir(number), f"{host.root}/aside")
    shutil.move(host.layout.container_config(number), f"{host.root}/aside.toml")
    host.run("daemon", "start")
    assert kept.leftovers() == [f"volume {number} in pool {kept.pool} belongs to no container"]
    host.run("recover")
    assert kept.leftovers() == []
    shutil.rmtree(f"{host.root}/aside")
