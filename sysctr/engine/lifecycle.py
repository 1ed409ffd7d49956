"""Start, stop and what lies between: each action is all done or undone, bounded in time, and never hangs."""

import contextlib
import logging
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from sysctr.cgroup.base import Limits
from sysctr.engine import guest
from sysctr.engine.disks import fit_before_start
from sysctr.engine.host import REBOOT_PATIENCE_S, Host
from sysctr.engine.journal import Journal
from sysctr.engine.live import UNKNOWN_STATUS, Live, exit_reason
from sysctr.engine.plan import ContainerFacts, Idmap, container_plan
from sysctr.engine.record import Record
from sysctr.engine.tasks import Task
from sysctr.errors import Busy, NoDaemon, NotFound, Refused, SysctrError, WrongState
from sysctr.linux import fault

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
# After a kill the kernel has only to end the processes; one that hangs in a dead file system may take longer.
_KILL_TIMEOUT_S = 30.0
_SETTLE_TIMEOUT_S = 30.0
_SIGNAL_AGAIN_S = 0.05

# An init that reboots as soon as it runs would keep the daemon busy with nothing else.
_REBOOTS = 5
_REBOOTS_WINDOW_S = 10.0

SYSTEMD_HALT = signal.SIGRTMIN + 3

# For how long a start watches an init that shows no sign of having taken up its work. Every usual one shows
# it within milliseconds; what dies at once may need this long for that on a busy host.
_FIRST_LOOK_S = 0.25
# What an init listens to: HUP, USR1, USR2, TERM, PWR and systemd's RTMIN+3, and PIPE, which it ignores. A
# shell that only runs a script catches CHLD and INT.
_SIGNS = sum(1 << (number - 1) for number in (1, 10, 12, 13, 15, 30, SYSTEMD_HALT))
_END_WORDS = {
    "exited": "exited with status {}", "killed": "was killed by signal {}", "halt": "asked for a halt",
    "unknown": "ended",
}  # fmt: skip
_LAST_LINES = 3
_LINE_LIMIT = 200


