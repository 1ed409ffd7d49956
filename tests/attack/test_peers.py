"""Other hosts that are hostile: strangers who flood or lie, and one that is trusted and turns (S32)."""

import base64
import contextlib
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sysctr.errors import SysctrError
from sysctr.peer import identity
from sysctr.peer.channel import Channel, NotTrusted, PeerLost
from sysctr.peer.dial import client_context, dial
from sysctr.peer.identity import Identity
from tests.node import Node
from tests.wait import wait_until

pytestmark = pytest.mark.root

PROTOCOL = 1


@dataclass
class Victim:
    """A host that others call, and the peer that it has a right to be called by."""

    node: Node
    address: str
    fingerprint: str
    good: Node

    @property
    def where(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host, int(port)

    def token(self) -> dict:
        body = self.node.json("peer", "token")["token"].removeprefix("sysctr1.")
        return json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))

    def reached_by_the_good(self) -> float:
        """Let the good peer call it; return how long that took."""
        began_s = time.monotonic()
        shown = self.good.json("peer", "show", "victim")
        assert shown["reachable"], shown["error"]
        return time.monotonic() - began_s

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.node.pids()['daemon']}/task"))


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Node() as node, Node() as good:
        address = f"127.0.0.1:{free_port()}"
        made = node.json("peer", "token", "--listen", address)
        good_address = f"127.0.0.1:{free_port()}"
        Path(good.layout.etc).mkdir(exist_ok=True)
        Path(good.layout.host_config).write_text(f'schema = 1\n[peer]\nlisten = "{good_address}"\n')
        good.run("peer", "join", "-", "--name", "victim", stdin=made["token"].encode())
        yield Victim(node, address, made["fingerprint"], good)
        for one in (node, good):
            assert "Traceback" not in one.logs(), one.logs()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.fixture(autouse=True)
def nothing_stays(victim: Victim) -> Iterator[None]:
    """After each attack the good one gets through, and no thread is left to the attacker."""
    victim.reached_by_the_good()
    before = victim.threads()
    yield
    victim.reached_by_the_good()
    wait_until(lambda: victim.threads() <= before + 2, 20, "the end of the attacker's threads")


def join_message(token: dict, own: Identity, **changes: object) -> dict:
    data = b"\0".join(
        (b"sysctr-join-1", token["secret"].encode(), own.fingerprint.encode(), token["fingerprint"].encode())
    )
    message = {
        "op": "peer.join", "protocol": PROTOCOL, "version": "0.1.0", "secret": token["secret"],
        "name": "mallory", "certificate": own.certificate, "addresses": ["127.0.0.1:9"],
        "proof": own.sign(data).hex(),
    }  # fmt: skip
    return {**message, **changes}


def ask(victim: Victim, message: dict, own: Identity | None = None) -> dict:
    with dial([victim.address], victim.fingerprint, own) as channel:
        if own is not None:
            hello(channel)
        channel.send(message)
        return channel.receive(20)


def hello(channel: Channel, **changes: object) -> dict:
    """Greet as a peer does; return what the other side said."""
    told = channel.receive(10)
    message = {"op": "hello", "protocol": PROTOCOL, "version": "0.1.0", "name": "mallory"}
    channel.send({**message, **changes})
    return told


@pytest.fixture
def mallory(victim: Victim, tmp_path: Path) -> Iterator[Identity]:
    """A peer that the victim trusts, with no more behind it than its key."""
    own = identity.make(str(tmp_path))
    assert "ok" in ask(victim, join_message(victim.token(), own))
    assert ask(victim, {"op": "peer.ping"}, own) == {"ok": {}}
    yield own
    with contextlib.suppress(SysctrError), dial([victim.address], victim.fingerprint, own) as channel:
        hello(channel)
        channel.call("peer.remove", 10)


def test_a_stranger_may_do_nothing_but_join(victim: Victim) -> None:
    for message in ({"op": "peer.ping"}, {"op": "hello"}, {"op": "peer.remove"}, {}, {"op": ["peer.join"]}):
        answer = ask(victim, message)
        assert answer["error"]["code"] == "refused", answer
        assert "does not know you" in answer["error"]["message"]


def test_a_certificate_of_nobodys_choice_is_refused(victim: Victim, tmp_path: Path) -> None:
    foreign = identity.make(str(tmp_path))
    with dial([victim.address], victim.fingerprint, foreign) as channel, pytest.raises(NotTrusted):
        channel.receive(10)
    # The certificate of a peer without its key, and its name with another key.
    stolen = tmp_path / "stolen.pem"
    key = Path(foreign.path).read_text().partition("-----BEGIN CERTIFICATE")[0]
    stolen.write_text(key + certificate_of_the_good(victim))
    with pytest.raises(PeerLost, match="key values mismatch"):
        dial([victim.address], victim.fingerprint, Identity(str(stolen), "", ""))
    stolen.write_text(forged(certificate_of_the_good(victim)))
    with (
        dial([victim.address], victim.fingerprint, Identity(str(stolen), "", "")) as channel,
        pytest.raises((NotTrusted, PeerLost)),
    ):
        channel.receive(10)


