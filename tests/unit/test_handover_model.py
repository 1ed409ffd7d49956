"""The hand-over between two hosts: its rules, and every state that a model which they drive can reach."""

import dataclasses
import doctest
import time
from collections.abc import Callable

import pytest

from sysctr.engine import handover
from sysctr.engine.handover import Action, Decision, Recovery, Source, Target, Verdict
from tests.unit.handover_model import RULES, Model, explore

CIRCUMSTANCES = {
    "running": Model(delayed=2),
    "running, not to be started": Model(wish=False),
    "running, kept": Model(keep=True),
    "stopped": Model(runs=False, wish=False),
    "stopped, to be started": Model(runs=False),
    "copy of a running one": Model(copy=True),
    "copy of a stopped one": Model(copy=True, runs=False, wish=False),
    "honest admins": Model(admin="honest", delayed=2),
    "honest admins, kept": Model(admin="honest", keep=True),
    "honest admins, stopped": Model(admin="honest", runs=False, wish=False),
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_at_most_one_host_may_start_it_none_loses_it_and_all_ends(name: str) -> None:
    began_s = time.monotonic()
    found = explore(CIRCUMSTANCES[name])
    print(f"\n{name}: {found}, {time.monotonic() - began_s:.1f} s")
    assert not found.wrong, str(found)


def test_the_model_comes_to_every_phase_and_to_both_ends() -> None:
    seen: set[object] = set()

    class Watched(Model):
        def check(self, s) -> None:
            super().check(s)
            seen.update((("source", s.sp), ("target", s.tp), ("moved", s.trun and not s.has)))
            seen.add(("undone", s.sp == Source.ABORTED and s.srun))

    assert not explore(Watched()).wrong
    # `committed` in a source's journal is for copies, and for what an admin decided.
    assert {("source", phase) for phase in [None, *Source]} - seen == {("source", Source.COMMITTED)}
    assert {("target", phase) for phase in [None, *Target]} <= seen
    assert {("moved", True), ("undone", True)} <= seen


def test_admins_who_both_say_here_get_two_and_are_told() -> None:
    found = explore(Model(admin="lying"))
    assert found.wrong == "both may start it"
    assert sum(": here" in step for step in found.trace) >= 1
    assert handover.source_on_answer("aborted", False, "abort", "committed") == Action.CONFLICT
    assert handover.target_on_outcome("committed", "aborted") == Action.CONFLICT


def answers(phase: str | None, message: str, verdict: Verdict) -> dict[str, Callable]:
    """Return a target's rule that gives another verdict on one message in one phase."""
    return otherwise("target_accepts", verdict, phase, message)


def otherwise(rule: str, result: object, *when: object) -> dict[str, Callable]:
    """Return a rule that gives another result where its first arguments are these."""

    def mutant(*arguments, **facts):
        return result if arguments[: len(when)] == when else RULES[rule](*arguments, **facts)

    return {rule: mutant}


def blind(rule: str, **facts: object) -> dict[str, Callable]:
    """Return a rule that takes these facts for given, whatever is so; a number counts arguments (`_1`)."""
    places = {int(name[1:]): value for name, value in facts.items() if name[1:].isdigit()}
    named = {name: value for name, value in facts.items() if not name[1:].isdigit()}

    def mutant(*arguments, **other):
        seen = [places.get(place, argument) for place, argument in enumerate(arguments)]
        return RULES[rule](*seen, **{**other, **named})

    return {rule: mutant}


def then(rule: str, **changes: object) -> dict[str, Callable]:
    """Return a rule whose result is changed."""
    return {rule: lambda *given, **facts: dataclasses.replace(RULES[rule](*given, **facts), **changes)}


TWO = "both may start it"
PARTIAL = "the target created it of a copy that is not whole"
LOST = "nobody has it, or not what it wrote last"
FALSE_CONFLICT = "a conflict that no admin made"
STUCK = "it never settles"
UNASKED = "the source starts what did not run"
UNDECIDED = "the target asks for what its admin has decided"
RUNS_AWAY = "it runs where it is away"

MISTAKES = {
    # What each side takes for the truth.
    "an unknown migration is answered committed": (otherwise("outcome", "committed", None), FALSE_CONFLICT),
    "one that goes on is answered aborted": (blind("outcome", _2=False), FALSE_CONFLICT),
    "the outcome does not look at away": (blind("outcome", _1=False), FALSE_CONFLICT),
    "aborted is taken for committed": (
        otherwise("target_on_outcome", Action.CREATE, "prepared", "aborted"), TWO),
    "pending is taken for committed": (
        otherwise("target_on_outcome", Action.CREATE, "prepared", "pending"), TWO),
    "an old pending is a conflict": (
        otherwise("target_on_outcome", Action.CONFLICT, "committed", "pending"), FALSE_CONFLICT),
    "a receiver goes on after aborted": (
        otherwise("target_on_outcome", Action.WAIT, "receiving", "aborted"), STUCK),
    # Starts.
    "the source starts in any phase": (
        {"may_start_source": lambda away, phase: phase != Source.DELIVERED}, TWO),
    "a prepared copy may be started": (otherwise("may_start_target", True, "prepared"), TWO),
    # Recovery.
    "recovery does not look at away": (blind("recover_source", _1=False), TWO),
    "recovery delivers what is only stopped": (
        otherwise("recover_source", Recovery(Action.DELIVER), "stopped", False), RUNS_AWAY),
    "recovery does not start it again": (
        {"recover_source": lambda *a, **k: Recovery(RULES["recover_source"](*a, **k).action)}, STUCK),
    "a prepared target discards by itself": (
        otherwise("recover_target", Action.DISCARD, "prepared"), PARTIAL),
    "a prepared target commits by itself": (
        otherwise("recover_target", Action.FINISH, "prepared"), PARTIAL),
    "a committed target waits": (otherwise("recover_target", Action.WAIT, "committed"), STUCK),
    # Messages.
    "prepare is accepted of half a copy": (blind("target_accepts", complete=True), PARTIAL),
    "a pass is accepted when prepared": (
        answers("prepared", "sync", Verdict(True, Target.PREPARED, "receiving")), PARTIAL),
    "begin makes a prepared one receive again": (
        answers("prepared", "begin", Verdict(True, Target.RECEIVING, "receiving")), FALSE_CONFLICT),
    "begin begins again what was created": (blind("target_accepts", created=False), PARTIAL),
    "abort is refused when prepared": (
        answers("prepared", "abort", Verdict(False, Target.PREPARED, "prepared")), FALSE_CONFLICT),
    "commit is refused the second time": (
        answers("committed", "commit", Verdict(False, Target.COMMITTED, "committed")), FALSE_CONFLICT),
}  # fmt: skip
UNDER_ADMINS = {
    "commit is accepted while receiving": (
        answers("receiving", "commit", Verdict(True, Target.COMMITTED, "created")), PARTIAL),
    "commit is accepted while the copy is removed": (
        answers("aborted", "commit", Verdict(True, Target.COMMITTED, "created")), PARTIAL),
    "a committed target lets itself be aborted": (
        answers("committed", "abort", Verdict(True, Target.ABORTED, "aborted")), PARTIAL),
    "any answer to commit will do": (
        {"source_on_answer": lambda phase, away, message, answer: Action.FINISH if message == "commit"
         else RULES["source_on_answer"](phase, away, message, answer)}, LOST),
    "a target starts without the source's word": (blind("may_start_target", _1=True), TWO),
    "away counts for more than what was decided": (
        {"outcome": lambda phase, away, alive, decided=None: RULES["outcome"](None, away, alive)}, TWO),
    "the source gives up what nobody claims": (blind("resolve_source", claimed=True), STUCK),
    "the source destroys what it has given up": (then("resolve_source", keeps=False), LOST),
    "half a copy is resolved to be here": (
        otherwise("resolve_target", Decision(phase=Target.COMMITTED), "receiving", False, "here"), PARTIAL),
    "a created container is discarded": (
        otherwise("resolve_target", Decision(phase=Target.ABORTED), "committed", False, "there"), PARTIAL),
}  # fmt: skip
NEGLECTED = {
    "the source forgets before the answer": (Model(flaws=frozenset({"forgets early"})), FALSE_CONFLICT),
    "the target forgets before it has started": (Model(flaws=frozenset({"forgets the start"})), STUCK),
    "the target removes before it writes aborted": (
        Model(flaws=frozenset({"removes first"}), admin="honest"), PARTIAL),
    "the source forgets that it ran before it runs again": (
        Model(flaws=frozenset({"forgets that it ran"})), STUCK),
    "the source does not take away back after a crash": (
        Model(flaws=frozenset({"leaves it away"}), admin="honest"), STUCK),
    "the target forgets what its admin decided": (
        Model(flaws=frozenset({"forgets the decision"}), admin="honest"), UNDECIDED),
    "the source starts before it writes aborted": (Model(flaws=frozenset({"starts first"})), STUCK),
    "the source starts without looking at away": (
        Model(rules=blind("may_start_source", _0=False), keep=True), TWO),
    "what did not run is started": (Model(rules=blind("recover_source", _2=True), runs=False), UNASKED),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MISTAKES, *UNDER_ADMINS, *NEGLECTED])
