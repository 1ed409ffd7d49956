"""What is known of the hosts: pure data, brought up to date with the daemon's answers and events.

Nothing here talks to anybody or draws anything. Each host keeps the last it has heard, and when that was:
what is shown of a host that does not answer is old, and says so.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sysctr.cli.container import shown_state
from sysctr.cli.progress import ENDED

# Two minutes and more of samples: as many as the widest graph shows.
HISTORY = 150
# Ended tasks that are kept beyond those that the daemon still tells of.
MOST_TASKS = 400

Item = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What a container used over the time between two looks; None where that is not known.

    `cpu` is in cores, the rates are in bytes per second.
    """

    cpu: float | None = None
    memory_bytes: int | None = None
    received: float | None = None
    sent: float | None = None
    read: float | None = None
    written: float | None = None
    pids: int | None = None


@dataclass
class Container:
    """A container of one host: what the list says of it, and what was computed from that."""

    host: str
    data: Item
    cpu: float | None = None
    # Raised with each change of what is shown, so that a drawn line can be kept until then.
    version: int = 0

    @property
    def key(self) -> str:
        """Return what it is known by in all lists: the host and the number."""
        return f"{self.host}/{self.data['id']}"

    @property
    def id(self) -> int:
        """Return its number."""
        return int(self.data["id"])

    @property
    def name(self) -> str:
        """Return its name, or its number where it has none that can be read."""
        return str(self.data.get("name") or self.data["id"])

    @property
    def state(self) -> str:
        """Return its state as people see it: booting until its init said that it is up."""
        return shown_state(self.data)

    @property
    def busy(self) -> str:
        """Return what a task is doing with it now, empty for nothing."""
        task = self.data.get("task")
        return str(task["kind"]) if task else ""


