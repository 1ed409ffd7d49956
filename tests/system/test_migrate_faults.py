"""Kills, cuts and full disks at every step of a migration: one host has the container, whole, and only one.

A daemon stops at a point (SYSCTR_FAULT_WAIT), something breaks at that very moment, and then both hosts are
left alone until they can talk again. The table at the end says who had the container, and how long it took.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.disk import fill
from tests.node import Node, TemplateStore, kill
from tests.system import peers
from tests.system.guests import shell
from tests.system.peers import Hosts, Stop, Watch
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]

# In the order in which they are come to; `True` for those at which the container is the target's.
SOURCE = {
    "migrate.begun": False, "migrate.pass.done": False, "migrate.stopping": False, "migrate.stopped": False,
    "migrate.final.done": False, "migrate.prepared": False, "migrate.away": True, "migrate.delivered": True,
    "migrate.destroyed": True,
}  # fmt: skip
TARGET = {
    "migrate.in.reserved": False, "migrate.in.volume": False, "migrate.in.synced": False,
    "migrate.in.kept": False, "migrate.in.prepared": False, "migrate.in.committed": True,
    "migrate.in.created": True, "migrate.in.started": True,
}  # fmt: skip
POINTS = {**SOURCE, **TARGET}
# Those that one that does not run comes to, and a copy.
STOPPED = ("migrate.begun", "migrate.prepared", "migrate.away", "migrate.in.synced", "migrate.in.created")
COPY = ("migrate.begun", "migrate.prepared", "migrate.delivered", "migrate.in.synced", "migrate.in.prepared",
        "migrate.in.committed", "migrate.in.created")  # fmt: skip

_DEADLINE_S = 30
# How long a source waits for a target that it cannot reach: longer than a daemon takes to start, and no
# longer than a test has patience where the cable is out.
_PATIENT_S, _IMPATIENT_S = 30.0, 0.5
# How long it may take to find out that nothing comes any more, and nothing arrives.
_SILENCE_S = 60.0
_NAME = "subject"
# With what a target leaves free for others.
_DISK_BYTES = 160 << 20
# An init that ends at once when it is told to; busybox takes a second to say goodbye.
_INIT = """#!/bin/sh
trap 'exit 0' TERM
while :; do sleep 1000 & wait $!; done
"""


class Subject:
    """A container that goes to and fro between two hosts; each test says what it has to have."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.left, self.right = hosts.nodes.values()
        self.uuid = ""
        self.macs: list[str] = []

    @property
    def both(self) -> tuple[Node, Node]:
        return self.left, self.right

    # Before

    def ready(self, *, running: bool, mark: str, at: Node | None = None) -> Node:
        """Have the container on one host, running or not, with a mark of its own; returns that host."""
        self.start_daemons()
        where = self.places()
        if len(where) != 1 or (at is not None and where != [at]):
            where = [self._create(at or self.left)]
        (source,) = where
        if (source.state(_NAME) == "running") != running:
            source.run("start" if running else "stop", _NAME)
        self.write(source, "/root/mark", mark)
        return source

    def _create(self, node: Node) -> Node:
        """Begin anew: what a test left that failed is no other test's business."""
        for one in self.both:
            for entry in peers.migrations(one):
                one.run("migrate", "--resolve", entry["id"], "--there", "--yes", check=False)
            one.run("destroy", "--all", "--force", "--yes", check=False)
        node.run("create", _NAME, "--template", "tiny")
        self.write(node, "/root/init", _INIT, mode=0o755)
        node.run("set", _NAME, "init=/root/init", "stop_signal=SIGTERM")
        data = os.urandom(1 << 20).hex()
        self.write(node, "/root/data", f"old {data}")
        node.run("snapshot", _NAME, "kept")
        self.write(node, "/root/data", f"new {data}")
        self.data = f"new {data}"
        node.run("start", _NAME)
        info = node.json("info", _NAME)
        self.uuid, self.macs = info["uuid"], [nic["mac"] for nic in info["nets"]]
        return node

    def start_daemons(self) -> None:
        """Start those that do not run, both at once."""
        missing = [node for node in self.both if "daemon" not in node.pids()]
        for process in [node.popen("daemon", "start") for node in missing]:
            assert process.wait(60) == 0

    @staticmethod
    def write(node: Node, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the container, running or stopped."""
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            os.chmod(file.name, mode)
            node.run("push", file.name, f"{_NAME}:{path}")

    @staticmethod
    def read(node: Node, path: str, ref: str = _NAME) -> str:
        """Read a file of the container, running or stopped."""
        with tempfile.TemporaryDirectory() as directory:
            node.run("pull", f"{ref}:{path}", f"{directory}/file")
            return Path(directory, "file").read_text()

    # After

    def places(self) -> list[Node]:
        """Return the hosts that have the container and have not given it away."""
        found = [(node, peers.containers(node).get(_NAME)) for node in self.both]
        return [node for node, one in found if one is not None and not one.get("away")]

    def is_settled(self) -> bool:
        """Tell whether nothing is on its way any more on either host, nor left of it."""
        for node in self.both:
            status, answer = node.api("GET", "/1/tasks")
            assert status == 200, answer
            busy = [one for one in answer["tasks"] if one["state"] in ("running", "queued")]  # type: ignore[index]
            if busy or peers.migrations(node) or not peers.is_tidy(node):
                return False
        return True

    def settle(self) -> Node:
        """Wait until one host has the container, and nothing else is left of the migration."""
        with contextlib.suppress(AssertionError):
            wait_until(self.is_settled, _DEADLINE_S, "the end of the migration")
        told = [(peers.migrations(node), peers.traces(node)) for node in self.both]
        assert self.is_settled(), f"{told}{self.logs()}"
        places = self.places()
        assert len(places) == 1, f"{len(places)} hosts have it{self.logs()}"
        return places[0]

    def is_whole(self, node: Node, mark: str, *, running: bool) -> None:
        """Assert that the container on a host is what it was, and runs or not."""
        if running:
            node.wait(_NAME, "running")
        else:
            assert node.state(_NAME) == "stopped"
        assert self.read(node, "/root/mark") == mark
        assert self.read(node, "/root/data") == self.data
        info = node.json("info", _NAME)
        assert (info["uuid"], [nic["mac"] for nic in info["nets"]]) == (self.uuid, self.macs)
        assert node.run("snapshots", _NAME, "-q").out.split() == ["kept"]

    def logs(self) -> str:
        return "".join(f"\n==== {self.hosts.name(node)}{node.logs()}" for node in self.both)


# What breaks


def kills(*who: str):
    """Return what kills the daemons of the source, the target, or both, and then starts them again."""

    def breaks(subject: Subject, stop: Stop, source: Node, target: Node, _task: str) -> None:
        for name, node in (("source", source), ("target", target)):
            if name in who:
                kill(node.pids()["daemon"])
        stop.release()
        subject.start_daemons()

    return breaks


def cuts(subject: Subject, stop: Stop, source: Node, target: Node, task: str) -> None:
    """Pull the cable, and plug it in again when the source has given up."""
    subject.hosts.cut(source, target)
    try:
        stop.release()
        # What it waits for may time out only now.
        for _ in range(2):
            subject.hosts.reset(source)
        peers.ended(source, task)
    finally:
        subject.hosts.mend(source, target)


FAULTS = {
    "kill source": kills("source"), "kill target": kills("target"), "kill both": kills("source", "target"),
    "cut": cuts,
}  # fmt: skip


def who_has_it(point: str, fault: str) -> str:
    """Return which side must have the container when a fault at a point is over."""
    # At `prepared` the source needs nobody any more to give the container up.
    if POINTS[point] or fault == "kill target" or (point == "migrate.prepared" and fault == "cut"):
        return "target"
    return "source"


Outcomes = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    """What came out of each test, printed as a table when all have run."""
    found: Outcomes = {}
    yield found
    columns = list(dict.fromkeys(column for _, column in found))
    rows = list(dict.fromkeys(row for row, _ in found))
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if reporter is None or capture is None:
        return
    with capture.global_and_fixture_disabled():
        reporter.write_line("")
        reporter.write_line(f"{'who has it, seconds':24}" + "".join(f"{column:18}" for column in columns))
        for row in rows:
            cells = "".join(f"{found.get((row, column), '-'):18}" for column in columns)
            reporter.write_line(f"{row:24}{cells}")


@pytest.fixture(scope="module")
def subject(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[Subject]:
    with peers.acquainted(templates, "left", "right", keep=pytestconfig.getoption("keep")) as hosts:
        yield Subject(hosts)
        for node in hosts.nodes.values():
            assert peers.leftovers(node) == []


def migrate_with(
    subject: Subject, point: str, fault: str, *, running: bool = True, outcomes: Outcomes, column: str = ""
) -> None:
    mark = f"{point}, {fault}, {running}, {time.time()}"
    source = subject.ready(running=running, mark=mark)
    target = subject.hosts.other(source)
    at = source if point in SOURCE else target
    patience_s = _IMPATIENT_S if fault == "cut" else _PATIENT_S
    with Watch(*subject.both) as watch:
        with Stop(at, point) as stop:
            task = peers.begin(
                source, _NAME, subject.hosts.name(target), restart=running, patience_s=patience_s
            )
            stop.wait(source, task)
            began = time.monotonic()
            FAULTS[fault](subject, stop, source, target, task)
        winner = subject.settle()
        seconds = peers.seconds_since(began)
        subject.is_whole(winner, mark, running=running)
    side = "source" if winner is source else "target"
    outcomes[point, column or fault] = f"{side} {seconds}"
    assert watch.looks
    assert not watch.doubles, f"both hosts ran it{subject.logs()}"
    assert side == who_has_it(point, fault)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.replace(" ", "-") for fault in FAULTS])
@pytest.mark.parametrize("point", POINTS)
def test_a_migration_that_is_broken(subject: Subject, outcomes: Outcomes, point: str, fault: str) -> None:
    migrate_with(subject, point, fault, outcomes=outcomes)


@pytest.mark.parametrize("point", STOPPED)
def test_what_does_not_run_does_not_run_afterwards(subject: Subject, outcomes: Outcomes, point: str) -> None:
    migrate_with(subject, point, "kill both", running=False, outcomes=outcomes, column="both, stopped")


@pytest.mark.parametrize("point", COPY)
def test_a_copy_is_there_or_not_and_the_original_does_not_notice(
    subject: Subject, outcomes: Outcomes, point: str
) -> None:
    mark = f"copy, {point}, {time.time()}"
    source = subject.ready(running=True, mark=mark)
    target = subject.hosts.other(source)
    pid = source.json("info", _NAME)["pid"]
    at = source if point in SOURCE else target
    with Stop(at, point) as stop:
        task = peers.begin(
            source, _NAME, subject.hosts.name(target), "copy", name="copy", patience_s=_PATIENT_S
        )
        stop.wait(source, task)
        began = time.monotonic()
        kills("source", "target")(subject, stop, source, target, "")
    assert subject.settle() is source
    made = "copy" in peers.containers(target)
    outcomes[point, "both, copy"] = f"{'made' if made else 'not made'} {peers.seconds_since(began)}"
    assert source.json("info", _NAME)["pid"] == pid
    subject.is_whole(source, mark, running=True)
    if made:
        assert subject.read(target, "/root/mark", "copy") == mark
        assert target.json("info", "copy")["uuid"] != subject.uuid
        target.run("destroy", "copy", "--force", "--yes")
    assert made == (POINTS[point] or point == "migrate.delivered")


@pytest.mark.slow
@pytest.mark.parametrize("point", ["migrate.stopped", "migrate.in.synced"])
def test_a_cable_that_nobody_tells_of_keeps_no_container_from_running(
    subject: Subject, outcomes: Outcomes, point: str
) -> None:
    """Packets are lost from one moment on, and no connection ends: the source has to find out by itself."""
    mark = f"{point}, silent, {time.time()}"
    source = subject.ready(running=True, mark=mark)
    target = subject.hosts.other(source)
    with Watch(*subject.both) as watch:
        with Stop(source if point in SOURCE else target, point) as stop:
            task = peers.begin(
                source, _NAME, subject.hosts.name(target), restart=True, patience_s=_IMPATIENT_S
            )
            stop.wait(source, task)
            began = time.monotonic()
            subject.hosts.cut(source, target, silently=True)
        try:
            peers.ended(source, task, _SILENCE_S)
            seconds = peers.seconds_since(began)
            source.wait(_NAME, "running")
        finally:
            subject.hosts.mend(source, target)
        assert subject.settle() is source
        subject.is_whole(source, mark, running=True)
    outcomes[point, "silent cut"] = f"source {seconds}"
    assert not watch.doubles


def test_what_no_list_has_is_found_while_it_stands_still(subject: Subject) -> None:
    """A directory is moved after the last pass, and a file in it has another name where nothing changed."""
    mark = f"linked, {time.time()}"
    source = subject.ready(running=True, mark=mark)
    target = subject.hosts.other(source)
    shell(source, _NAME, "cd /srv && rm -rf * && mkdir old other && echo x >old/file && ln old/file other/")
    made_s = time.time()
    wait_until(lambda: time.time() > made_s + 0.2, what="a time at which it was there already")
    with Stop(source, "migrate.stopping") as stop:
        task = peers.begin(source, _NAME, subject.hosts.name(target), restart=True)
        stop.wait(source, task)
        shell(source, _NAME, "mv /srv/old /srv/new")
    report = peers.ended(source, task)["result"]
    assert report["passes"][-1]["runs"] == ["listed", "places", "all"]
    assert "comparing all of it" in source.run("task", "show", task).out
    shell(target, _NAME, "[ /srv/new/file -ef /srv/other/file ] && [ ! -e /srv/old ]")
    subject.is_whole(target, mark, running=True)


# A full disk

FULL = (
    "migrate.begun", "migrate.pass.done", "migrate.stopping", "migrate.final.done", "migrate.prepared",
    "migrate.away", "migrate.in.reserved", "migrate.in.volume", "migrate.in.synced", "migrate.in.kept",
    "migrate.in.prepared", "migrate.in.committed", "migrate.in.created",
)  # fmt: skip


def small_disk(node: Node) -> AbstractContextManager[None]:
    """Give a node a small disk for all that it keeps."""
    return peers.disk_at(node, node.layout.lib, "ext4", _DISK_BYTES)


@pytest.fixture(scope="module")
def cramped(pytestconfig: pytest.Config) -> Iterator[Subject]:
    """A subject whose right host has a small disk."""
    keep = pytestconfig.getoption("keep")
    with peers.acquainted(None, "left", "right", keep=keep, before={"right": small_disk}) as hosts:
        for node in hosts.nodes.values():
            node.run("template", "build", "tiny")
        yield Subject(hosts)


def empty(directory: str) -> None:
    """Take away what `fill` wrote."""
    for name in os.listdir(directory):
        if name.startswith("filler"):
            os.unlink(f"{directory}/{name}")


@pytest.mark.parametrize("point", FULL)
def test_a_disk_that_is_full_over_there(cramped: Subject, outcomes: Outcomes, point: str) -> None:
    """Where the container is still the source's it runs there again; else it is the target's, once it can."""
    mark = f"full, {point}, {time.time()}"
    # When the target is ready the source gives the container up without another word.
    committed = POINTS[point] or point in ("migrate.prepared", "migrate.in.prepared")
    source = cramped.ready(running=True, mark=mark, at=cramped.left)
    target = cramped.right
    directory = target.path(target.layout.lib)
    with Watch(*cramped.both) as watch:
        try:
            with Stop(source if point in SOURCE else target, point) as stop:
                task = peers.begin(
                    source, _NAME, cramped.hosts.name(target), restart=True, patience_s=_IMPATIENT_S
                )
                stop.wait(source, task)
                began = time.monotonic()
                fill(directory)
            done = peers.ended(source, task)
            if not committed:
                assert done["state"] == "failed", done
                # Before it is full, or when it is.
                assert "space" in done["error"]["message"], done
                source.wait(_NAME, "running")
        finally:
            empty(directory)
        winner = cramped.settle()
        seconds = peers.seconds_since(began)
        cramped.is_whole(winner, mark, running=True)
    side = "source" if winner is source else "target"
    outcomes[point, "full target"] = f"{side} {seconds}"
    assert not watch.doubles
    assert side == ("target" if committed else "source")
    if winner is target:
        peers.move(target, _NAME, "left", "--restart")


# In doubt


@contextlib.contextmanager
def in_doubt(subject: Subject) -> Iterator[tuple[Node, Node]]:
    """Have the source give the container up with nobody listening; gives source and target."""
    source = subject.ready(running=True, mark="in doubt")
    target = subject.hosts.other(source)
    with Stop(source, "migrate.away") as stop:
        task = peers.begin(source, _NAME, subject.hosts.name(target), restart=True, patience_s=_IMPATIENT_S)
        stop.wait(source, task)
        subject.hosts.cut(source, target)
        kill(source.pids()["daemon"])
    try:
        subject.start_daemons()
        assert [one["state"] for one in peers.migrations(target)] == ["in-doubt"]
        yield source, target
    finally:
        subject.hosts.mend(source, target)


def resolve(node: Node, *options: str, check: bool = True) -> Any:
    return node.run("migrate", "--resolve", _NAME, *options, "--yes", check=check)


def test_in_doubt_it_runs_nowhere_until_the_hosts_have_talked(subject: Subject) -> None:
    with Watch(*subject.both) as watch:
        with in_doubt(subject) as (source, target):
            for node, words in ((source, f"{subject.hosts.name(target)} has it"), (target, "cannot find")):
                refused = node.run("start", _NAME, check=False)
                assert refused.status in (3, 4), refused
                assert words in refused.err, refused
            # To ask is to no avail.
            assert resolve(source, check=False).status != 0
            assert not peers.runs_anything(source)
            assert not peers.runs_anything(target)
            for node in (source, target):
                assert _NAME in node.run("migrations").out
        assert subject.settle() is target
        subject.is_whole(target, "in doubt", running=True)
    assert not watch.doubles


@pytest.mark.parametrize("side", ["source", "target"])
def test_the_administrator_may_decide_for_the_target(subject: Subject, side: str) -> None:
    """Whoever is told first, the other one follows when they talk again."""
    with in_doubt(subject) as (source, target):
        if side == "source":
            resolve(source, "--there")
            assert source.run("start", _NAME, check=False).status == 4
        else:
            resolve(target, "--here")
            target.wait(_NAME, "running")
        assert not peers.runs_anything(source)
    assert subject.settle() is target
    subject.is_whole(target, "in doubt", running=True)


def test_the_administrator_may_decide_for_the_source(subject: Subject) -> None:
    with in_doubt(subject) as (source, target):
        resolve(source, "--here")
        source.wait(_NAME, "running")
        assert not peers.runs_anything(target)
    assert subject.settle() is source
    subject.is_whole(source, "in doubt", running=True)


def test_both_administrators_may_decide_for_the_source(subject: Subject) -> None:
    with in_doubt(subject) as (source, target):
        resolve(target, "--there")
        wait_until(lambda: not peers.migrations(target), what="the end of the copy")
        resolve(source, "--here")
        source.wait(_NAME, "running")
    assert subject.settle() is source
    subject.is_whole(source, "in doubt", running=True)


def test_what_is_not_in_doubt_cannot_be_decided(subject: Subject) -> None:
    source = subject.ready(running=True, mark="sure")
    target = subject.hosts.other(source)
    for side in ("--here", "--there"):
        refused = resolve(source, side, check=False)
        assert refused.status == 3, refused
        assert "is in no migration" in refused.err, refused
    with Stop(source, "migrate.pass.done") as stop:
        task = peers.begin(source, _NAME, subject.hosts.name(target), restart=True)
        stop.wait(source, task)
        refused = resolve(source, "--there", check=False)
        assert refused.status == 4, refused
        assert "it goes on" in refused.err, refused
        refused = resolve(target, "--here", check=False)
        assert refused.status in (4, 5), refused
    assert peers.ended(source, task)["state"] == "done"
    subject.is_whole(subject.settle(), "sure", running=True)


def test_administrators_who_do_not_agree_are_told(subject: Subject) -> None:
    """The target was told to keep it and the source to take it back: nobody else can know who is right."""
    with in_doubt(subject) as (source, target):
        resolve(target, "--here")
        target.wait(_NAME, "running")
        resolve(source, "--here")
    wait_until(
        lambda: any(one["error"] for node in subject.both for one in peers.migrations(node)), 30,
        "that somebody says that they do not agree",
    )  # fmt: skip
    # It was a mistake of theirs, and is theirs to mend: the target gives in.
    target.run("stop", _NAME)
    resolve(target, "--there")
    wait_until(lambda: not peers.migrations(source) and not peers.migrations(target), 60, "that both know")
    assert subject.places() == [source]
    target.run("destroy", _NAME, "--force", "--yes")
    subject.is_whole(source, "in doubt", running=True)
