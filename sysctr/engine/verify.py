"""Proves that an archive can be restored: all of it is read, as a restore would, and nothing is written."""

import hashlib
from typing import Any

from sysctr.engine.archive_source import Source
from sysctr.engine.host import Host
from sysctr.engine.restore_config import Wishes, archived_name, draft, here_of
from sysctr.engine.tasks import Task
from sysctr.errors import SysctrError
from sysctr.template.unpack import examine

# Where an init is; the directory may be a link to another that is here, too.
_INITS = frozenset({"sbin/init", "usr/sbin/init", "bin/init", "usr/bin/init", "init"})


def verify(host: Host, task: Task, source: Source) -> dict[str, Any]:
    """Read an archive to its end; raises SysctrError with the reason for which it could not be restored."""
    jobs = host.jobs_for_templates()
    head = source.peek(jobs)
    name = archived_name(head, source.name, source.doing) or "restored"
    made = draft(head, source.doing, Wishes(name, frozenset(), {}, renew=False), here_of(host))
    wanted = _INITS | {made.config.init.lstrip("/")} - {""}
    inits: list[str] = []

    def see(member: str) -> None:
        if head.below and not member.startswith(f"{head.below}/"):
            return
        path = member.removeprefix(f"{head.below}/").removeprefix("./").lstrip("/")
        if path in wanted:
            inits.append(path)

    digest = hashlib.sha256()
    task.step(f"reading {source.name}")
    outcome = examine(
        source.codec, lambda fd: source.feed(fd, task, digest.update), doing=source.doing,
        run_job=jobs.run_tool, task=task, on_member=see,
    )  # fmt: skip
    source.check_ended()
    if not inits:
        raise SysctrError(f"cannot {source.doing}: it has no init", "it is no archive of a whole container")
    task.log(f"{outcome.entries} members, sha256 {digest.hexdigest()}")
    return {
        "archive": source.name, "members": outcome.entries, "sha256": digest.hexdigest(), "name": name,
        "compress": source.codec, "notes": made.notes, "left_out": made.left_out,
    }  # fmt: skip
