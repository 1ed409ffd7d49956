"""The commands that the README shows, run as it shows them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.node import CHECKOUT

README = Path(CHECKOUT, "README.md").read_text()
# What a terminal is needed for, and what stands for a file of the reader's own.
INTERACTIVE = ("enter", "console", "edit", "passwd", "events")


def first_container() -> list[list[str]]:
    """Return the commands of the block below "First container"."""
    block = README.split("## First container", 1)[1].split("```")[1]
    return [shlex.split(line.partition(" #")[0]) for line in block.strip().splitlines()]


def daily_commands() -> list[list[str]]:
    """Return every `sysctr …` of the table of daily tasks that can run without a terminal."""
    table = README.split("## Daily tasks", 1)[1].split("##", 1)[0]
    commands = [shlex.split(text) for text in re.findall(r"`(sysctr [^`]*)`", table)]
    # On another host it is the same command; there is no other host here.
    commands = [one if one[1] != "--host" else [one[0], *one[3:]] for one in commands]
    return [command for command in commands if command[1] not in INTERACTIVE]


def test_the_readme_shows_commands_that_exist(shared_host):
    known = shared_host.run("help").out
    for command in first_container() + daily_commands():
        assert command[0] == "sysctr"
        assert re.search(rf"^\s+{re.escape(command[1])}\b", known, re.MULTILINE), command


@pytest.mark.slow
def test_the_readme_leads_to_a_running_container_and_through_a_day(make_node, tmp_path):
    host = make_node("debian-12")
    key = tmp_path / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("hello\n")
    (tmp_path / "out").mkdir()
    ours = {"~/.ssh/id_ed25519.pub": f"{key}.pub", "./site": str(site), ".": str(tmp_path / "out")}

    def run(command: list[str]) -> str:
        return host.run(*[ours.get(word, word) for word in command[1:]]).out

    for command in first_container():
        if command[1] not in INTERACTIVE:
            run(command)
    host.run("exec", "web", "--", "mkdir", "-p", "/var/www", "/etc/nginx")
    ran = []
    for command in daily_commands():
        # The rest of the table stops it, or needs files of the reader's own.
        if command[1] in ("exec", "logs", "freeze", "thaw", "set", "config", "push", "pull", "protect",
                          "task", "info", "snapshot", "snapshots", "diff", "clone", "df"):  # fmt: skip
            run(command)
            ran.append(command[1])
    assert {"exec", "freeze", "thaw", "set", "push", "pull", "snapshot", "diff", "clone"} <= set(ran)
    assert host.run("exec", "web", "--", "cat", "/var/www/site/index.html").out == "hello\n"
    assert (tmp_path / "out" / "nginx").is_dir()
    assert host.run("destroy", "web", "--yes", "--force", check=False).status == 5, "it is protected"
    host.run("protect", "web", "--off")
    run(["sysctr", "rollback", "web", "before", "--yes"])
    host.wait("web", "booted")
    run(["sysctr", "shutdown", "web"])
    assert host.state("web") == "stopped"
