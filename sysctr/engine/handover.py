"""The rules by which two hosts hand a container over: who may start it, and what each side does next.

Pure: what is on disk and what was said goes in, what to do comes out. The model in
tests/unit/test_handover_model.py drives these very functions through every order of messages, losses and
crashes.

The source coordinates a two-phase commit. Its commit point is one write: `away` in the container's record,
and for a copy, which leaves the source's container alone, the phase `committed` of its journal. A source that
knows nothing of a migration has aborted it (presumed abort), so it forgets one only after the target has
answered.

What the callers owe these rules:

- A phase is on disk before anything that follows from it: before an answer, a start, a removal.
- `stopped` is written before the container is asked to end, with `ran` = whether it ran; `ran` is cleared
  once it runs again, so that a later recovery does not start what somebody has stopped since.
- `may_commit`, the write of `away` and `outcome` exclude each other: no target may hear "aborted" in between.
- The target writes `aborted` before it removes the first file of a copy, and drops the journal last: half a
  copy must not look like a prepared one.
- An answer counts only on the connection, and for the request, that it was given to.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Outcome = Literal["pending", "committed", "aborted"]
Side = Literal["here", "there"]
Message = Literal["begin", "sync", "prepare", "commit", "abort", "forget"]


class Source(StrEnum):
    """What a source's journal says; no journal is None."""

    SENDING = "sending"
    STOPPED = "stopped"
    COMMITTED = "committed"
    ABORTED = "aborted"
    DELIVERED = "delivered"


class Target(StrEnum):
    """What a target's journal says; no journal is None."""

    RECEIVING = "receiving"
    PREPARED = "prepared"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Action(StrEnum):
    """What one side has to do next.

    Source: `undo` writes `aborted`, takes `away` back, starts the container again where Recovery says so,
    tells the target `abort` until it answers. `deliver` says `commit` until it is answered. `finish` writes
    `delivered`, says `forget` until it is answered, destroys the container or keeps it away, `forget` then
    drops the journal.

    Target: `wait` keeps the copy, and asks the source for the outcome now and then. `discard` writes
    `aborted`, removes the copy and the reservation, drops the journal. `create` writes `committed`, then does
    what `finish` does: it creates the container if there is none yet, and starts it if that is wanted and may
    be.

    Both: `conflict` is reported and leaves everything as it is, until the admin decides.
    """

    NOTHING = "nothing"
    UNDO = "undo"
    DELIVER = "deliver"
    FINISH = "finish"
    FORGET = "forget"
    WAIT = "wait"
    DISCARD = "discard"
    CREATE = "create"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class Recovery:
    """What a source does about a migration that it finds, and whether `undo` starts the container."""

    action: Action
    start: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a target makes of a message: its new phase, and its answer; not `allowed` is a refusal."""

    allowed: bool
    phase: Target | None
    answer: str


@dataclass(frozen=True)
class Decision:
    """What an admin's decision makes of one side, or why it cannot be.

    The journal is written first (with `decided`, and `keeps`, which stays: the container is not destroyed
    when the target has it), then the record's `away`, except where the phase is None: there the journal is
    dropped last.
    """

    refused: str = ""
    phase: Source | Target | None = None
    away: bool = False
    keeps: bool = False
    raises_generation: bool = False


def may_start_source(away: bool, phase: str | None) -> bool:
    """Tell whether the source may start the container; `away` is the record's, of whatever migration.

    `stopped` is refused because the task that wrote it may be about to commit: whoever wants the container
    back undoes first, which writes `aborted`. For a copy nobody asks. The model checks the rest by it; the
    engine need not ask, for that task holds the container, and with the task gone nobody commits.
    """
    return not away and phase in (None, Source.SENDING, Source.ABORTED)


def may_start_target(phase: str | None, confirmed: bool = True) -> bool:
    """Tell whether the target may start what it has got.

    `confirmed`: since this daemon began the source has said commit, or that its outcome is committed; or the
    admin has decided `here`. Without that the admin of the source may have taken the container back while
    this host was down, believed to be lost.
    """
    return phase is None or (phase == Target.COMMITTED and confirmed)


def may_destroy_source(away: bool, phase: str | None) -> bool:
    """Tell whether a user may destroy or change the source's container, maybe the only complete one."""
    return phase is None or (phase == Source.ABORTED and not away)


