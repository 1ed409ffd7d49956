"""Configuration of real containers: options of create, set, edit, config, what waits and what is shown."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.node import Node
from tests.system.guests import Terminal, create, inside, new_name, refused, shell

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]

_SHORT = {
    "id", "name", "state", "booted", "template", "tags", "addresses", "uptime_s", "pid", "cpu_s",
    "memory_bytes", "memory_max_bytes", "pids", "onboot", "protected", "pending", "exit", "task",
}  # fmt: skip


def config_file(host: Node, name: str) -> Path:
    return Path(host.json("info", name)["config_file"])


def test_every_option_of_create_arrives(shared_host: Node, tmp_path: Path) -> None:
    key = tmp_path / "keys.pub"
    key.write_text("# two of them\nssh-ed25519 AAAAC3NzaC1lZDI1 one@host\nssh-rsa AAAAB3NzaC1yc2 two@host\n")
    (tmp_path / "secret").write_text("correct horse\n")
    name = create(
        shared_host, "--id", "150", "--cores", "1", "--cpu", "0.5", "--memory", "128M", "--swap", "64M",
        "--pids", "99", "--net", "name=eth0,mtu=1420", "--ssh-key", str(key), "--password-file",
        str(tmp_path / "secret"), "--env", "GREETING=hi = there", "--env", "EMPTY=", "--tag", "web",
        "--tag", "prod", "--onboot", "--set", "description=Web front end", "--set", "limits.cpu_weight=50",
    )  # fmt: skip
    info = shared_host.json("info", name)
    assert info["limits"] == {
        "cores": 1, "cpu": 0.5, "cpu_weight": 50, "memory": "128M", "swap": "64M", "pids": 99,
    }  # fmt: skip
    assert (info["id"], info["tags"], info["onboot"]) == (150, ["prod", "web"], True)
    assert info["description"] == "Web front end"
    assert info["state"] == "running"
    environment = shell(shared_host, name, "cat /proc/1/environ").out.split("\0")
    assert {"GREETING=hi = there", "EMPTY="} <= set(environment)
    assert inside(shared_host, name, "echo $GREETING") == "hi = there", "exec has it too"
    assert inside(shared_host, name, "cat /sys/class/net/eth0/mtu") == "1420"
    authorized = inside(shared_host, name, "cat /root/.ssh/authorized_keys").split("\n")
    assert [line.split()[-1] for line in authorized] == ["one@host", "two@host"]
    assert inside(shared_host, name, "stat -c %a /root/.ssh /root/.ssh/authorized_keys") == "700\n600"
    assert inside(shared_host, name, "grep -c '^root:[$]6[$]' /etc/shadow") == "1"
    password = (tmp_path / "secret").read_text().strip()
    for kept in (config_file(shared_host, name).read_text(), shared_host.logs()):
        assert password not in kept


def test_what_cannot_be_live_is_pending_until_the_restart(shared_host: Node) -> None:
    name = create(shared_host)
    done = shared_host.run("set", name, "environment.COLOUR=red", "net.0.mtu=1300", "description=now")
    assert sorted(done.out.splitlines()) == [
        "applied: description", "pending until the next start: environment.COLOUR",
        "pending until the next start: net.0.mtu",
    ]  # fmt: skip
    assert set(shared_host.json("info", name)["pending"]) == {"environment.COLOUR", "net.0.mtu"}
    listed = shared_host.run("config", name, "--pending").out.split()
    assert sorted(listed) == ["environment.COLOUR", "net.0.mtu"]
    assert "until the next start" in shared_host.run("info", name).out
    assert inside(shared_host, name, "cat /sys/class/net/eth0/mtu") == "1500"
    # Taking it back leaves nothing pending.
    shared_host.run("set", name, "--unset", "net.0.mtu")
    assert shared_host.json("info", name)["pending"] == ["environment.COLOUR"]
    shared_host.run("set", name, "net.0.mtu=1300")
    shared_host.run("reboot", name)
    assert shared_host.json("info", name)["pending"] == []
    assert shared_host.run("config", name, "--pending").out == ""
    assert inside(shared_host, name, "cat /sys/class/net/eth0/mtu") == "1300"
    assert "COLOUR=red" in shell(shared_host, name, "cat /proc/1/environ").out.split("\0")


def test_what_is_set_while_it_is_stopped_is_not_pending(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    shared_host.run("set", name, "net.0.mtu=1300")
    assert shared_host.json("info", name)["pending"] == []


def test_set_keeps_the_admins_comments_and_order(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    path = config_file(shared_host, name)
    written = "# ask Eve before touching this\n" + path.read_text() + "\n# the end\n"
    path.write_text(written)
    shared_host.run("set", name, "memory=64M", "onboot=true")
    kept = path.read_text()
    assert "# ask Eve before touching this" in kept.split("\n")[0]
    assert "# the end" in kept
    assert shared_host.json("info", name)["limits"]["memory"] == "64M"
    assert shared_host.run("config", name).out == kept
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_edited_by_hand_counts(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    path = config_file(shared_host, name)
    path.write_text(path.read_text().replace(f'name = "{name}"', f'name = "{name}"\ntags = ["by-hand"]'))
    assert [entry["name"] for entry in shared_host.json("list", "--tag", "by-hand")] == [name]
    path.write_text(path.read_text() + "\n[limits]\nmemroy = 3\n")
    done = shared_host.run("start", name, check=False)
    assert done.status != 0
    assert shared_host.state(name) == "stopped", "the others are listed, and so is the damaged one"
    problem = shared_host.json("info", name)["error"]
    assert problem
    assert problem.split(":")[0] in shared_host.run("doctor", check=False).out
    # What is damaged can still be destroyed.
    shared_host.run("destroy", "--yes", name)


def test_edit_changes_the_file_and_offers_another_try(shared_host: Node, tmp_path: Path) -> None:
    name = create(shared_host, start=False)
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i "1i description = \\"edited\\" # why not" "$1"\n')
    editor.chmod(0o755)
    with Terminal(shared_host, "edit", name, env={"EDITOR": str(editor)}) as one:
        one.expect("applied: description")
        assert one.end() == 0
    assert 'description = "edited" # why not' in config_file(shared_host, name).read_text()
    editor.write_text('#!/bin/sh\nsed -i "1i descriptoin = 1" "$1"\n')
    with Terminal(shared_host, "edit", name, env={"EDITOR": str(editor)}) as one:
        one.expect("description")
        one.expect("edit it again? [Y/n] ")
        one.type("n\r")
        shown = one.expect("it is kept in ") + one.expect(".toml")
        assert one.end() == 2
    kept = re.search(rb"kept in (\S+\.toml)", shown)[1].decode()
    assert "descriptoin" in Path(kept).read_text()
    Path(kept).unlink()
    assert "descriptoin" not in config_file(shared_host, name).read_text()
    editor.write_text("#!/bin/sh\n")
    with Terminal(shared_host, "edit", name, env={"EDITOR": str(editor)}) as one:
        one.expect("nothing was changed")
        assert one.end() == 0


def test_an_unknown_key_names_the_nearest(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    for wrong, near in (("limits.memroy=1G", "limits.memory"), ("descritpion=x", "description")):
        done = refused(shared_host, 2, wrong.split("=")[0], "set", name, wrong)
        assert near in done.err, done
    wrong = ["create", new_name(), "--template", "tiny", "--set", "limits.memori=1"]
    refused(shared_host, 2, "limits.memory", *wrong)
    assert "memr" not in shared_host.run("config", name).out


def test_the_template_is_settled_at_creation(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    refused(shared_host, 2, "it is settled when the container is created", "set", name, "template=debian-12")


def test_rename_keeps_all_but_the_name(shared_host: Node) -> None:
    name, other = create(shared_host), create(shared_host, start=False)
    before = shared_host.json("info", name)
    new = new_name("renamed")
    refused(shared_host, 4, other, "rename", name, other)
    shared_host.run("rename", name, new)
    after = shared_host.json("info", new)
    same = {"id", "uuid", "pid", "addresses", "nets", "idmap", "limits", "template", "volume", "created"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    refused(shared_host, 3, name, "info", name)
    shared_host.run("reboot", new)
    assert inside(shared_host, new, "hostname") == new


def test_list_status_and_info_speak_json(host: Node) -> None:
    running, stopped = create(host, "--tag", "web"), create(host, start=False)
    listed = host.json("list")
    assert [entry["name"] for entry in listed] == [running, stopped]
    for entry in listed:
        assert set(entry) >= _SHORT
    on, off = listed
    assert on["state"] == "running"
    assert all(on[key] > 0 for key in ("pid", "memory_bytes", "pids"))
    assert (off["state"], off["pid"], off["memory_bytes"], off["uptime_s"]) == ("stopped", None, None, None)
    assert [entry["name"] for entry in host.json("list", "--running")] == [running]
    assert [entry["name"] for entry in host.json("list", "--tag", "web")] == [running]
    assert host.run("list", "-q").out == "100\n101\n"
    assert host.json("status", running) == {
        "id": 100, "name": running, "state": "running", "booted": None, "exit": None, "task": None,
        "away": None,
    }  # fmt: skip
    info = host.json("info", "101")
    assert set(info) >= _SHORT | {"uuid", "created", "idmap", "limits", "nets", "init", "volume"}
    assert set(host.json("config", running)) >= {"toml", "config", "pending", "digest"}
    for command in (["version"], ["doctor"], ["daemon", "status"]):
        assert json.loads(host.run(*command, "--json", check=False).stdout)


def test_tasks_are_listed_shown_and_cancelled(host: Node) -> None:
    name = create(host, start=False)
    started = host.run("start", "--no-wait", name).out.strip()
    host.wait(name, "running")
    shown = host.json("task", "show", started)
    assert (shown["kind"], shown["container"], shown["id"]) == ("start", 100, started)
    assert [task["kind"] for task in host.json("task", "list")][-2:] == ["create", "start"]
    refused(host, 3, "abcdefabcdef", "task", "show", "abcdefabcdef")
    # A shutdown that waits is there to be cancelled; the container runs on.
    host.run("set", name, "stop_signal=SIGURG")
    waiting = host.run("shutdown", "--no-wait", "--timeout", "300", name).out.strip()
    done = refused(host, 4, "shutdown", "stop", name)
    assert waiting in done.err or "busy" in done.err or "shutdown" in done.err
    assert host.json("task", "list", "--state", "running")[0]["id"] == waiting
    host.run("task", "cancel", waiting)
    status, answer = host.api("GET", f"/1/tasks/{waiting}/wait?timeout=20")
    assert (status, answer["task"]["state"]) == (200, "cancelled")
    assert host.state(name) == "running"
    host.run("stop", "--kill", name)
    assert host.run("task", "list", "-q").out.split()[-1] != waiting


def test_a_card_that_is_taken_out_gives_its_address_back(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    [address] = shared_host.json("info", name)["addresses"]
    shared_host.run("set", name, "net.0=")
    assert shared_host.json("info", name)["addresses"] == []
    shared_host.run("set", name, f"net.0=name=eth0,ip={address}/24")
    shared_host.run("start", name)
    shared_host.run("set", name, "net.0=")
    assert shared_host.json("info", name)["addresses"] == [address], "it runs with it until its restart"
    shared_host.run("reboot", name)
    assert shared_host.json("info", name)["addresses"] == []
    shared_host.run("destroy", "--yes", "--force", name)


def test_several_changes_at_once_are_all_made(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    changes = [
        *(("set", name, f"environment.V{number}={number}") for number in range(4)),
        *(("mount", "add", name, f"target=/m{number},tmpfs") for number in range(3)),
        ("rename", name, f"{name}-2"), ("start", name),
    ]  # fmt: skip
    # By number: one of them changes the name.
    number = str(shared_host.json("info", name)["id"])
    running = [
        shared_host.popen(
            *(number if word == name else word for word in words), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for words in changes
    ]  # fmt: skip
    said = [one.communicate(timeout=60)[1] for one in running]
    assert [one.returncode for one in running] == [0] * len(changes), said
    info = shared_host.json("info", number)
    assert info["environment"] == {f"V{value}": str(value) for value in range(4)}
    assert {mount["target"] for mount in info["mounts"]} == {"/m0", "/m1", "/m2"}
    assert (info["name"], info["state"]) == (f"{name}-2", "running")
    shared_host.run("destroy", number, "--force", "--yes")