def test_a_mistake_does_not_pass(name: str) -> None:
    if name in NEGLECTED:
        model, wrong = NEGLECTED[name]
    else:
        rules, wrong = {**MISTAKES, **UNDER_ADMINS}[name]
        model = Model(rules=rules, admin="honest" if name in UNDER_ADMINS else "")
    found = explore(model)
    print(f"\n{name}: {found}")
    assert wrong in found.wrong, str(found)
    assert found.trace


def test_examples_hold() -> None:
    results = doctest.testmod(handover)
    assert results.attempted > 0
    assert results.failed == 0


# Answers by phase: of those marked + the target does what it is told.
ACCEPTED = """
                begin       sync        prepare    commit     abort       forget
nothing     +receiving  -unknown    -unknown   -unknown   +aborted    +forgotten
receiving   +receiving  +receiving  -receiving -receiving +aborted    -receiving
prepared    +prepared   -prepared   +prepared  +created   +aborted    -prepared
committed   -committed  -committed  -committed +created   -committed  +forgotten
aborted     -aborted    -aborted    -aborted   -aborted   +aborted    -aborted
"""


def test_every_message_in_every_phase() -> None:
    head, *rows = (line.split() for line in ACCEPTED.strip().splitlines())
    for phase, *cells in rows:
        at = None if phase == "nothing" else phase
        for message, cell in zip(head, cells, strict=True):
            verdict = handover.target_accepts(at, message)
            assert (verdict.allowed, verdict.answer) == (cell[0] == "+", cell[1:]), (phase, message)
            if not verdict.allowed:
                assert verdict.phase == at, (phase, message)
            # What is repeated changes nothing; its answer is the same.
            elif at is not None:
                assert handover.target_accepts(verdict.phase, message).phase == verdict.phase