def may_commit(
    phase: str | None, *, alive: bool, answer: str, runs_now: bool = False, copy: bool = False
) -> bool:
    """Tell whether the source may write its commit point; `answer` is that of `prepare`.

    `alive`: the migration's task goes on, neither cancelled nor failed. Only it commits.
    """
    if not alive or answer != "prepared":
        return False
    return phase == Source.SENDING if copy else phase == Source.STOPPED and not runs_now


_SOURCE_STEPS: dict[str | None, tuple[str | None, ...]] = {
    None: (Source.SENDING,),
    # Never back from `stopped`: a message of before would prepare what has changed since. That takes a new
    # id.
    Source.SENDING: (Source.STOPPED, Source.ABORTED, Source.COMMITTED),
    Source.STOPPED: (Source.COMMITTED, Source.ABORTED, Source.DELIVERED),
    Source.COMMITTED: (Source.DELIVERED, Source.ABORTED),
    Source.ABORTED: (None, Source.COMMITTED),
    Source.DELIVERED: (None,),
}


def is_source_step(before: str | None, after: str | None) -> bool:
    """Tell whether a source's journal may go from one phase to another, or stay."""
    return before == after or after in _SOURCE_STEPS[before]


def outcome(phase: str | None, away_here: bool, alive: bool, decided: Side | None = None) -> Outcome:
    """Return what a source answers when it is asked about a migration.

    `away_here`: the record's `away` names this very migration. `alive`: as for `may_commit`.

    >>> outcome(None, False, False), outcome("stopped", False, True), outcome("stopped", True, False)
    ('aborted', 'pending', 'committed')
    """
    if decided is not None:
        return "aborted" if decided == "here" else "committed"
    if phase == Source.ABORTED:
        return "aborted"
    if away_here or phase in (Source.COMMITTED, Source.DELIVERED):
        return "committed"
    return "pending" if alive and phase is not None else "aborted"


def recover_source(
    phase: str | None, away_here: bool, was_running: bool, runs_now: bool, *, copy: bool = False
) -> Recovery:
    """Return what a source does about a migration that no task works on: after a crash, or when one failed.

    `was_running` is the journal's `ran`.
    """
    if phase is None:
        return Recovery(Action.NOTHING)
    if phase == Source.DELIVERED:
        return Recovery(Action.FINISH)
    if phase != Source.ABORTED and (away_here or phase == Source.COMMITTED):
        return Recovery(Action.DELIVER)
    stopped = phase in (Source.STOPPED, Source.ABORTED) and not copy
    return Recovery(Action.UNDO, start=stopped and was_running and not runs_now)


def source_on_answer(phase: str | None, away_here: bool, message: Message, answer: str) -> Action:
    """Return what a source does when `commit`, `abort` or `forget` was answered or refused."""
    committed = phase == Source.COMMITTED or (phase == Source.STOPPED and away_here)
    if message == "commit" and committed:
        return Action.FINISH if answer == "created" else Action.CONFLICT
    if message == "abort" and phase == Source.ABORTED:
        return Action.FORGET if answer == "aborted" else Action.CONFLICT
    if message == "forget" and phase == Source.DELIVERED:
        return Action.FORGET if answer == "forgotten" else Action.CONFLICT
    return Action.NOTHING  # it comes too late to matter


def recover_target(phase: str | None) -> Action:
    """Return what a target's daemon does about a migration that it finds when it begins."""
    return {
        Target.RECEIVING: Action.WAIT,
        Target.PREPARED: Action.WAIT,
        Target.COMMITTED: Action.FINISH,
        Target.ABORTED: Action.DISCARD,
    }.get(phase, Action.NOTHING)


def target_on_outcome(phase: str | None, told: Outcome) -> Action:
    """Return what a target does when the source has told its outcome.

    A target that committed hears "aborted" only where an admin decided otherwise over there; "pending" then
    is an answer of before.
    """
    if phase is None:
        return Action.NOTHING
    if phase == Target.ABORTED:
        return Action.DISCARD
    if told == "pending":
        return Action.WAIT
    if phase == Target.COMMITTED:
        return Action.FINISH if told == "committed" else Action.CONFLICT
    if told == "aborted":
        return Action.DISCARD
    return Action.CREATE if phase == Target.PREPARED else Action.CONFLICT


