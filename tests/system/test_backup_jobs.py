"""Backup jobs on a real host: they make archives, prune them, make up for what was missed, and tell."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.node import Node, kill
from tests.system.guests import Terminal, create, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "busybox")]


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    directory = tmp_path / "dump"
    directory.mkdir()
    return directory


def archives(host: Node, dump: Path) -> list[dict]:
    return host.json("backups", "--dir", str(dump))


def job(host: Node, name: str) -> dict:
    return host.json("backup", "job", "show", name)


def test_a_job_backs_up_prunes_and_shows_when_it_did(shared_host: Node, dump: Path) -> None:
    host = shared_host
    running, stopped = create(host, "--tag", "prod"), create(host, "--tag", "prod", start=False)
    shell(host, running, "echo kept > /root/file")
    added = host.run(
        "backup", "job", "add", "nightly", "--tag", "prod", "--dir", str(dump), "--keep-last", "1",
        "--compress", "gzip", "--notes", "{{guestname}} ({{vmid}})", "--exclude", "/tmp/*",
    )  # fmt: skip
    assert added.out.startswith("added nightly, next run ")
    listed = host.json("backup", "job", "list")
    assert [(one["name"], one["state"], one["last_success"]) for one in listed] == [("nightly", "", None)]
    assert host.run("backup", "job", "run", "nightly").out == "ran nightly: 2 containers backed up\n"
    first = archives(host, dump)
    assert [(one["container_name"], one["compress"]) for one in first] == [
        (running, "gzip"), (stopped, "gzip")
    ]  # fmt: skip
    assert [one["notes"] for one in first] == [
        f"{one['container_name']} ({one['container']})" for one in first
    ]
    names = host.shell("tar", "tf", first[0]["path"]).out.splitlines()
    assert names[0] == "./etc/vzdump/pct.conf"
    assert "./root/file" in names
    # Of each container one is kept, and always the newest.
    host.run("backup", "protect", first[1]["path"])
    host.run("backup", "job", "run", "nightly")
    second = archives(host, dump)
    assert [one["container_name"] for one in second] == [running, stopped, stopped]
    assert not {first[0]["path"]} & {one["path"] for one in second}
    for ref in (running, stopped):
        last = host.json("info", ref)["last_backup"]
        assert last["archive"] in [one["path"] for one in second]
        assert time.time() - last["time"] < 60
        assert last in [one["last_backup"] for one in host.json("list")]
        assert "last backup:" in host.run("info", ref).out
    summary = {one["name"]: one for one in host.json("backups", "--summary")}
    # Those of a directory that only a job names are known too.
    assert summary[stopped]["archives"] == 2
    shown = job(host, "nightly")
    assert (shown["state"], len(shown["done"])) == ("done", 2)
    refused(host, 4, "there is one of this name", "backup", "job", "add", "nightly", "--all")
    host.run("backup", "job", "remove", "nightly")
    assert host.json("backup", "job", "list") == []
    assert archives(host, dump) == second
    refused(host, 3, "cannot find backup job nightly", "backup", "job", "run", "nightly")
    for ref in (running, stopped):
        host.run("destroy", ref, "--yes", "--force")


def test_a_failure_is_told_and_the_others_are_backed_up(
    shared_host: Node, dump: Path, tmp_path: Path
) -> None:
    host = shared_host
    good, bad = create(host, start=False), create(host, start=False)
    script = tmp_path / "alarm"
    script.write_text(f'#!/bin/sh\necho "$1: $SYSCTR_JOB $SYSCTR_NAME $SYSCTR_ERROR" >> {tmp_path}/told\n')
    script.chmod(0o755)
    host.run(
        "backup", "job", "add", "alarmed", bad, good, "--dir", str(dump), "--on-failure", f"{script} 'a b'"
    )
    number = host.json("info", bad)["id"]
    config = Path(host.layout.container_config(number))
    text = config.read_text()
    config.write_text(text + "nonsense = 1\n")
    done = refused(host, 1, f"cannot run backup job alarmed: {bad} ({number}): cannot back up",
                   "backup", "job", "run", "alarmed")  # fmt: skip
    assert "nonsense" in done.err
    assert [one["container_name"] for one in archives(host, dump)] == [good]
    told = (tmp_path / "told").read_text()
    assert told.startswith(f"a b: alarmed {bad} ({number}) cannot back up ")
    shown = job(host, "alarmed")
    assert (shown["state"], [one["container"] for one in shown["failures"]]) == ("failed", [number])
    _, answer = host.api("GET", "/1/doctor")
    check = next(one for one in answer["checks"] if one["check"] == "backup job alarmed")
    assert (check["state"], check["detail"]) == ("fail", "its last run failed")
    _, answer = host.api("GET", "/1/containers")
    assert any("backup job alarmed: its last run failed" in notice for notice in answer["notices"])
    config.write_text(text)
    host.run("backup", "job", "run", "alarmed")
    assert job(host, "alarmed")["failures"] == []
    dump.rename(tmp_path / "away")
    refused(host, 1, f"{dump}: it does not exist", "backup", "job", "run", "alarmed")
    assert not dump.exists()
    host.run("backup", "job", "remove", "alarmed")


def test_what_was_missed_while_the_host_was_off_is_made_up_for_once(host: Node, dump: Path) -> None:
    ref = create(host, start=False)
    host.run("backup", "job", "add", "hourly", ref, "--schedule", "hourly", "--dir", str(dump))
    assert job(host, "hourly")["state"] == ""
    kill(host.pids()["daemon"])
    state = Path(host.layout.backup_runs) / "hourly.json"
    told = json.loads(state.read_text())
    state.write_text(json.dumps({**told, "since": time.time() - 5 * 3600}))
    host.run("daemon", "start")
    wait_until(lambda: job(host, "hourly")["state"] == "done", 60)
    assert len(archives(host, dump)) == 1
    host.run("daemon", "restart")
    assert job(host, "hourly")["next_run"] > time.time()
    assert len(archives(host, dump)) == 1
    assert [task["kind"] for task in host.json("task", "list")].count("backup-run") == 1


def test_a_daemon_that_is_killed_in_a_run_leaves_the_rest_of_it_to_the_next(host: Node, dump: Path) -> None:
    refs = [create(host, start=False) for _ in range(3)]
    host.run("backup", "job", "add", "all", "--all", "--dir", str(dump))
    host.run("daemon", "stop")
    host.run("daemon", "start", env={"SYSCTR_FAULT": "backup.renamed:2"})
    daemon = host.pids()["daemon"]
    # Who waits for it asks the next daemon, and starts that.
    host.run("backup", "job", "run", "all", check=False)
    wait_until(lambda: host.pids().get("daemon") != daemon, 30)
    host.run("daemon", "start")
    wait_until(lambda: job(host, "all")["state"] == "done", 60)
    # The second one was complete, but nobody had noted that.
    assert sorted(one["container_name"] for one in archives(host, dump)) == sorted([*refs, refs[1]])
    assert not [name for name in os.listdir(dump) if name.endswith(".dat")]


def test_a_job_is_edited_with_its_mistakes_told(shared_host: Node, dump: Path, tmp_path: Path) -> None:
    host = shared_host
    ref = create(host, start=False)
    host.run("backup", "job", "add", "edited", ref, "--dir", str(dump))
    path = Path(job(host, "edited")["file"])
    assert path.read_text().startswith("# Backup job edited of sysctr.")
    path.write_text(path.read_text() + 'schedul = "off"\n')
    shown = host.run("backup", "job", "list")
    assert "mistake" in shown.out
    assert "no such key, the nearest is schedule" in shown.err
    refused(host, 2, "the nearest is schedule", "backup", "job", "run", "edited")
    path.write_text(path.read_text().replace("schedul ", "schedule "))
    assert job(host, "edited")["schedule"] == "off"
    refused(host, 2, "there is no terminal", "backup", "job", "edit", "edited")
    refused(host, 3, "there is no container nobody", "backup", "job", "add", "x", "nobody")
    refused(
        host, 2, "on_failure: there is no program", "backup", "job", "add", "x", ref, "--on-failure", "/no"
    )
    refused(host, 3, "it does not exist", "backup", "job", "add", "x", ref, "--dir", f"{tmp_path}/none")
    assert host.run("_words", "jobs").out == "edited\n"
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i "s/off/weekly sun 22:00/" "$1"\n')
    editor.chmod(0o755)
    with Terminal(host, "backup", "job", "edit", "edited", env={"EDITOR": str(editor)}) as one:
        one.expect("changed edited, next run ")
        assert one.end() == 0
    assert job(host, "edited")["schedule"] == "weekly sun 22:00"
    host.run("backup", "job", "remove", "edited")
