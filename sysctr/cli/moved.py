"""What is told of a migration: the plan, what is in the way, and what became of it."""

from sysctr import errors
from sysctr.cli.output import duration, field_lines, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PAST = {"migrate": "migrated", "copy": "copied"}


def plan_lines(verb: str, label: str, report: "dict[str, Any]") -> "list[str]":
    """Return what a dry run found, as lines for people."""
    there, volumes = report.get("there") or {}, report.get("volumes") or []
    blockers = report.get("blockers") or []
    expected, total = _sum(volumes, "expected_bytes"), _sum(volumes, "total_bytes")
    fields = [
        (verb, _titled(report, label)),
        ("to", _place(report, there)),
        *((f"volume {volume['name']}", _volume(volume, there.get("pool"))) for volume in volumes),
        ("to send", _amount(expected, total) if len(volumes) > 1 else ""),
        ("snapshots", f"{report['snapshots']}, with their settings" if report.get("snapshots") else ""),
        *((f"address {card}", _address(change)) for card, change in (there.get("addresses") or {}).items()),
        *(("note", str(warning)) for warning in report.get("warnings") or ()),
    ]
    lines = field_lines(fields)
    if not blockers:
        return [*lines, "nothing is in the way"]
    return [*lines, f"{_in_the_way(len(blockers))}:", *blocker_lines(blockers)]


def blocker_lines(blockers: "list[dict[str, Any]]") -> "list[str]":
    """Return a line for each thing that is in the way, and one for what to do about it.

    >>> blocker_lines([{"what": "bridge", "text": "no bridge vmbr0 there", "hint": "--bridge-map vmbr0=B"}])
    ['  bridge: no bridge vmbr0 there', '    --bridge-map vmbr0=B']
    """
    lines = []
    for blocker in blockers:
        lines.append(f"  {blocker.get('what') or 'problem'}: {blocker['text']}")
        lines += [f"    {line}" for line in str(blocker.get("hint") or "").splitlines()]
    return lines


def blocked_error(
    verb: str, label: str, report: "dict[str, Any]", error: errors.SysctrError
) -> errors.SysctrError:
    """Return the error with what to do about each thing that is in the way, as far as the report says it."""
    blockers = report.get("blockers") or []
    if not blockers:
        return error
    head = f"cannot {verb} {_titled(report, label)} to {report.get('peer')}: {_in_the_way(len(blockers))}"
    # `print_error` sets the lines after the first apart.
    return errors.Blocked("\n".join([head, *(line[2:] for line in blocker_lines(blockers))]))


def arrived_lines(verb: str, label: str, report: "dict[str, Any]") -> "list[str]":
    """Return what became of a container that was sent, as lines for people; the first is the summary."""
    there = report.get("there") or {}
    passes = report.get("passes") or []
    facts = []
    if report.get("downtime_s") is not None:
        word = "down" if verb == "migrate" else "held"
        facts.append(f"{word} for {duration(float(report['downtime_s']))}")
    facts.append(f"{size(report.get('sent_bytes'))} sent in {duration(_seconds(report.get('seconds')))}")
    lines = [f"{_PAST[verb]} {_titled(report, label)} to {report.get('peer')}: {', '.join(facts)}"]
    if there:
        state = "started" if report.get("started") else "stopped"
        lines.append(f"  there: {_titled(there, label)} in pool {there.get('pool')}, {state}")
    for card, change in (there.get("addresses") or {}).items():
        if change.get("before") != change.get("after"):
            lines.append(f"  {card}: {_address(change)}")
    if len(passes) > 1:
        lines.append(f"  passes: {', '.join(_pass(one) for one in passes)}")
    if report.get("kept"):
        lines.append("  here: its files are kept, and it is not started while it is away")
    for warning in (*(report.get("warnings") or ()), *(report.get("notes") or ())):
        lines.append(f"  note: {warning}")
    return lines


def settled_line(what: str, migration: "dict[str, Any]", containers: "list[dict[str, Any]]") -> str:
    """Say where a container is that was in doubt, by what this host has of it now."""
    number, name = migration.get("container"), migration["name"]
    here = next((one for one in containers if one["id"] == number and one["name"] == name), None)
    if here is not None and not here.get("away"):
        return f"settled {what}: it is here, {here['state']}"
    return f"settled {what}: {migration['peer']} has it"


def _in_the_way(count: int) -> str:
    return f"{count} thing{'s are' if count > 1 else ' is'} in the way"


def _sum(volumes: "list[dict[str, Any]]", name: str) -> "int | None":
    known = [volume[name] for volume in volumes if volume.get(name) is not None]
    return sum(known) if len(known) == len(volumes) else None


def _amount(sent_bytes: "int | None", total_bytes: "int | None") -> str:
    if sent_bytes is None:
        return "" if total_bytes is None else f"{size(total_bytes)} in all"
    return f"about {size(sent_bytes)}" + ("" if total_bytes is None else f" of {size(total_bytes)}")


def _seconds(value: "int | float | None") -> "float | None":
    return None if value is None else float(value)


def _titled(of: "dict[str, Any]", label: str) -> str:
    """Return name and number; what was typed is at least one of them."""
    name, number = of.get("name"), of.get("id")
    if name is None or number is None:
        return str(name if name is not None else number if number is not None else label)
    return f"{name} ({number})"


def _place(report: "dict[str, Any]", there: "dict[str, Any]") -> str:
    pool = f" in pool {there['pool']}" if there.get("pool") else ""
    if not there or (there.get("id"), there.get("name")) == (report.get("id"), report.get("name")):
        return f"{report.get('peer')}{pool}"
    return f"{report.get('peer')}, as {_titled(there, '?')}{pool}"


def _volume(volume: "dict[str, Any]", pool: "str | None") -> str:
    method = str(volume.get("method"))
    how = {"stream": "as a stream of snapshots", "rsync": "by rsync"}.get(method, method)
    # Only what goes elsewhere than the container is worth a word.
    where = "" if volume.get("there") in (None, "", pool) else f"to pool {volume['there']}"
    amount = _amount(volume.get("expected_bytes"), volume.get("total_bytes"))
    return ", ".join(part for part in (amount, how, where) if part)


def _address(change: "dict[str, Any]") -> str:
    before, after = change.get("before"), change.get("after")
    if before == after:
        return f"{before} stays" if before else "none"
    if not after:
        return f"{before} here, chosen there when it starts"
    return f"{after} there, {before} before" if before else f"{after} there"


def _pass(one: "dict[str, Any]") -> str:
    return f"{size(one.get('sent_bytes'))} in {duration(_seconds(one.get('seconds')))}"