def certificate_of_the_good(victim: Victim) -> str:
    [good] = [one["name"] for one in victim.node.json("peer", "list") if one["name"] != "mallory"]
    return json.loads(Path(victim.node.layout.peers, f"{good}.json").read_text())["certificate"]


def forged(certificate: str) -> str:
    """Return a key of its own and a certificate with the name of another."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    theirs = x509.load_pem_x509_certificate(certificate.encode())
    key = ed25519.Ed25519PrivateKey.generate()
    made = (
        x509.CertificateBuilder().subject_name(theirs.subject).issuer_name(theirs.issuer)
        .public_key(key.public_key()).serial_number(theirs.serial_number)
        .not_valid_before(datetime.datetime(2000, 1, 1)).not_valid_after(datetime.datetime(2100, 1, 1))
        .sign(key, None)
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (private + made.public_bytes(serialization.Encoding.PEM)).decode()


def test_an_older_tls_and_what_is_no_tls_get_no_answer(victim: Victim) -> None:
    context = client_context(None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(victim.where) as plain, pytest.raises(ssl.SSLError, match=r"(?i)version"):
        context.wrap_socket(plain)
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(3000), b"\x16\x03\x01" + b"\xff" * 9000):
        with socket.create_connection(victim.where) as plain:
            plain.settimeout(20)
            with contextlib.suppress(ConnectionError):
                plain.sendall(data)
                answer = plain.recv(4096)
                # An alert at most.
                assert len(answer) < 10


def half_open(victim: Victim) -> socket.socket:
    sock = socket.create_connection(victim.where)
    with contextlib.suppress(OSError):
        sock.send(b"\x16\x03\x01\x02\x00\x01\x00")
    return sock


def silent(victim: Victim) -> socket.socket:
    return client_context(None).wrap_socket(socket.create_connection(victim.where, 10))


@pytest.mark.parametrize("begin", [half_open, silent])
def test_a_flood_keeps_nobody_out(victim: Victim, begin: Callable[[Victim], socket.socket]) -> None:
    held = []
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                held.append(begin(victim))
        assert len(held) > 50
        assert victim.threads() < 80
        for _ in range(3):
            assert victim.reached_by_the_good() < 5
            assert victim.node.json("peer", "show", victim.node.json("peer", "list")[0]["name"])["reachable"]
    finally:
        for sock in held:
            sock.close()


def test_a_handshake_has_to_end_in_time(victim: Victim) -> None:
    with half_open(victim) as sock:
        sock.settimeout(30)
        began_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert sock.recv(100) == b""
        assert 5 < time.monotonic() - began_s < 20


def test_a_token_is_used_by_one_and_for_one_key(victim: Victim, tmp_path: Path) -> None:
    own, other = identity.make(str(tmp_path / "a")), identity.make(str(tmp_path / "b"))
    count = len(victim.node.json("peer", "list"))
    token = victim.token()
    # With the key of another: the token is used up, and nobody has joined.
    stolen = join_message(token, own, certificate=other.certificate)
    assert "does not have the key" in ask(victim, stolen)["error"]["message"]
    assert "used already" in ask(victim, join_message(token, own))["error"]["message"]

    token = victim.token()
    message = join_message(token, own)
    assert "ok" in ask(victim, message)
    for replay in (message, join_message(token, other)):
        assert "used already" in ask(victim, replay)["error"]["message"]
    with dial([victim.address], victim.fingerprint, other) as channel, pytest.raises(NotTrusted):
        channel.receive(10)
    # Who joined and never came is no peer.
    assert len(victim.node.json("peer", "list")) == count
    ask(victim, {"op": "peer.remove"}, own)


def test_guesses_take_ever_longer(victim: Victim, tmp_path: Path) -> None:
    own = identity.make(str(tmp_path))
    token = {"secret": "B" * 43, "fingerprint": victim.fingerprint}
    began_s = time.monotonic()
    for _ in range(4):
        assert "not one of this host" in ask(victim, join_message(token, own))["error"]["message"]
    assert time.monotonic() - began_s > 2
    assert "B" * 43 not in victim.node.logs()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": 1}, "unknown field extra"), ({"name": "x" * 300}, "name is not"),
        ({"certificate": "x"}, "it is no certificate"), ({"certificate": 7}, "certificate is not"),
        ({"addresses": ["a b"]}, "cannot use address"), ({"addresses": ["x"] * 17}, "addresses is not"),
        ({"proof": "zz"}, "proof is not"), ({"proof": ""}, "does not have the key"),
        ({"protocol": 2}, "upgrade sysctr"), ({"protocol": True}, "protocol is not"),
        ({"secret": "\ud800"}, "secret has"),
    ],
)  # fmt: skip
def test_no_join_but_a_right_one(victim: Victim, tmp_path: Path, changes: dict, words: str) -> None:
    own = identity.make(str(tmp_path))
    count = len(victim.node.json("peer", "list"))
    error = ask(victim, join_message(victim.token(), own, **changes))["error"]
    assert words in f"{error['message']} {error['hint']}"
    assert len(victim.node.json("peer", "list")) == count


def test_a_name_of_a_hosts_choice_is_made_one_of_ours(victim: Victim, tmp_path: Path) -> None:
    for number, name in enumerate(("../../etc/passwd", "\x1b[2Jvictim", "token", "", "\u202e" * 99, "0")):
        own = identity.make(str(tmp_path / str(number)))
        assert "ok" in ask(victim, join_message(victim.token(), own, name=name))
        ask(victim, {"op": "peer.ping"}, own)
        names = [one["name"] for one in victim.node.json("peer", "list")]
        assert all(one.replace("-", "").isalnum() and one.isascii() for one in names), names
        assert ask(victim, {"op": "peer.remove"}, own) == {"ok": {}}
    assert len(os.listdir(victim.node.layout.peers)) == 1


def test_a_trusted_one_that_says_what_it_may_not(victim: Victim, mallory: Identity) -> None:
    for message, words in (
        ({"op": "no.such"}, "is not known here"),
        ({"op": ["x"]}, "is not known here"),
        ({}, "is not known here"),
        ({"op": "peer.ping", "extra": 1}, "unknown field extra: mallory runs 0.1.0, here is 0.1.0"),
        ({"op": "peer.rotate"}, "certificate is missing"),
        ({"op": "peer.rotate", "certificate": "x"}, "it is no certificate"),
        ({"op": "\x1b" * 1000}, "is not known here"),
    ):
        error = ask(victim, message, mallory)["error"]
        assert words in error["message"]
        assert error["message"].isprintable()
    certificate = certificate_of_the_good(victim)
    # Another's key is not to become its own, by either way of saying so.
    error = ask(victim, {"op": "peer.rotate", "certificate": certificate}, mallory)["error"]
    assert "that of another host" in error["message"]
    with dial([victim.address], victim.fingerprint, mallory) as channel:
        hello(channel, next=certificate)
        assert "that of another host" in channel.receive(10)["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": 99, "version": "9.0.0"}, "upgrade sysctr here"), ({"op": "peer.ping"}, "hello first"),
        ({"more": 1, "version": "0.2.0"}, "upgrade sysctr here"), ({"accepts": ["x"]}, "accepts"),
        ({"version": 5}, "version is not"), ({"kernel": "x" * 999}, "kernel is not"),
    ],
)  # fmt: skip
def test_a_greeting_that_is_none(victim: Victim, mallory: Identity, changes: dict, words: str) -> None:
    with dial([victim.address], victim.fingerprint, mallory) as channel:
        hello(channel, **changes)
        error = channel.receive(10)["error"]
        assert words in f"{error['message']} {error['hint']}"
        with pytest.raises(PeerLost):
            channel.call("peer.ping", 10)


def test_frames_that_are_none_end_the_connection(victim: Victim, mallory: Identity) -> None:
    for data in (struct.pack(">cI", b"J", 1 << 30), b"Z" * 64, struct.pack(">cI", b"D", 5) + b"12345"):
        with dial([victim.address], victim.fingerprint, mallory) as channel:
            hello(channel)
            channel._wire.write(data, 10)
            with pytest.raises(PeerLost):
                channel.receive(10)


def test_one_peer_does_not_take_all_places(victim: Victim, mallory: Identity) -> None:
    held: list[Channel] = []
    try:
        turned_away = 0
        for _ in range(40):
            channel = dial([victim.address], victim.fingerprint, mallory)
            held.append(channel)
            try:
                hello(channel)
                channel.call("peer.ping", 10)
            except PeerLost:
                turned_away += 1
        assert turned_away >= 16
        assert victim.reached_by_the_good() < 5
    finally:
        for channel in held:
            channel.close()


def test_who_is_removed_is_put_out_at_once(victim: Victim, mallory: Identity) -> None:
    with dial([victim.address], victim.fingerprint, mallory) as channel:
        hello(channel)
        channel.call("peer.ping", 10)
        victim.node.run("peer", "remove", "mallory", "--force")
        # Without a question: whoever is in the middle of a stream does not go on with it.
        began_s = time.monotonic()
        with pytest.raises(PeerLost):
            channel.receive(30)
        assert time.monotonic() - began_s < 10
    with dial([victim.address], victim.fingerprint, mallory) as channel, pytest.raises(NotTrusted):
        channel.receive(10)
