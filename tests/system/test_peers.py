"""Trust between two hosts that share nothing but a token: made, kept, limited and ended."""

import base64
import contextlib
import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from tests.node import Node, cable
from tests.wait import wait_until

pytestmark = pytest.mark.root

LEFT, RIGHT = "192.0.2.1", "192.0.2.2"


def token(node: Node, *options: str) -> str:
    """Return a new token of a node."""
    return node.run("peer", "token", *options).out.strip()


def joined(issuer: Node, joiner: Node) -> tuple[str, str]:
    """Make two nodes trust each other; return what the issuer is called there, and the joiner here."""
    name = joiner.json("peer", "join", token(issuer))["name"]
    [other] = issuer.json("peer", "list")
    return name, other["name"]


def listening(node: Node) -> set[str]:
    """Return where anybody listens on TCP in the node's network, but for its own name server."""
    found = node.shell("ss", "-H", "-l", "-t", "-n").out
    return {line.split()[3] for line in found.splitlines() if not line.split()[3].endswith(":53")}


def secret_of(text: str) -> str:
    body = text.removeprefix("sysctr1.")
    return json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["secret"]


def test_one_token_makes_both_trust_each_other_and_holds_once(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    assert left.json("peer", "list") == []
    assert listening(left) == listening(right) == set()

    text = token(left)
    assert listening(left) == {"*:8645"}
    assert listening(right) == set()
    peer = right.json("peer", "join", "-", "--name", "first", stdin=text.encode())
    assert (peer["name"], peer["addresses"]) == ("first", [f"{LEFT}:8645"])
    assert [one["name"] for one in right.json("peer", "list")] == ["first"]
    [other] = left.json("peer", "list")
    assert other["addresses"] == [f"{RIGHT}:8645"]
    assert [other[name] for name in ("may_send", "may_receive", "may_pull", "pools")] == [True] * 3 + [[]]
    for node, ref in ((left, other["name"]), (right, "first")):
        shown = node.json("peer", "show", ref)
        assert shown["reachable"], shown["error"]
        assert shown["kernel"] == os.uname().release
    assert re.search(r"first +192.0.2.1:8645 +send,receive,pull", right.run("peer", "list").out)

    again = right.run("peer", "join", text, check=False)
    assert (again.status, "the token was used already" in again.err) == (5, True)
    wrong = text.removeprefix("sysctr1.")
    content = json.loads(base64.urlsafe_b64decode(wrong + "=" * (-len(wrong) % 4)))
    content["secret"] = "A" * 43
    forged = "sysctr1." + base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
    refused = right.run("peer", "join", forged, check=False)
    assert (refused.status, "the token is not one of this host" in refused.err) == (5, True)
    own = left.run("peer", "join", token(left), check=False)
    assert (own.status, "this host made the token" in own.err) == (2, True)
    for broken in ("nonsense", text[:-20], "sysctr1.", "sysctr1." + "A" * 20):
        done = right.run("peer", "join", broken, check=False)
        assert done.status == 2
        assert broken not in done.err
    assert len(left.json("peer", "list")) == len(right.json("peer", "list")) == 1

    # To join once more is no harm: it is the same host, with the same name and limits.
    left.run("peer", "restrict", other["name"], "--send", "no")
    assert right.json("peer", "join", token(left))["name"] == "first"
    [now] = left.json("peer", "list")
    assert (now["name"], now["may_send"]) == (other["name"], False)


def test_an_expired_token_and_one_of_a_host_that_is_another_now(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    made = left.json("peer", "token", "--expires", "2s")
    assert listening(left) == {"*:8645"}
    # Nobody can come any more, so nobody is listened to.
    wait_until(lambda: listening(left) == set(), 20, "the end of listening")
    nobody = right.run("peer", "join", made["token"], check=False)
    assert (nobody.status, "connection refused" in nobody.err) == (1, True)

    text = token(left)
    late = right.run("peer", "join", made["token"], check=False)
    assert (late.status, "the token has expired" in late.err) == (5, True)
    assert left.json("peer", "list") == right.json("peer", "list") == []
    left.run("peer", "rotate")
    listening_again = token(left)
    done = right.run("peer", "join", text, check=False)
    assert done.status == 5, done
    assert "another host answers" in done.err
    right.run("peer", "join", listening_again)


def test_names_limits_and_the_end_of_trust(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    issuer, joiner = joined(left, right)
    left.run("peer", "rename", joiner, "paris")
    assert left.run("peer", "list", "-q").out == "paris\n"
    assert left.run("peer", "rename", "paris", "token", check=False).status == 2
    assert left.run("peer", "rename", "paris", "../x", check=False).status == 2
    assert left.run("peer", "show", joiner, check=False).status == 3

    done = left.run("peer", "restrict", "paris", "--send", "no", "--pool", "default")
    assert done.out == "paris may receive,pull; pools: default\n"
    assert left.run("peer", "restrict", "paris", "--pool", "none", check=False).status == 3
    assert left.run("peer", "restrict", "paris", check=False).status == 2
    left.run("daemon", "restart")
    [kept] = left.json("peer", "list")
    assert (kept["name"], kept["may_send"], kept["pools"]) == ("paris", False, ["default"])
    assert left.json("peer", "restrict", "paris", "--pool", "all")["pools"] == []

    left.run("peer", "remove", "paris")
    assert left.json("peer", "list") == right.json("peer", "list") == []
    wait_until(lambda: listening(left) == listening(right) == set(), what="the end of listening")
    assert os.listdir(left.layout.peers) == os.listdir(right.layout.peers) == []

    # Removed on one side alone, the other one learns of it in words.
    issuer, joiner = joined(left, right)
    right.run("daemon", "stop")
    away = left.run("peer", "remove", joiner, check=False)
    assert (away.status, "--force" in away.err) == (1, True)
    left.run("peer", "remove", joiner, "--force")
    joined_another = token(left)
    shown = right.json("peer", "show", issuer)
    assert not shown["reachable"]
    assert "does not trust this host" in shown["error"]
    assert joined_another
    right.run("peer", "remove", issuer)
    assert right.json("peer", "list") == []


def test_trust_survives_daemons_and_new_keys(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    issuer, joiner = joined(left, right)
    for node in two_nodes:
        node.run("daemon", "restart")
        assert listening(node) == {"*:8645"}
    assert right.json("peer", "show", issuer)["reachable"]
    assert left.json("peer", "show", joiner)["reachable"]

    before = right.json("peer", "show", issuer)
    answer = left.json("peer", "rotate")
    assert answer["waits_for"] == []
    after = right.json("peer", "show", issuer)
    assert after["reachable"], after["error"]
    assert after["fingerprint"] == answer["fingerprint"] != before["fingerprint"]
    assert after["id"] == before["id"]

    # With the other one down, the old key counts until it is back and was told.
    right.run("daemon", "stop")
    answer = left.json("peer", "rotate")
    assert (answer["waits_for"], answer["fingerprint"]) == ([joiner], after["fingerprint"])
    left.run("daemon", "restart")
    right.run("daemon", "start")
    assert right.json("peer", "show", issuer)["reachable"]
    wait_until(
        lambda: right.json("peer", "show", issuer)["fingerprint"] == answer["next"], 40, "the new key"
    )
    assert left.json("peer", "show", joiner)["reachable"]
    assert not os.path.exists(f"{left.layout.peer}/next.pem")


def test_it_listens_where_it_is_told_and_not_at_all_if_told(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    made = left.json("peer", "token", "--listen", f"{LEFT}:8700")
    assert made["addresses"] == [f"{LEFT}:8700"]
    assert listening(left) == {f"{LEFT}:8700"}
    right.run("peer", "join", made["token"])
    left.run("daemon", "restart")
    assert listening(left) == {f"{LEFT}:8700"}

    Path(left.layout.host_config).write_text('schema = 1\n[peer]\nlisten = "off"\n')
    left.run("daemon", "restart")
    assert listening(left) == set()
    refused = left.run("peer", "token", check=False)
    assert (refused.status, "does not listen" in refused.err) == (5, True)
    Path(left.layout.host_config).write_text(
        f'schema = 1\n[peer]\nlisten = "{LEFT}:8701"\naddresses = ["ct1.example.org", "{LEFT}:9"]\n'
    )
    left.run("daemon", "restart")
    assert listening(left) == {f"{LEFT}:8701"}
    assert left.json("peer", "token")["addresses"] == ["ct1.example.org:8701", f"{LEFT}:9"]

    # Taken by another program, it is listened to as soon as that is gone.
    code = f"import socket; s = socket.create_server(('{LEFT}', 8702)); print(1, flush=True); input()"
    taken = left.popen_program(sys.executable, "-I", "-c", code)
    assert taken.stdout.readline()
    Path(left.layout.host_config).write_text(f'schema = 1\n[peer]\nlisten = "{LEFT}:8702"\n')
    left.run("daemon", "restart")
    assert "in use" in left.run("peer", "list").err
    assert left.run("peer", "token", check=False).status == 1
    assert "in use" in left.run("doctor", check=False).out
    taken.stdin.close()
    taken.wait(10)
    wait_until(lambda: listening(left) == {f"{LEFT}:8702"}, 30, "listening after all")


def test_no_secret_is_left_anywhere(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    text = token(left)
    # Stopped, the issuer keeps the joiner waiting, so that its command line can be looked at.
    left.shell("ip", "link", "set", cable(left, right)[left], "down")
    process = right.popen("peer", "join", text)
    body = text.removeprefix("sysctr1.")

    def line() -> bytes:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()

    wait_until(lambda: body.encode() not in line() and b"join" in line(), what="a clean command line")
    assert process.poll() is None
    left.shell("ip", "link", "set", cable(left, right)[left], "up")
    assert process.wait(60) == 0
    assert len(left.json("peer", "list")) == 1
    for node in two_nodes:
        for directory, _, files in os.walk(node.root):
            if directory.startswith(f"{node.layout.pool}/"):
                continue
            for name in files:
                path = f"{directory}/{name}"
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISREG(os.lstat(path).st_mode):
                        data = Path(path).read_bytes()
                        assert secret_of(text).encode() not in data, path
                        assert body[:80].encode() not in data, path
    for path in (f"{left.layout.peer}/identity.pem", f"{left.layout.peer}/tokens.json"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(left.layout.peer).st_mode) == 0o700


def fails_at(point: str, node: Node) -> None:
    """Let the daemon of a node die when it comes to a point."""
    node.run("daemon", "stop")
    node.run("daemon", "start", env={"SYSCTR_FAULT": point})


def test_a_join_that_is_cut_off_makes_both_trust_or_neither(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    for point in ("peer.consumed", "peer.offered"):
        text = token(left)
        fails_at(point, left)
        done = right.run("peer", "join", text, check=False)
        assert (done.status, "cannot talk" in done.err) == (1, True), done
        assert left.json("peer", "list") == right.json("peer", "list") == []
        # Whoever listens for nobody is made to listen again, by another one.
        token(left)
        again = right.run("peer", "join", text, check=False)
        assert (again.status, "used already" in again.err) == (5, True), again

    text = token(left)
    fails_at("peer.joining", right)
    assert right.run("peer", "join", text, check=False).status == 6
    assert left.json("peer", "list") == []
    right.run("daemon", "start")
    [peer] = wait_until(lambda: left.json("peer", "list"), 20, "the joiner, which goes on")
    wait_until(lambda: right.json("peer", "list")[0]["state"] == "", what="the end of joining")
    assert left.json("peer", "show", peer["name"])["reachable"]