class Lifecycle:
    """The actions on one container's processes."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._journal = Journal(host.store)
        self._reboots: dict[int, list[float]] = {}
        # Those that somebody outside wants to end: a reboot that is asked for inside is void then.
        self._ending: set[int] = set()
        # The runs whose end asked for a reboot that was not begun yet.
        self._again: dict[int, Live] = {}
        # Those that a daemon which died was ending to start them again, and until when that is still meant.
        self._restarts: dict[int, float] = {}

    def start(self, task: Task, container_id: int) -> None:
        """Start a stopped container; returns when its init was executed."""
        host = self._host
        if host.live.running(container_id):
            raise WrongState(f"cannot start {container_id}: it is running")
        live = host.live.get(container_id)
        if live is not None and not host.live.wait_settled(container_id, _SETTLE_TIMEOUT_S):
            raise WrongState(f"cannot start {container_id}: its end is still being put away")
        record = host.store.load(container_id)
        record.usable("start")
        host.guard("start", record)
        fit_before_start(host, record, task)
        # Cheap where nothing is missing; it puts back what a reload of the host's own firewall took.
        host.network.ensure()
        host.network.forget_others(container_id, record.config.nets)
        with ExitStack() as undo:
            placement = host.cgroups.create(container_id, limits_of(record), record.idmap_first)
            undo.callback(self.quietly, host.cgroups.destroy, container_id)
            facts = self._facts(record)
            plan = container_plan(facts)
            plan["cgroup"] = {"into": placement.into, "tasks": list(placement.tasks)}
            starting = undo.enter_context(host.supervisor.create(container_id, plan))
            # Not before: a start is refused while a job works on the volumes. And after the child's end.
            undo.callback(self.quietly, host.release, container_id)
            undo.callback(starting.close)
            undo.callback(self.quietly, host.network.detach, container_id)
            attached = [
                host.network.attach(
                    container_id, nic, netns_fd=starting.netns.fileno(), netlink_fd=starting.netlink.fileno()
                )
                for nic in record.config.nets
            ]
            try:
                starting.start()
            except SysctrError as error:
                raise SysctrError(f"cannot start {container_id}: {error.message}", error.hint) from error
            host.live.note_started(container_id, starting.pid, starting.start_time)
            # From here on its end, if it comes to that, puts everything away.
            undo.pop_all()
            undo.callback(starting.close)
            host.network.announce(attached)
            self._note_boot(record)
            if _ended_at_once(starting.pid, starting.pidfd.fileno()):
                self._tell_early_end(container_id)
        host.bus.publish("container", id=container_id, change="started")

    def submit_start(self, number: int) -> Task:
        """Start a container in a task of its own though nobody asked for it: who gives a command waits."""
        return self._host.tasks.submit(
            "start", number, lambda task: self.start(task, number),
            subject=self._host.store.load(number).title, patience_s=REBOOT_PATIENCE_S,
        )  # fmt: skip

    def start_new(self, task: Task, record: Record) -> None:
        """Start a container that was just made; if that fails, the error says that it is kept."""
        task.step("starting")
        try:
            self.start(task, record.id)
        except SysctrError as error:
            made = f"{record.title} was created and is kept: `sysctr start {record.name}`"
            error.hint = f"{error.hint}\n{made}" if error.hint else made
            raise

    def _tell_early_end(self, container_id: int) -> None:
        """Raise with what became of an init that ended as soon as it ran, once all of it is put away."""
        host = self._host
        if not host.live.wait_settled(container_id, _SETTLE_TIMEOUT_S):
            raise SysctrError(f"cannot start {container_id}: its init ended and is still being put away")
        live = host.live.get(container_id)
        reason = exit_reason(UNKNOWN_STATUS if live is None or live.exit_status is None else live.exit_status)
        if reason["reason"] == "reboot":
            return  # that is no failure, and it is started again
        last = last_lines(host.read_console(container_id))
        raise SysctrError(
            f"cannot start {container_id}: its init {_END_WORDS[reason['reason']].format(reason['status'])} "
            + (f"as soon as it ran, and said: {last}" if last else "as soon as it ran, and said nothing"),
            f"`sysctr logs {container_id}` shows all of its console",
        )

    def _note_boot(self, record: Record) -> None:
        # Written only when it differs: a start should not wait for a disk.
        if record.boot_config != record.config_text:
            with self._noting(record.id):
                self._host.store.update(record.id, boot_config=record.config_text)

    @contextlib.contextmanager
    def _noting(self, container_id: int) -> Iterator[None]:
        """Write down what happened already: a full disk cannot undo it, so it is no failure of the action."""
        try:
            yield
        except NotFound:
            pass  # destroyed meanwhile
        except SysctrError as error:
            log.error("%d: %s", container_id, error.message)

    def _facts(self, record: Record) -> ContainerFacts:
        host = self._host
        config = record.config
        addresses = host.network.addresses(record.id)
        nameservers = config.dns.nameservers or host.network.nameservers()
        host.mounts.make_ready(record)
        return ContainerFacts(
            name=config.name,
            uuid=record.uuid,
            idmap=Idmap(record.idmap_first, record.idmap_count),
            root=host.activate(record),
            stage=host.stage,
            init=(config.init or host.guest_of(record).init or "/sbin/init",),
            environment=dict(config.environment),
            seccomp=host.seccomp,
            host_os_release=host.os_release,
            overmounts=tuple(host.lxcfs_binds()),
            guest_files=guest.guest_files(
                config.name, addresses, nameservers, config.dns.search, host.settings.network.domain
            ),
            mounts=host.mounts.activate(record),
        )

    def shutdown(self, task: Task, container_id: int, timeout_s: float | None = None) -> None:
        """Ask init to end and wait; on time-out the container runs on and WrongState is raised."""
        timeout_s = SHUTDOWN_TIMEOUT_S if timeout_s is None else timeout_s
        with self._wanted_to_end(container_id, "shut down") as live:
            self._thaw_if_frozen(live)
            if not self._ask_to_end(task, live, timeout_s):
                raise WrongState(
                    f"cannot shut down {container_id}: it did not end within {timeout_s:g} s and runs on",
                    f"`sysctr stop {container_id}` ends it, `sysctr console {container_id}` shows why it "
                    "waits",
                )

    def stop(
        self, task: Task, container_id: int, timeout_s: float | None = None, *, kill: bool = False
    ) -> None:
        """Ask init to end, and kill everything at the time-out; with `kill` at once."""
        timeout_s = STOP_TIMEOUT_S if timeout_s is None else timeout_s
        with self._wanted_to_end(container_id, "stop") as live:
            if not kill:
                self._thaw_if_frozen(live)
                if not self._ask_to_end(task, live, timeout_s):
                    task.log(f"init did not end within {timeout_s:g} s: killing it")
                    kill = True
            if kill:
                self._kill(live)

    def reboot(self, task: Task, container_id: int, timeout_s: float | None = None) -> None:
        """Stop the container cleanly (killing it at the time-out) and start it again."""
        timeout_s = SHUTDOWN_TIMEOUT_S if timeout_s is None else timeout_s
        try:
            with self._noting(container_id):
                self.note_restart(container_id, timeout_s)
            task.step("stopping")
            self.stop(task, container_id, timeout_s)
            fault.point("restart.stopped")
            task.step("starting")
            self.start(task, container_id)
        finally:
            # What the end of the daemon cuts short, the next one goes on with.
            if not self._host.tasks.closing:
                self._journal.clear(container_id)

    def note_restart(self, container_id: int, timeout_s: float) -> None:
        """Write down that a container is about to be ended, and started again, in case this daemon dies."""
        until = time.time() + timeout_s + _KILL_TIMEOUT_S + _SETTLE_TIMEOUT_S
        self._journal.write(container_id, "restart", until=until)

    def finish_restart(self, container_id: int, until: float) -> bool:
        """Go on with a restart that a crash cut short; True if the container has to be started now."""
        running = self._host.live.running(container_id) is not None
        if running and time.time() < until:
            # Its init may have been asked to end already.
            self._restarts[container_id] = until
        else:
            self._journal.clear(container_id)
        return not running

    def freeze(self, container_id: int) -> None:
        """Stop every process of the container where it stands."""
        live = self._running(container_id, "freeze")
        if live.frozen:
            raise WrongState(f"cannot freeze {container_id}: it is frozen")
        self._host.cgroups.freeze(container_id)
        self._host.live.note_frozen(container_id, frozen=True)
        self._host.bus.publish("container", id=container_id, change="frozen")

    def thaw(self, container_id: int) -> None:
        """Let a frozen container go on."""
        live = self._running(container_id, "thaw")
        if not live.frozen:
            raise WrongState(f"cannot thaw {container_id}: it is not frozen")
        self._thaw_if_frozen(live)

    def on_exit(self, live: Live) -> None:
        """Put away what a container's end leaves, and start it again if it asked to be rebooted."""
        host = self._host
        reason = exit_reason(live.exit_status if live.exit_status is not None else UNKNOWN_STATUS)
        log.info("%d: init ended: %s %s", live.id, reason["reason"], reason["status"] or "")
        self.quietly(host.cgroups.destroy, live.id)
        self.quietly(host.network.detach, live.id)
        self.quietly(host.release, live.id)
        with self._noting(live.id):
            host.store.update(live.id, exit={**reason, "ended": int(time.time())})
        host.bus.publish("container", id=live.id, change="stopped", **reason)
        asked = reason["reason"] == "reboot"
        if live.id in self._restarts:
            asked = asked or time.time() < self._restarts[live.id]
            del self._restarts[live.id]
            self._journal.clear(live.id)
        again = asked and live.id not in self._ending
        if again and self._reboots_too_fast(live.id):
            log.error("%d: it rebooted %d times in %g s: left stopped", live.id, _REBOOTS, _REBOOTS_WINDOW_S)
            again = False
        if again:
            self._submit_reboot(live)
        else:
            self._forget_end(live.id)

    def _submit_reboot(self, live: Live) -> None:
        """Start it again in a task of its own: this thread must return before it counts as put away."""
        self._again[live.id] = live
        try:
            # What holds it now may itself wait for this end: the start of an init that reboots at once.
            self._host.tasks.submit(
                "reboot", live.id, lambda task: self._start_again(task, live.id),
                patience_s=REBOOT_PATIENCE_S, waits=False,
            )  # fmt: skip
            self._not_again(live)
        except NoDaemon:
            pass  # its end is not forgotten: the next daemon carries the reboot out
        except Busy:
            # What works on it ends first. It was not asked to end the container, so the reboot still holds.
            threading.Thread(
                target=self._reboot_when_free, args=(live,), name=f"reboot-{live.id}", daemon=True
            ).start()

    def _reboot_when_free(self, live: Live) -> None:
        self._host.tasks.wait_free(live.id)
        if self._again.get(live.id) is not live:
            return  # stopped meanwhile
        known = self._host.live.get(live.id)
        # Somebody else may have started or destroyed it meanwhile.
        if known is not None and known.is_run(live.pid, live.start_time):
            self._submit_reboot(live)
        else:
            self._not_again(live)

    def _not_again(self, live: Live) -> None:
        if self._again.get(live.id) is live:
            del self._again[live.id]

    def reboots(self, container_id: int) -> bool:
        """Tell whether a reboot that was asked for inside waits for the task that holds the container."""
        return container_id in self._again

    def _start_again(self, task: Task, container_id: int) -> None:
        # Its end is forgotten only afterwards: a daemon that dies before this leaves the next one the reboot.
        try:
            self.start(task, container_id)
        finally:
            self._forget_end(container_id)

    def _forget_end(self, container_id: int) -> None:
        with contextlib.suppress(SysctrError):  # it may run again
            self._host.supervisor.forget(container_id)

    def _reboots_too_fast(self, container_id: int) -> bool:
        now = time.monotonic()
        recent = [at for at in self._reboots.get(container_id, ()) if at > now - _REBOOTS_WINDOW_S]
        self._reboots[container_id] = [*recent, now]
        return len(recent) >= _REBOOTS

    def _running(self, container_id: int, verb: str) -> Live:
        live = self._host.live.running(container_id)
        if live is None:
            raise WrongState(f"cannot {verb} {container_id}: it is not running")
        return live

    def _thaw_if_frozen(self, live: Live) -> None:
        if live.frozen:
            self._host.cgroups.thaw(live.id)
            self._host.live.note_frozen(live.id, frozen=False)
            self._host.bus.publish("container", id=live.id, change="thawed")

    def _ask_to_end(self, task: Task, live: Live, timeout_s: float) -> bool:
        """Send init the signal it ends on, and wait; False at the time-out."""
        host = self._host
        try:
            pid, pidfd = host.supervisor.pidfd(live.id)
        except WrongState:
            return True  # it ended by itself just now
        wanted = self._halt_signal(live.id)
        deadline = time.monotonic() + timeout_s
        sent = False
        with pidfd:
            poll = select.poll()
            poll.register(pidfd.fileno(), select.POLLIN)
            while True:
                task.check()
                number = wanted or _signal_by_mask(pid)
                # An init that has not set its handlers yet never sees the signal: the kernel drops what the
                # first process of a pid namespace does not handle. So it is sent again until it can arrive.
                if not sent:
                    arrives = _is_handled(pid, number)
                    with contextlib.suppress(SysctrError):
                        host.supervisor.signal(live.id, number)
                    sent = arrives
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                if poll.poll(1000 * (min(left_s, 0.5) if sent else min(left_s, _SIGNAL_AGAIN_S))):
                    return True

    def _halt_signal(self, container_id: int) -> int:
        """Return the signal that the container's configuration or distribution names, 0 for none."""
        record = self._host.store.load(container_id)
        # Another init than the distribution's own expects another signal.
        own = "" if record.config and record.config.init else self._host.guest_of(record).stop_signal
        name = (record.config.stop_signal if record.config else "") or own
        return signal_number(name) if name else 0

    def _kill(self, live: Live) -> None:
        host = self._host
        # Both ways: the cgroup takes those processes that were moved out of the pid namespace's reach, too,
        # and init's end is enough where there is no cgroup left.
        self.quietly(host.cgroups.kill, live.id)
        with contextlib.suppress(SysctrError):
            host.supervisor.signal(live.id, signal.SIGKILL)
        gone = host.live.wait(live.id, lambda now: now is None or not now.running, _KILL_TIMEOUT_S)
        if not gone:
            raise SysctrError(
                f"cannot stop {live.id}: a killed process did not end within {_KILL_TIMEOUT_S:g} s",
                "a file system it uses does not answer; `sysctr info` shows its processes",
            )

    @contextlib.contextmanager
    def _wanted_to_end(self, container_id: int, verb: str) -> Iterator[Live]:
        """Give what is to be ended, and wait until its end is put away; a reboot asked for inside is void."""
        live = self._host.live.get(container_id)
        # It may have ended by itself since the command was given; that is no failure of the command.
        if live is None or (not live.running and live.settled and not self.reboots(container_id)):
            raise WrongState(f"cannot {verb} {container_id}: it is not running")
        # Only the task that holds the container comes here.
        self._ending.add(container_id)
        try:
            yield live
            if not self._host.live.wait_settled(container_id, _SETTLE_TIMEOUT_S):
                raise SysctrError(f"cannot {verb} {container_id}: its end could not be put away in time")
            # Its end may have come before it was known here that this is wanted.
            if self._again.pop(container_id, None) is not None:
                self._forget_end(container_id)
        finally:
            self._ending.discard(container_id)

    def quietly(self, function, *arguments: object) -> None:
        """Undo or clean up; what fails is logged and does not keep the rest from being done."""
        try:
            function(*arguments)
        except (SysctrError, OSError) as error:
            log.error("%s%r: %s", getattr(function, "__qualname__", function), arguments, error)
        except Exception:
            log.exception("%s%r failed", getattr(function, "__qualname__", function), arguments)