@pytest.mark.parametrize(
    ("facts", "may"),
    [
        ({}, True),
        ({"alive": False}, False),
        ({"answer": "receiving"}, False),
        ({"runs_now": True}, False),
        ({"phase": "sending"}, False),
        ({"phase": "aborted"}, False),
        ({"phase": None}, False),
        ({"phase": "sending", "copy": True, "runs_now": True}, True),
        ({"phase": "aborted", "copy": True}, False),
    ],
)
def test_who_may_commit(facts: dict, may: bool) -> None:
    asked = {"phase": "stopped", "alive": True, "answer": "prepared", **facts}
    assert handover.may_commit(asked.pop("phase"), **asked) is may


def test_a_source_never_goes_back() -> None:
    assert not handover.is_source_step("stopped", "sending")
    assert not handover.is_source_step("aborted", "sending")
    assert not handover.is_source_step("delivered", "aborted")


@pytest.mark.parametrize("away", [True, False])
@pytest.mark.parametrize("phase", [None, *Source])
def test_a_user_destroys_only_what_nobody_needs(phase: str | None, away: bool) -> None:
    # One that was kept may be destroyed: the other host has confirmed.
    assert handover.may_destroy_source(away, phase) is (phase is None or (phase == "aborted" and not away))


def test_decisions_that_cannot_be_are_refused() -> None:
    source, target = handover.resolve_source, handover.resolve_target
    assert source("delivered", True, False, "here").refused
    assert source(None, False, False, "here").refused
    assert source(None, False, False, "there").refused
    for phase in ("sending", "stopped", "aborted"):
        assert source(phase, False, False, "there").refused, phase
    assert source("aborted", False, True, "there", claimed=True).refused
    assert target(None, False, "here").refused
    assert target("receiving", False, "here").refused
    assert target("aborted", False, "here").refused
    assert target("committed", True, "there").refused


def test_who_decides_here_raises_the_generation() -> None:
    taken_back = handover.resolve_source("stopped", True, False, "here")
    assert taken_back == Decision(phase=Source.ABORTED, raises_generation=True)
    # Again: the other side is lost, nobody waits for its answer.
    assert handover.resolve_source("aborted", False, True, "here").phase is None
    taken = handover.resolve_target("prepared", False, "here")
    assert taken == Decision(phase=Target.COMMITTED, raises_generation=True)
    assert not handover.resolve_target("prepared", False, "there").raises_generation
