"""Telling somebody who is not looking: a program of the administrator's, or a mail."""

import shutil
from collections.abc import Mapping, Sequence
from email.message import EmailMessage

from sysctr.errors import UsageError
from sysctr.linux import process

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib"
_TIMEOUT_S = 60.0
# The kernel takes 128 KiB in one variable, and no reason needs that much.
_VARIABLE_LIMIT = 4096


def check_command(argv: Sequence[str]) -> None:
    """Raise UsageError where the program of a command is not there."""
    if argv and shutil.which(argv[0], path=_PATH) is None:
        raise UsageError(
            f"cannot accept on_failure: there is no program {argv[0]}", f"name its path, or one in {_PATH}"
        )


def check_mail(addresses: Sequence[str]) -> None:
    """Raise UsageError where mail is wanted and this host cannot send any."""
    if addresses and shutil.which("sendmail", path=_PATH) is None:
        raise UsageError(
            "cannot accept mail_to: this host has no program sendmail",
            "install a mail system such as msmtp-mta or postfix, or use on_failure",
        )


def run_command(argv: Sequence[str], facts: Mapping[str, str]) -> None:
    """Run a program, without a shell, with facts in its environment; raises ProgramFailed."""
    env = {name: value.replace("\0", "")[:_VARIABLE_LIMIT] for name, value in facts.items()}
    found = shutil.which(argv[0], path=_PATH) or argv[0]
    process.run([found, *argv[1:]], env={"HOME": "/root", **env}, timeout_s=_TIMEOUT_S)


def send_mail(addresses: Sequence[str], subject: str, body: str) -> None:
    """Hand a mail over to the mail system of this host; raises ProgramFailed, UsageError without one."""
    check_mail(addresses)
    mail = EmailMessage()
    mail["To"] = ", ".join(addresses)
    mail["Subject"] = "".join(char if char.isprintable() else "?" for char in subject)[:200]
    # Nobody's answer to it is wanted, that of a vacation program least of all.
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(body.encode("utf-8", "replace").decode())
    program = shutil.which("sendmail", path=_PATH)
    assert program is not None
    process.run([program, "-t", "-i"], input=bytes(mail), env={"HOME": "/root"}, timeout_s=_TIMEOUT_S)