@dataclass
class HostView:
    """One host, as it was when it was last heard of."""

    name: str
    # What this machine calls it as a peer; empty for this machine itself.
    peer: str = ""
    # connecting, up, down; refused for a peer that may not be managed from here
    link: str = "connecting"
    reason: str = ""
    # When it will be tried again, and when it was last heard of: on the clock that the caller counts by.
    retry_at_s: float = 0.0
    heard_s: float = 0.0
    read_only: bool = False
    facts: Item = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    containers: dict[int, Container] = field(default_factory=dict)
    tasks: dict[str, Item] = field(default_factory=dict)
    lists: dict[str, list[Item]] = field(default_factory=dict)
    # Why one of the lists could not be had.
    problems: dict[str, str] = field(default_factory=dict)
    history: dict[int, "deque[Sample]"] = field(default_factory=dict)
    _measured: dict[int, tuple[float, float]] = field(default_factory=dict)
    _asked: int = 0
    _answered: int = 0

    @property
    def up(self) -> bool:
        """Tell whether what is known of it is how it is."""
        return self.link == "up"

    def ask(self) -> int:
        """Return the number of a question; an answer that a later one has overtaken is dropped."""
        self._asked += 1
        return self._asked

    def set_containers(self, number: int, answer: Mapping[str, Any], now_s: float) -> bool:
        """Take the answer to a question for the list of containers; False where it came too late."""
        if number < self._answered:
            return False
        self._answered, self.heard_s = number, now_s
        self.notices = tuple(answer.get("notices", ()))
        listed = {int(one["id"]): one for one in answer["containers"]}
        for gone in self.containers.keys() - listed.keys():
            del self.containers[gone]
            self.history.pop(gone, None)
            self._measured.pop(gone, None)
        for one, data in listed.items():
            self._set_container(one, data, now_s)
        return True

    def _set_container(self, number: int, data: Item, now_s: float) -> None:
        cpu = self._cpu(number, data.get("cpu_s"), now_s)
        known = self.containers.get(number)
        if known is None:
            self.containers[number] = Container(self.name, data, cpu)
        elif known.data != data or known.cpu != cpu:
            known.data, known.cpu = data, cpu
            known.version += 1

    def _cpu(self, number: int, cpu_s: float | None, now_s: float) -> float | None:
        """Return how many cores it used since the last look."""
        before = self._measured.get(number)
        if cpu_s is None:
            self._measured.pop(number, None)
            return None
        known = self.containers.get(number)
        last = known.cpu if known is not None else None
        if before is not None and now_s - before[0] < 0.5:
            # Asked again because of an event: too short a time to divide by.
            return last
        self._measured[number] = (now_s, cpu_s)
        if before is None or cpu_s < before[1]:
            return None
        return (cpu_s - before[1]) / (now_s - before[0])

    def add_usage(self, number: int, usage: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        """Add a sample to the history of a container, from what it used until now and until before."""
        samples = self.history.setdefault(number, deque(maxlen=HISTORY))
        samples.append(sample(usage, before))

    def set_tasks(self, tasks: Iterable[Item]) -> None:
        """Take the list of tasks; those that the daemon has forgotten stay as they ended."""
        for task in tasks:
            self.set_task(task)

    def set_task(self, task: Item) -> None:
        """Take the present state of one task; one that has ended does not come back to life."""
        known = self.tasks.get(task["id"])
        if known is not None and known["state"] in ENDED and task["state"] not in ENDED:
            return
        self.tasks[task["id"]] = task
        if len(self.tasks) > MOST_TASKS:
            ended = [one for one in self.tasks.values() if one["state"] in ENDED]
            for one in sorted(ended, key=lambda task: task["created"])[: len(self.tasks) - MOST_TASKS]:
                del self.tasks[one["id"]]

    def forget_running(self) -> None:
        """Let go of tasks that a daemon which is gone was doing: the next one tells what became of them."""
        for task in [one for one in self.tasks.values() if one["state"] not in ENDED]:
            del self.tasks[task["id"]]


def sample(usage: Mapping[str, Any], before: Mapping[str, Any] | None) -> Sample:
    """Return what was used between two answers about usage; rates need both.

    >>> sample({"time": 12.0, "cpu_s": 3.0, "pids": 4}, {"time": 10.0, "cpu_s": 2.0}).cpu
    0.5
    """

    def rate(name: str) -> float | None:
        if before is None or usage.get(name) is None or before.get(name) is None:
            return None
        seconds = usage["time"] - before["time"]
        grown = usage[name] - before[name]
        # A container that was started again counts from nothing.
        return grown / seconds if seconds > 0 and grown >= 0 else None

    return Sample(
        cpu=rate("cpu_s"), memory_bytes=usage.get("memory_bytes"), received=rate("net_received_bytes"),
        sent=rate("net_sent_bytes"), read=rate("io_read_bytes"), written=rate("io_write_bytes"),
        pids=usage.get("pids"),
    )  # fmt: skip


class Store:
    """All hosts, and the one order in which they are shown."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostView] = {}

    def host(self, name: str) -> HostView:
        """Return a host, known or new."""
        return self.hosts.setdefault(name, HostView(name))

    def shown_hosts(self, scope: str = "") -> list[HostView]:
        """Return all hosts, or the one that alone is looked at."""
        return [host for host in self.hosts.values() if not scope or host.name == scope]

    def reached(self) -> list[HostView]:
        """Return the hosts of this window, without those that may not be managed from here."""
        return [host for host in self.hosts.values() if host.link != "refused"]

    def containers(self, scope: str = "") -> list[Container]:
        """Return the containers of all hosts, or of one."""
        return [one for host in self.shown_hosts(scope) for one in host.containers.values()]

    def container(self, key: str) -> Container | None:
        """Return a container by its key, None where it is gone."""
        name, _, number = key.rpartition("/")
        host = self.hosts.get(name)
        return host.containers.get(int(number)) if host is not None and number.isdigit() else None

    def tasks(self, scope: str = "") -> list[tuple[str, Item]]:
        """Return the tasks with the names of their hosts: those that go on first, and the newest first."""
        found = [(host.name, task) for host in self.shown_hosts(scope) for task in host.tasks.values()]
        return sorted(found, key=lambda one: (one[1]["state"] in ENDED, -float(one[1]["created"])))
