"""Snapshots and rollback, on every storage driver: what is kept, what comes back, and what is refused."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.disk import disk, fill
from tests.node import Node, TemplateStore, kill
from tests.system.guests import Terminal, inside, refused, shell
from tests.system.pools import Kept
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]


def test_a_stopped_container_goes_back_to_any_snapshot_and_the_others_stay(kept: Kept) -> None:
    ref = kept.create()
    for number in (1, 2, 3):
        kept.write(ref, "/root/file", str(number))
        kept.host.run("snapshot", ref, f"at-{number}", "--description", f"number {number}")
    kept.write(ref, "/root/file", "4")
    for number in (1, 3, 2):
        kept.host.run("rollback", ref, f"at-{number}", "--yes")
        assert kept.read(ref, "/root/file") == str(number)
        assert kept.names(ref) == ["at-1", "at-2", "at-3"]
        assert kept.host.json("snapshots", ref)["parent"] == f"at-{number}"
    shown = kept.host.json("snapshots", ref)["snapshots"]
    assert [one["parent"] for one in shown] == ["", "at-1", "at-2"]
    assert [one["description"] for one in shown] == ["number 1", "number 2", "number 3"]
    assert kept.host.json("info", ref)["snapshots"] == 3
    assert kept.leftovers() == []
    # What was rolled back is deleted, and not only when something else is.
    wait_until(lambda: os.listdir(f"{kept.directory}/.trash") == [])


def test_a_rollback_restores_the_configuration_and_the_identity_stays(kept: Kept) -> None:
    ref = kept.create("--memory", "128M")
    before = kept.host.json("info", ref)
    kept.host.run("snapshot", ref, "first")
    kept.host.run("set", ref, "limits.memory=64M", "description=changed", "net.1=name=eth1,ip=managed")
    kept.host.run("rollback", ref, "first", "--yes")
    after = kept.host.json("info", ref)
    assert after["limits"]["memory"] == "128M"
    assert after["description"] == ""
    assert [nic["mac"] for nic in after["nets"]] == [nic["mac"] for nic in before["nets"]]
    assert after["addresses"] == before["addresses"]
    assert after["uuid"] == before["uuid"]
    assert after["generation"] == before["generation"] + 1
    assert after["idmap"] == before["idmap"]


def test_a_running_container_is_paused_for_a_moment_and_runs_again_after_a_rollback(kept: Kept) -> None:
    ref = kept.create(start=True)
    shell(kept.host, ref, "echo before > /root/file; mkdir /root/d; ln -s x /root/l; chmod 4750 /root/file")
    pid = kept.host.json("info", ref)["pid"]
    done = kept.host.run("snapshot", ref, "running")
    assert "paused for" in done.out
    assert kept.host.json("info", ref)["pid"] == pid
    assert kept.host.state(ref) == "running"
    shell(kept.host, ref, "echo after > /root/file; rmdir /root/d; rm /root/l; echo > /root/more; sync")
    kept.host.run("rollback", ref, "running", "--yes")
    assert kept.host.state(ref) == "running"
    found = inside(kept.host, ref, "cat /root/file; ls /root; stat -c %a /root/file; readlink /root/l")
    assert found.split() == ["before", "d", "file", "l", "4750", "x"]
    kept.host.run("stop", ref, "--kill")
    assert kept.host.json("snapshots", ref)["snapshots"][0]["running"] is True


def test_a_frozen_container_stays_frozen(kept: Kept) -> None:
    ref = kept.create(start=True)
    kept.host.run("freeze", ref)
    kept.host.run("snapshot", ref, "cold")
    assert kept.host.state(ref) == "frozen"
    kept.host.run("thaw", ref)
    assert inside(kept.host, ref, "echo on") == "on"
    kept.host.run("stop", ref, "--kill")


def test_what_cannot_be_is_refused_with_the_reason(kept: Kept) -> None:
    host, ref = kept.host, kept.create()
    host.run("snapshot", ref, "before")
    refused(host, 4, "before already", "snapshot", ref, "before")
    refused(host, 3, "there is none of this name", "snapshot", "nobody")
    for name in ("../x", "a/b", "-a", "A", "tmp-1", "now", "x" * 64, "ü", "a b"):
        refused(host, 2, "", "snapshot", ref, *([] if name[0] != "-" else ["--"]), name)
    words = "cannot let the snapshot x expire: 'soon' is not a time"
    refused(host, 2, words, "snapshot", ref, "x", "--expires", "soon")
    refused(host, 3, "did you mean before", "rollback", ref, "befor", "--yes")
    refused(host, 2, "add --yes", "rollback", ref, "before")
    refused(host, 3, "cannot find snapshot", "delsnapshot", ref, "before", "nothing")
    refused(host, 2, "give names, or --all", "delsnapshot", ref)
    host.run("protect", ref)
    refused(host, 5, "it is protected", "rollback", ref, "before", "--yes")
    host.run("protect", ref, "--off")
    assert kept.names(ref) == ["before"]


def test_rollback_says_what_is_lost_and_asks_for_the_name(kept: Kept) -> None:
    ref = kept.create()
    kept.host.run("snapshot", ref, "old")
    kept.write(ref, "/root/file", "new")
    for typed, expected in (("no", "new"), (ref, None)):
        with Terminal(kept.host, "rollback", ref, "old") as terminal:
            said = terminal.expect("type its name to go on: ")
            assert b"is lost" in said
            terminal.type(f"{typed}\r")
            assert terminal.end() == (1 if typed == "no" else 0)
        assert kept.read(ref, "/root/file") == expected


def test_a_name_that_another_has_meanwhile_is_not_taken_from_it(kept: Kept) -> None:
    ref = kept.create()
    kept.host.run("snapshot", ref, "first")
    kept.host.run("rename", ref, f"{ref}-renamed")
    other = kept.create()
    kept.host.run("rename", other, ref)
    done = kept.host.run("rollback", f"{ref}-renamed", "first", "--yes")
    assert "another container's now" in done.err
    assert {one["name"] for one in kept.host.json("list")} >= {ref, f"{ref}-renamed"}


def test_several_at_once_and_names_of_the_time(kept: Kept) -> None:
    refs = [kept.create("--tag", "group"), kept.create("--tag", "group")]
    kept.host.run("snapshot", "--tag", "group", "together")
    assert [kept.names(ref) for ref in refs] == [["together"], ["together"]]
    for _ in range(3):
        kept.host.run("snapshot", refs[0])
    assert [name[:6] for name in kept.names(refs[0])] == ["togeth", "snap-2", "snap-2", "snap-2"]
    kept.host.run("delsnapshot", refs[0], "--all")
    assert kept.names(refs[0]) == []


def test_volumes_of_its_own_go_with_the_root(kept: Kept) -> None:
    ref = kept.create("--set", kept.mount(0, "/data"), start=True)
    shell(kept.host, ref, "echo old > /data/file; echo old > /root/file")
    kept.host.run("snapshot", ref, "running")
    kept.host.run("stop", ref, "--kill")
    kept.host.run("snapshot", ref, "stopped")
    kept.host.run("start", ref)
    shell(kept.host, ref, "echo new > /data/file; echo new > /root/file")
    kept.host.run("set", ref, kept.mount(1, "/more"))
    for name in ("running", "stopped"):
        done = kept.host.run("rollback", ref, name, "--yes")
        assert "is no part of the snapshot and is kept" in done.err
        assert inside(kept.host, ref, "cat /data/file /root/file").split() == ["old", "old"]
        assert shell(kept.host, ref, "ls /more", check=False).status != 0
    kept.host.run("delsnapshot", ref, "--all")
    assert kept.leftovers() == []
    number = kept.host.json("info", ref)["id"]
    kept.host.run("destroy", ref, "--yes", "--force")
    assert not [name for name in kept.volumes() if name.startswith(f"{number}-")]


def test_a_volume_of_a_snapshot_that_is_gone_forbids_the_rollback(kept: Kept) -> None:
    ref = kept.create("--set", kept.mount(0, "/data"))
    kept.host.run("snapshot", ref, "whole")
    number = kept.host.json("info", ref)["id"]
    kill(kept.host.pids()["daemon"])
    shutil.move(f"{kept.directory}/volumes/{number}-disk0", f"{kept.directory}/aside")
    kept.host.run("daemon", "start")
    refused(kept.host, 5, "is gone", "rollback", ref, "whole", "--yes")
    assert kept.names(ref) == ["whole"]
    shutil.rmtree(f"{kept.directory}/aside")
    kept.host.run("destroy", ref, "--yes")


def test_a_container_that_is_busy_is_not_rolled_back(kept: Kept) -> None:
    ref = kept.create(start=True)
    kept.host.run("snapshot", ref, "before")
    # Its init ignores what should end it.
    task = kept.host.run("shutdown", ref, "--timeout", "60", "--no-wait").out.strip()
    done = kept.host.run("rollback", ref, "before", "--yes", check=False)
    kept.host.run("task", "cancel", task, check=False)
    if done.status:
        assert done.status == 4, done
        assert "is running" in done.err
    wait_until(lambda: not kept.host.json("info", ref)["task"], 30)
    kept.host.run("destroy", ref, "--yes", "--force")


def test_a_damaged_snapshot_is_listed_refused_and_deleted(kept: Kept) -> None:
    ref = kept.create()
    kept.host.run("snapshot", ref, "good")
    kept.host.run("snapshot", ref, "bad")
    number = kept.host.json("info", ref)["id"]
    Path(f"{kept.directory}/volumes/{number}/snapshots/bad.json").write_text("{")
    shown = {one["name"]: one["error"] for one in kept.host.json("snapshots", ref)["snapshots"]}
    assert shown["good"] == ""
    assert "damaged" in shown["bad"]
    refused(kept.host, 1, "is damaged", "rollback", ref, "bad", "--yes")
    kept.host.run("rollback", ref, "good", "--yes")
    kept.host.run("delsnapshot", ref, "bad")
    assert kept.names(ref) == ["good"]


def test_destroy_takes_the_snapshots_with_it(kept: Kept) -> None:
    ref = kept.create(start=True)
    kept.host.run("snapshot", ref, "one")
    kept.host.run("stop", ref, "--kill")
    kept.host.run("snapshot", ref, "two")
    number = str(kept.host.json("info", ref)["id"])
    kept.host.run("destroy", ref, "--yes")
    assert not [name for name in kept.volumes() if number in name.replace("-", ".").split(".")]
    assert kept.leftovers() == []


def test_the_changes_since_a_snapshot_and_since_the_template(kept: Kept) -> None:
    ref = kept.create(start=True)
    shell(
        kept.host, ref, "cd /root; echo 1 > same; echo 1 > changed; echo 1 > gone; echo 1 > type; mkdir dir"
    )
    kept.host.run("snapshot", ref, "before")
    shell(
        kept.host, ref,
        "cd /root; echo 2 > changed; rm gone type; ln -s x type; echo > dir/added; printf x > 'odd\x01name'",
    )  # fmt: skip
    done = kept.host.run("diff", ref, "before")
    lines = done.out.splitlines()
    assert lines[:-1] == [
        "M /root/changed", "A /root/dir/added", "D /root/gone", "A /root/odd\\x01name", "T /root/type",
    ]  # fmt: skip
    assert "since before: 2 added, 1 modified, 1 deleted, 1 of another type" in lines[-1]
    kept.host.run("stop", ref, "--kill")
    found = kept.host.json("diff", ref)["result"]["changes"]
    assert ["A", "/root/same"] in found
    assert not [path for _, path in found if path == "/bin/busybox"]
    assert kept.leftovers() == []


def test_a_snapshot_that_expires_is_deleted_by_itself(kept: Kept) -> None:
    ref = kept.create()
    kept.host.run("snapshot", ref, "stays", "--expires", "7d")
    kept.host.run("snapshot", ref, "goes", "--expires", "1s")
    wait_until(lambda: kept.names(ref) == ["stays"], 30, "end of the snapshot")


def test_a_schedule_makes_up_for_what_was_missed_once_and_prunes_only_its_own(kept: Kept) -> None:
    ref = kept.create()
    kept.host.run("snapshot", ref, "mine")
    number = kept.host.json("info", ref)["id"]
    kept.host.run("set", ref, "snapshot.schedule=hourly", "snapshot.keep_last=1")
    first = wait_until(lambda: [name for name in kept.names(ref) if name.startswith("auto-")], 30)
    assert len(first) == 1
    # As if the daemon had not run for five hours.
    kill(kept.host.pids()["daemon"])
    record = Path(f"{kept.directory}/volumes/{number}/snapshots/{first[0]}.json")
    told = json.loads(record.read_text())
    told["created"] = time.time() - 5 * 3600
    record.write_text(json.dumps(told))
    kept.host.run("daemon", "start")
    wait_until(lambda: kept.names(ref) == ["mine", *set(kept.names(ref)) - {"mine", *first}], 30)
    kept.host.run("set", ref, "snapshot.schedule=off")
    kinds = [task["kind"] for task in kept.host.json("task", "list") if task["container"] == number]
    assert kinds.count("snapshot") == 3, kinds
    assert os.path.exists(f"{kept.directory}/volumes/{number}")


def test_a_full_disk_takes_no_snapshot_and_gives_back_its_space(
    templates: TemplateStore, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    with disk(str(place), "ext4"), Node(keep=pytestconfig.getoption("keep")) as host:
        templates.give(host, "tiny")
        host.run("pool", "add", "small", "--driver", "overlay", "--path", f"{place}/pool")
        kept = Kept(host, "overlay", "small", f"{place}/pool")
        ref = kept.create()
        kept.write(ref, "/root/file", "old")
        host.run("snapshot", ref, "old")
        kept.write(ref, "/root/file", "new")
        fill(str(place))
        refused(host, 1, "o space left", "snapshot", ref, "second")
        refused(host, 1, "o space left", "rollback", ref, "old", "--yes")
        refused(host, 1, "o space left", "clone", ref, "second")
        assert kept.names(ref) == ["old"]
        assert kept.leftovers() == []
        host.run("delsnapshot", ref, "old")
        assert kept.names(ref) == []
        for filler in place.glob("filler-*"):
            filler.unlink()
        assert kept.read(ref, "/root/file") == "new"
        host.run("start", ref)
        host.run("snapshot", ref, "again")
        logs = host.logs()
        assert "Traceback" not in logs, logs
