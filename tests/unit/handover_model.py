"""Two hosts that hand a container over, as a small machine whose every reachable state can be visited.

What is decided is decided by the functions of sysctr.engine.handover; here is only what the daemons do with
it: one durable write, one message, one start at a time, and anything may happen between two of these.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

from sysctr.engine import handover
from sysctr.engine.handover import Action, Source, Target

RULES = {
    name: getattr(handover, name)
    for name in (
        "may_start_source", "may_start_target", "may_commit", "is_source_step", "outcome", "recover_source",
        "source_on_answer", "recover_target", "target_on_outcome", "target_accepts", "resolve_source",
        "resolve_target",
    )
}  # fmt: skip
# What a task does in this order; `alive` is who is at one of these.
TASK = ("begin", "sync", "stop", "final", "prepare", "commit")


class Violation(Exception):
    """The model did what must never be."""


class State(NamedTuple):
    """Both hosts, and what is on its way between them."""

    # On the source's disk: journal (phase, ran, decided), record (away), container.
    sp: Source | None = None
    ran: bool = False
    sdec: str | None = None
    away: bool = False
    has: str = "full"
    kept: bool = False
    # In the source: does the container run; what its daemon is at: a step of TASK, "work" (what recovery
    # says), "forgotten" (the rest of it), "idle", "down", or "dead" for ever.
    srun: bool = False
    at: str = "begin"
    # Has the target answered `abort` with "committed"?
    claimed: bool = False
    # Should it run in the end, unless it is handed over.
    hoped: bool = False
    # On the target's disk: journal (phase, decided, start wish), copy ("", "part", "old": complete, but
    # outdated, "full"), has it been created, its record's away.
    tp: Target | None = None
    tdec: str | None = None
    wish: bool = False
    copy: str = ""
    made: bool = False
    taway: bool = False
    # In the target.
    trun: bool = False
    up: bool = True
    complete: bool = False
    confirmed: bool = False
    # The connection that the source has opened: ("sent" | "busy" | "answered", message, answer).
    call: tuple[str, str, str] | None = None
    # What was sent on earlier ones and may still come, once or more often. Nobody hears its answers.
    stale: frozenset[str] = frozenset()
    # The target's question for the outcome: "", "asked", or the answer on its way back.
    ask: str = ""


# What happens, what comes of it, and does it happen without crash, loss or person.
Step = tuple[str, State, bool]


@dataclass(frozen=True)
class Model:
    """One set of circumstances; `flaws` break the callers' duties, `rules` replace functions of handover."""

    runs: bool = True
    wish: bool = True
    keep: bool = False
    copy: bool = False
    admin: str = ""  # "honest" or "lying"
    delayed: int = 1  # so many messages of earlier connections at once
    flaws: frozenset[str] = frozenset()
    rules: dict[str, Callable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The rules in force.
        object.__setattr__(self, "r", SimpleNamespace(**{**RULES, **self.rules}))

    def first(self) -> State:
        """Return the state in which somebody asks for the migration."""
        return State(srun=self.runs, hoped=self.runs, wish=self.wish)

    def steps(self, s: State) -> Iterator[Step]:
        """Give everything that may happen next."""
        r = self.r
        yield from self._source(r, s)
        yield from self._target(r, s)
        yield from self._network(r, s)
        yield from self._trouble(s)
        if self.admin:
            yield from self._admin(r, s)

    # The source.

    def _write(self, r: SimpleNamespace, s: State, phase: Source | None, **also: object) -> State:
        if not r.is_source_step(s.sp, phase):
            raise Violation(f"the source goes from {s.sp} to {phase}")
        return s._replace(sp=phase, **also)

    def _source(self, r: SimpleNamespace, s: State) -> Iterator[Step]:
        if s.at == "dead":
            return
        if s.at == "down":
            yield "source: begins again", s._replace(at="work" if s.sp else "idle"), True
            return
        if s.ask == "asked":
            told = r.outcome(s.sp, s.away, s.at in TASK, s.sdec)
            yield f"source: its outcome is {told}", s._replace(ask=told), True
        if s.call and s.call[0] == "answered":
            yield self._answered(r, s, s.call[1], s.call[2])
        elif s.call is None:
            yield from self._task(r, s) if s.at in TASK else self._work(r, s)

    def _send(self, s: State, message: str) -> Iterator[Step]:
        if s.up:
            yield f"source: sends {message}", s._replace(call=("sent", message, "")), True

    def _task(self, r: SimpleNamespace, s: State) -> Iterator[Step]:
        if s.sp is None:
            yield "source: writes sending", self._write(r, s, Source.SENDING), True
        elif s.at == "stop":
            if self.copy:
                yield "source: a copy stops nothing", s._replace(at="final"), True
            elif s.sp == Source.SENDING:
                yield "source: writes stopped", self._write(r, s, Source.STOPPED, ran=s.srun), True
            else:
                yield "source: stops it", s._replace(srun=False, at="final"), True
        elif s.at == "commit":
            if not r.may_commit(s.sp, alive=True, answer="prepared", runs_now=s.srun, copy=self.copy):
                raise Violation("the source may not commit")
            to = self._write(r, s, Source.COMMITTED) if self.copy else s._replace(away=True)
            yield "source: writes its commit point", to._replace(at="work"), True
        else:
            yield from self._send(s, s.at)

    def _answered(self, r: SimpleNamespace, s: State, message: str, answer: str) -> Step:
        label = f"source: {message} is answered {answer}"
        s = s._replace(call=None)
        if s.at in TASK:
            after = {
                ("begin", "receiving"): "sync",
                ("sync", "receiving"): "stop",
                ("final", "receiving"): "prepare",
                ("final", "prepared"): "prepare",
                ("prepare", "prepared"): "commit",
                # It was begun again in between, and has lost count.
                ("prepare", "receiving"): "final",
            }.get((message, answer))
            return label, s._replace(at=after or "work"), True
        action = r.source_on_answer(s.sp, s.away, message, answer)
        if action == Action.CONFLICT and not self.admin:
            raise Violation(f"{label}: a conflict that no admin made")
        if (message, answer) == ("abort", "committed"):
            s = s._replace(claimed=True)
        if action == Action.FINISH:
            s = self._write(r, s, Source.DELIVERED)
        elif action == Action.FORGET and s.sp == Source.DELIVERED:
            s = s._replace(at="forgotten")
        elif action == Action.FORGET:
            s = self._write(r, s, None, sdec=None, at="idle")
        return label, s, True

    def _work(self, r: SimpleNamespace, s: State) -> Iterator[Step]:
        if s.at == "idle":
            return
        todo = r.recover_source(s.sp, s.away, s.ran, s.srun, copy=self.copy)
        if todo.action == Action.UNDO:
            yield from self._undo(r, s, todo.start)
        elif todo.action == Action.DELIVER:
            if not s.away and not self.copy:
                yield "source: writes away", s._replace(away=True), True
            elif "forgets early" in self.flaws:
                yield "source: takes commit for granted", self._write(r, s, Source.DELIVERED), True
            else:
                yield from self._send(s, "commit")
        elif todo.action == Action.FINISH and s.at != "forgotten":
            yield from self._send(s, "forget")
        elif s.has and not (self.keep or s.kept) and not self.copy:
            if s.has == "full":
                yield "source: destroys it", s._replace(has="part"), True
            else:
                yield "source: has destroyed it", s._replace(has="", away=False), True
        else:
            yield "source: drops its journal", self._write(r, s, None, sdec=None, at="idle", ran=False), True

    def _undo(self, r: SimpleNamespace, s: State, start: bool) -> Iterator[Step]:
        if s.sp != Source.ABORTED and "starts first" not in self.flaws:
            yield "source: writes aborted", self._write(r, s, Source.ABORTED), True
        elif s.away and "leaves it away" not in self.flaws:
            yield "source: takes away back", s._replace(away=False), True
        elif start:
            if r.may_start_source(s.away, s.sp):
                yield "source: starts it again", self._started(s), True
            if "forgets that it ran" in self.flaws:
                yield "source: cannot start it now, and forgets that it ran", s._replace(ran=False), False
        elif s.ran:
            yield "source: notes that it runs", s._replace(ran=False), True
        else:
            yield from self._send(s, "abort")

    def _started(self, s: State) -> State:
        # What it writes from now on is in no copy.
        return s._replace(srun=True, copy="old" if s.copy == "full" else s.copy)

    # The target.

    def _target(self, r: SimpleNamespace, s: State) -> Iterator[Step]:
        if not s.up:
            confirmed = s.tdec == "here" and "forgets the decision" not in self.flaws
            yield "target: begins again", s._replace(up=True, confirmed=confirmed), True
            return
        todo = r.recover_target(s.tp)
        if todo == Action.DISCARD:
            if s.copy:
                yield "target: removes the copy", s._replace(copy="" if s.copy == "part" else "part"), True
            else:
                yield "target: drops its journal", s._replace(tp=None, tdec=None), True
        elif todo == Action.FINISH:
            if not s.made:
                yield "target: creates it", s._replace(made=True), True
            elif s.taway:
                yield "target: drops its journal", s._replace(tp=None, tdec=None, wish=False), True
            elif s.wish and r.may_start_target(s.tp, s.confirmed):
                yield "target: starts it", s._replace(trun=True, wish=False), True
        if s.ask and s.ask != "asked":
            yield self._told(r, s._replace(ask=""), s.ask)
        asks = todo == Action.WAIT or (todo == Action.FINISH and not s.confirmed)
        if asks and not s.ask and s.at not in ("down", "dead"):
            yield "target: asks", s._replace(ask="asked"), True

    def _told(self, r: SimpleNamespace, s: State, told: str) -> Step:
        label = f"target: hears {told}"
        action = r.target_on_outcome(s.tp, told)
        if action == Action.CONFLICT and not self.admin:
            raise Violation(f"{label}: a conflict that no admin made")
        if action == Action.DISCARD:
            s = self._discarded(s)
        elif action in (Action.CREATE, Action.FINISH):
            s = s._replace(tp=Target.COMMITTED, confirmed=True)
        return label, s, True

    def _discarded(self, s: State) -> State:
        if "removes first" in self.flaws and s.copy == "full":
            return s._replace(copy="part")
        return s._replace(tp=Target.ABORTED)

    def _busy(self, s: State, message: str) -> Iterator[Step]:
        """What a request waits for until it is answered."""
        if message == "commit" and s.made:
            yield "target: answers created", s._replace(call=("answered", message, "created")), True
        elif message in ("sync", "final"):
            if s.tp != Target.RECEIVING:
                yield "target: gives the pass up", self._lost(s), True
            else:
                exact = message == "final" and (self.copy or not s.srun)
                call = ("answered", message, "receiving")
                yield (
                    f"target: has {message}",
                    s._replace(copy="full" if exact else "old", complete=True, call=call),
                    True,
                )

    def _accept(self, r: SimpleNamespace, s: State, message: str, live: bool) -> Step:
        label = f"target: receives {message}{'' if live else ' of an earlier connection'}"
        name = "sync" if message == "final" else message
        verdict = r.target_accepts(s.tp, name, complete=s.complete, created=s.made)
        call = ("answered", message, verdict.answer)
        if verdict.allowed:
            if name == "forget" and s.wish and s.tp and "forgets the start" not in self.flaws:
                return f"{label}, and starts it first", s, True
            if name == "begin" and s.tp is None:
                s = s._replace(copy="part", complete=False)
            elif name == "sync":
                s, call = s._replace(copy="part", complete=False), ("busy", message, "")
            elif name == "commit":
                s, call = s._replace(confirmed=True), ("busy", message, "")
            if verdict.phase == Target.ABORTED:
                s = self._discarded(s)
            else:
                s = s._replace(tp=verdict.phase, tdec=s.tdec if verdict.phase else None)
        return label, s._replace(call=call) if live else s, True

    # What is between them, and what goes wrong.

    def _network(self, r: SimpleNamespace, s: State) -> Iterator[Step]:
        if s.call and s.call[0] == "busy" and s.up:
            yield from self._busy(s, s.call[1])
        if s.call and s.call[0] == "sent" and s.up:
            yield self._accept(r, s, s.call[1], live=True)
        for message in sorted(s.stale):
            yield f"network: {message} is lost for good", s._replace(stale=s.stale - {message}), True
            if s.up:
                yield (*self._accept(r, s, message, live=False)[:2], False)

    def _lost(self, s: State) -> State:
        """The connection breaks: what was sent may still come."""
        if s.call and s.call[0] == "sent" and len(s.stale | {s.call[1]}) <= self.delayed:
            return s._replace(call=None, stale=s.stale | {s.call[1]})
        return s._replace(call=None)

    def _trouble(self, s: State) -> Iterator[Step]:
        if s.call:
            yield "network: the connection breaks", self._lost(s), False
        if s.ask:
            yield "network: the outcome is lost", s._replace(ask=""), False
        if s.at not in ("down", "dead"):
            down = self._lost(s)._replace(at="down", claimed=False, ask="" if s.ask == "asked" else s.ask)
            yield "source: the daemon is killed", down, False
            # What starts with the host is not the migration's to decide.
            hoped = s.hoped and s.srun is False
            yield "source: the host is cut off power", down._replace(srun=False, hoped=hoped), False
        if s.at in TASK:
            at = "work" if s.sp else "idle"
            yield "source: the task is cancelled or fails", self._lost(s)._replace(at=at), False
        if s.up:
            down = self._lost(s)._replace(up=False, ask="", complete=False, confirmed=False)
            if self.admin:
                # Connections end with the daemon that had them; no person has to reckon with their messages.
                down = down._replace(stale=frozenset())
            yield "target: the daemon is killed", down, False
            yield "target: the host is cut off power", down._replace(trun=False), False

    # Persons.

    def _admin(self, r: SimpleNamespace, s: State) -> Iterator[Step]:
        honest = self.admin == "honest"
        for side in ("here", "there"):
            if s.at in ("work", "idle") and not (honest and not self._true_at_source(s, side)):
                decision = r.resolve_source(s.sp, s.away, s.srun, side, claimed=s.claimed, copy=self.copy)
                if not decision.refused:
                    yield f"admin of the source: {side}", self._decide_source(r, s, decision, side), honest
            if s.up and not (honest and not self._true_at_target(s, side)):
                decision = r.resolve_target(s.tp, s.trun, side)
                if s.taway and not s.tp:
                    # Whoever has given it up is in a source's place.
                    decision = r.resolve_source(None, True, s.trun, side)
                if not decision.refused and (decision.phase or s.made):
                    yield f"admin of the target: {side}", self._decide_target(s, decision, side), honest
        if s.at != "dead" and s.tp in (Target.PREPARED, Target.COMMITTED):
            yield "source: is lost for good", self._lost(s)._replace(at="dead", srun=False, ask=""), False

    def _decide_source(self, r: SimpleNamespace, s: State, decision, side: str) -> State:
        s = self._lost(s)
        if decision.phase is None:
            if s.ran:  # it undoes first
                return s
            return self._write(r, s, None, sdec=None, away=decision.away, at="idle")
        return self._write(r, s, decision.phase, sdec=side, kept=s.kept or decision.keeps, claimed=False)

    def _decide_target(self, s: State, decision, side: str) -> State:
        if decision.away:
            return s._replace(taway=True)
        if decision.phase == Target.ABORTED:
            return self._discarded(s)
        decided = side if decision.phase else None
        return s._replace(tp=decision.phase, tdec=decided, confirmed=True, taway=False)

    def _true_at_source(self, s: State, side: str) -> bool:
        """Tell whether what the admin of the source states with a decision is so."""
        if side == "there":
            return True
        commits = (s.call and s.call[1] == "commit") or "commit" in s.stale or s.ask == "committed"
        owns = (s.made and not s.taway) or s.tp == Target.COMMITTED
        # It may come back, but has not said yet that it has it.
        believed_lost = not s.up and not s.trun and s.tp == Target.COMMITTED
        return s.tdec != "here" and not commits and (not owns or believed_lost)

    def _true_at_target(self, s: State, side: str) -> bool:
        if side == "here":
            gone = s.sp in (Source.COMMITTED, Source.DELIVERED) or (s.away and s.sp != Source.ABORTED)
            return s.at == "dead" or (gone and not s.taway)
        if s.at == "dead" or s.tp == Target.RECEIVING:
            return s.tp == Target.RECEIVING  # half a copy is of no use to anybody
        if s.tp == Target.COMMITTED:
            return s.sp == Source.ABORTED or (s.sp is None and s.has == "full" and not s.away)
        return s.has == "full"

    # What must hold.

    def check(self, s: State) -> None:
        """Raise Violation if a state must not be."""
        r = self.r
        source = s.has == "full" and (s.srun or (s.at != "dead" and r.may_start_source(s.away, s.sp)))
        target = s.trun or (s.copy and not s.taway and r.may_start_target(s.tp, s.confirmed))
        if self.copy:
            if s.srun is not self.runs and s.hoped:
                raise Violation("a copy has stopped or started the source's container")
            if s.has != "full" or s.away:
                raise Violation("a copy has taken the source's container")
        elif source and target:
            raise Violation("both may start it")
        if s.srun and not self.runs:
            raise Violation("the source starts what did not run")
        if s.away and s.srun:
            raise Violation("it runs where it is away")
        # Only an admin can take over what the source has gone on from.
        if s.made and s.copy != "full" and not (s.copy == "old" and self.admin):
            raise Violation("the target created it of a copy that is not whole")
        if s.has != "full" and not (s.copy == "full" and s.made):
            raise Violation("nobody has it, or not what it wrote last")
        decided = s.up and s.tp == Target.COMMITTED and s.tdec == "here"
        if decided and not r.may_start_target(s.tp, s.confirmed):
            raise Violation("the target asks for what its admin has decided")
        if s.tp == Target.ABORTED and s.has != "full":
            raise Violation("the only copy is being discarded")

    def settled(self, s: State) -> bool:
        """Tell whether nothing is left to do, and all is as it should be."""
        if s.call or s.stale or s.ask or not s.up or s.at not in ("idle", "dead"):
            return False
        over = s.tp is None or (s.tp == Target.COMMITTED and s.at == "dead")
        if not over or (s.copy and not s.made):
            return False
        target = s.made and not s.taway
        if s.at == "dead":
            return not s.made or (target and not s.wish)
        if s.sp:
            return False
        if self.copy:
            return s.srun is s.hoped and not (s.made and s.wish)
        source = s.has == "full" and not s.away
        if source is target:
            return False
        if target:
            return not s.wish and (s.away if self.keep or s.kept else not s.has)
        return s.srun or not s.hoped


@dataclass(frozen=True)
class Found:
    """What an exploration saw: how many states and steps, and what went wrong, with the way there."""

    states: int
    steps: int
    wrong: str
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.wrong:
            return f"{self.states} states, {self.steps} steps"
        return "\n".join([f"{self.wrong}, after {self.states} states:", *self.trace])


def explore(model: Model) -> Found:
    """Visit every reachable state; the first that violates an invariant, or cannot settle, ends it."""
    first = model.first()
    came: dict[State, tuple[State, str] | None] = {first: None}
    # Who comes to a state without trouble.
    before: dict[State, list[State]] = {}
    count = 0

    def found(wrong: str, at: State, *more: str) -> Found:
        lines = [*more, f"   = {_shown(at)}"]
        while (step := came[at]) is not None:
            at, label = step
            lines.insert(0, label)
        return Found(len(came), count, wrong, tuple(lines))

    queue = deque([first])
    settled = []
    while queue:
        s = queue.popleft()
        try:
            model.check(s)
            for label, to, fine in model.steps(s):
                count += 1
                if to == s:
                    continue
                if fine:
                    before.setdefault(to, []).append(s)
                if to not in came:
                    came[to] = (s, label)
                    queue.append(to)
        except Violation as error:
            return found(str(error), s)
        if model.settled(s):
            settled.append(s)
    can, queue = set(settled), deque(settled)
    while queue:
        for s in before.get(queue.popleft(), ()):
            if s not in can:
                can.add(s)
                queue.append(s)
    for s in came:
        if s not in can:
            return found("it never settles", s)
    return Found(len(came), count, "")


def _shown(s: State) -> str:
    plain = State()._asdict()
    return ", ".join(f"{name}={value}" for name, value in s._asdict().items() if value != plain[name])