def limits_of(record: Record) -> Limits:
    """Return a container's limits as the cgroup driver takes them."""
    limits = record.config.limits
    cores = limits.cores
    if isinstance(cores, tuple):
        # "3-3": a single number would mean how many, not which.
        cores = ",".join(f"{core}-{core}" for core in cores)
    return Limits(
        cpus=limits.cpu,
        cores=None if cores is None else str(cores),
        weight=limits.cpu_weight,
        memory_bytes=limits.memory_bytes,
        swap_bytes=limits.swap_bytes,
        pids=limits.pids,
    )


def signal_number(name: str) -> int:
    """Return the number of a signal's name.

    >>> signal_number("SIGRTMIN+3"), signal_number("TERM"), signal_number("37")
    (37, 15, 37)
    """
    text = name.upper().removeprefix("SIG")
    if text.isdigit():
        return int(text)
    base, plus, offset = text.partition("+")
    try:
        return signal.Signals[f"SIG{base}"].value + (int(offset) if plus else 0)
    except (KeyError, ValueError) as error:
        raise Refused(f"cannot send the signal {name!r}: there is none of this name") from error


def _ended_at_once(pid: int, pidfd: int) -> bool:
    """Watch an init that was just executed until it ends, or listens to signals, or the time is over.

    So a start that goes well waits for its init's first few lines, and one that does not is told as such.
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    waited_s, pause_s = 0.0, 0.001
    # At ever longer intervals: thirty containers that start at once must not be busy with being looked at.
    while not poll.poll(1000 * pause_s):
        # What was wanted, not what it took: who gets no processor here gives init as much time more.
        waited_s += pause_s
        pause_s = 0.001 + waited_s / 3
        if waited_s > _FIRST_LOOK_S or any(mask & _SIGNS for mask in _signal_masks(pid)):
            return bool(poll.poll(0))
    return True


def last_lines(console: bytes) -> str:
    r"""Return the last few lines that a console showed, as one.

    >>> last_lines(b"one\r\ntwo\r\n\r\nthree\r\nfour\r\n")
    'two / three / four'
    """
    lines = [line.strip() for line in console[-4096:].decode(errors="replace").splitlines()]
    return " / ".join(line[-_LINE_LIMIT:] for line in [line for line in lines if line][-_LAST_LINES:])


def _signal_masks(pid: int) -> "tuple[int, int, int]":
    """Return the blocked, the ignored and the caught signals of a process as bit masks."""
    masks = {"SigBlk": 0, "SigIgn": 0, "SigCgt": 0}
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                name, _, value = line.partition(":")
                if name in masks:
                    masks[name] = int(value, 16)
    except OSError:
        pass
    return masks["SigBlk"], masks["SigIgn"], masks["SigCgt"]


def _signal_by_mask(pid: int) -> int:
    """Choose the halt signal by what init listens to: systemd blocks SIGRTMIN+3, as it reads a signalfd."""
    blocked, _, _ = _signal_masks(pid)
    return SYSTEMD_HALT if blocked >> (SYSTEMD_HALT - 1) & 1 else signal.SIGPWR


def _is_handled(pid: int, number: int) -> bool:
    blocked, _, caught = _signal_masks(pid)
    return bool((blocked | caught) >> (number - 1) & 1)