_TARGET_MOVES: dict[tuple[Target, Message], tuple[Target | None, str]] = {
    (Target.RECEIVING, "begin"): (Target.RECEIVING, "receiving"),
    (Target.RECEIVING, "sync"): (Target.RECEIVING, "receiving"),
    (Target.RECEIVING, "abort"): (Target.ABORTED, "aborted"),
    # Who lost the answer asks again, on a new connection.
    (Target.PREPARED, "begin"): (Target.PREPARED, "prepared"),
    (Target.PREPARED, "prepare"): (Target.PREPARED, "prepared"),
    (Target.PREPARED, "commit"): (Target.COMMITTED, "created"),
    (Target.PREPARED, "abort"): (Target.ABORTED, "aborted"),
    (Target.COMMITTED, "commit"): (Target.COMMITTED, "created"),
    (Target.COMMITTED, "forget"): (None, "forgotten"),
    (Target.ABORTED, "abort"): (Target.ABORTED, "aborted"),
}


def target_accepts(
    phase: str | None, message: Message, *, complete: bool = False, created: bool = False
) -> Verdict:
    """Return what a target makes of a message about one migration, in any phase, repeated or not.

    `complete`: the last pass that was begun with this daemon has ended well, and no pass goes on. `created`:
    a container's record says that it came with this migration; a late `begin` must not begin it again.

    >>> target_accepts("prepared", "commit").answer, target_accepts("receiving", "commit").allowed
    ('created', False)
    """
    at = None if phase is None else Target(phase)
    if at is None and created and message == "begin":
        return Verdict(False, None, "created")
    if at is None:
        return {
            "begin": Verdict(True, Target.RECEIVING, "receiving"),
            "abort": Verdict(True, None, "aborted"),
            "forget": Verdict(True, None, "forgotten"),
        }.get(message, Verdict(False, None, "unknown"))
    if message == "prepare" and at == Target.RECEIVING and complete:
        return Verdict(True, Target.PREPARED, "prepared")
    if (at, message) in _TARGET_MOVES:
        return Verdict(True, *_TARGET_MOVES[at, message])
    return Verdict(False, at, at.value)


def resolve_source(
    phase: str | None,
    away_here: bool,
    runs_now: bool,
    side: Side,
    *,
    claimed: bool = False,
    copy: bool = False,
) -> Decision:
    """Return what an admin's decision makes of the source.

    `here` states that the other side never starts its copy: it is lost, or was resolved with `there`.
    `claimed`: the target has answered `abort` with "committed". Only then can this side still give its
    container up, which is kept, as it may have run since.
    """
    if side == "here":
        if phase == Source.DELIVERED:
            return Decision("the other side has confirmed that it has the container")
        if phase is None and not away_here:
            return Decision("it is not being migrated")
        # Decided before, or never to be told: nobody over there is waited for any longer.
        over = phase is None or (phase == Source.ABORTED and not away_here)
        return Decision(phase=None if over else Source.ABORTED, raises_generation=True)
    if phase is None and not away_here:
        return Decision("it is not being migrated")
    if phase in (None, Source.COMMITTED, Source.DELIVERED) or (away_here and phase != Source.ABORTED):
        return Decision(phase=None if phase is None else Source(phase), away=away_here)
    if phase != Source.ABORTED or not claimed:
        return Decision("the other side has not said that it has it")
    if runs_now and not copy:
        return Decision("it runs here")
    return Decision(phase=Source.COMMITTED, away=not copy, keeps=True)


def resolve_target(phase: str | None, runs_now: bool, side: Side) -> Decision:
    """Return what an admin's decision makes of the target.

    `here` states that the source never starts the container again. With `there` a copy is discarded; a
    container that was created already is kept, away to the source, for nobody but its admin to destroy.
    """
    if phase is None:
        return Decision("it is not being migrated")
    if side == "here":
        if phase == Target.RECEIVING:
            return Decision("there is no complete copy here")
        if phase == Target.ABORTED:
            return Decision("the copy here is being discarded")
        return Decision(phase=Target.COMMITTED, raises_generation=True)
    if phase != Target.COMMITTED:
        return Decision(phase=Target.ABORTED)
    if runs_now:
        return Decision("it runs here")
    return Decision(phase=None, away=True)
