"""Tokens, names and records of peers, and what a message of theirs may contain."""

import base64
import contextlib
import doctest
import json
import os
import stat
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import addresses
from sysctr.engine import peer_records, peer_tokens
from sysctr.engine.peer_records import Book, Peer
from sysctr.engine.peer_tokens import Token, Tokens, WrongToken, decode, encode
from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.paths import Layout
from sysctr.peer import identity
from sysctr.peer.message import (
    Anything,
    Flag,
    Items,
    Maybe,
    Mismatch,
    Real,
    Shape,
    Speakers,
    Table,
    Text,
    Whole,
)

NOW_S = 1_795_784_237.5


@pytest.fixture
def where(tmp_path):
    return Layout(str(tmp_path))


@pytest.fixture
def now(monkeypatch):
    clock = SimpleNamespace(now_s=NOW_S)
    monkeypatch.setattr(peer_tokens, "time", SimpleNamespace(time=lambda: clock.now_s))
    return clock


@pytest.fixture
def peer(tmp_path):
    one = identity.make(str(tmp_path / "other"))
    return Peer("paris", one.fingerprint, one.certificate, ("192.0.2.1:8645",), NOW_S, accepts=("a" * 64,))


@pytest.mark.parametrize("module", [peer_records, peer_tokens, addresses])
def test_examples_of_the_modules_hold(module):
    assert doctest.testmod(module).failed == 0


TOKENS = st.builds(
    Token,
    name=st.text(max_size=255).filter(lambda text: "\0" not in text),
    addresses=st.lists(st.from_regex(r"[a-z0-9.]{1,40}:[0-9]{1,5}", fullmatch=True), max_size=16).map(tuple),
    fingerprint=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    secret=st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True),
    expires=st.floats(0, 1e12),
)


@given(token=TOKENS, blanks=st.sampled_from(["", "\n", " \r\n"]))
def test_a_token_is_read_as_it_was_written_wherever_lines_were_broken(token, blanks):
    text = encode(token)
    assert decode(text[:40] + blanks + text[40:] + blanks) == token


@given(text=st.text() | st.binary().map(lambda data: "sysctr1." + base64.urlsafe_b64encode(data).decode()))
def test_nothing_else_is_a_token_and_none_of_it_is_shown(text):
    with pytest.raises(UsageError) as raised:
        decode(text)
    assert len(text) < 12 or text not in raised.value.message
    assert raised.value.__cause__ is None


def test_a_token_is_used_once_also_over_a_restart_and_only_its_hash_is_kept(where, now):
    tokens = Tokens(where)
    tokens.load()
    first, second = tokens.make(NOW_S + 60), tokens.make(NOW_S + 120)
    path = f"{where.peer}/tokens.json"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with open(path) as file:
        text = file.read()
    assert first not in text
    assert second not in text
    assert tokens.next_expiry() == NOW_S + 120
    tokens.consume(first)
    with pytest.raises(Refused, match="used already"):
        tokens.consume(first)
    again = Tokens(where)
    again.load()
    with pytest.raises(Refused, match="used already"):
        again.consume(first)
    with pytest.raises(WrongToken):
        again.consume("C" * 43)
    now.now_s += 121
    assert again.next_expiry() is None
    with pytest.raises(Refused, match="expired"):
        again.consume(second)
    # It is remembered for some days, and then it is like any that never was.
    now.now_s += 8 * 86400
    again.make(now.now_s + 60)
    with pytest.raises(WrongToken):
        again.consume(first)


def test_tokens_that_nobody_uses_do_not_pile_up(where, now):
    tokens = Tokens(where)
    for _ in range(256):
        tokens.make(NOW_S + 60)
    with pytest.raises(Refused, match="256 are unused"):
        tokens.make(NOW_S + 60)
    tokens.drop()
    assert tokens.next_expiry() is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"tokens": [1]}', '{"tokens": [{"hash": "x"}]}'])
def test_of_a_damaged_file_no_token_holds(where, now, damage):
    os.makedirs(where.peer)
    with open(f"{where.peer}/tokens.json", "w") as file:
        file.write(damage)
    tokens = Tokens(where)
    tokens.load()
    assert tokens.next_expiry() is None
    tokens.consume(tokens.make(NOW_S + 60))


def test_a_peer_is_found_by_all_that_it_was_called_and_trusted_for_what_it_has(where, peer, tmp_path):
    book = Book(where)
    book.put(peer)
    following = identity.make(str(tmp_path / "next"))
    book.change("paris", next=following.certificate)
    assert book.trusting(following.fingerprint).name == book.trusting(peer.id).name == "paris"
    book.change("paris", certificate=following.certificate, next="", former=(peer.id,))
    assert book.trusting(peer.id) is None
    book.rename("paris", "rio")
    with pytest.raises(NotFound):
        book.find("paris")
    again = Book(where)
    again.load()
    assert again.all() == book.all()
    for ref in ("rio", peer.id, following.fingerprint):
        assert again.find(ref).name == "rio"
    assert stat.S_IMODE(os.stat(f"{where.peers}/rio.json").st_mode) == 0o600
    again.drop("rio")
    assert os.listdir(where.peers) == []


def test_names_are_free_and_no_words_of_the_api(where, peer):
    book = Book(where)
    book.put(peer)
    book.put(replace(peer, name="paris-2", id="x"))
    assert book.free_name("Paris.example.org") == "paris-3"
    assert book.free_name("token") == "token-2"
    assert book.free_name("x" * 200) == "x" * 58
    with pytest.raises(WrongState):
        book.rename("paris-2", "paris")
    for name in ("join", "rotate", "a/b", "", "7", "A"):
        with pytest.raises(UsageError):
            book.rename("paris", name)


@given(name=st.text())
def test_whatever_a_host_calls_itself_becomes_a_name(name):
    peer_records.check_name(Book(Layout("/nowhere")).free_name(name))


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"certificate": 1}', '{"id": "x", "certificate": "x", "created": 1}']
)
def test_a_file_that_cannot_be_read_is_of_nobody_and_stays(where, peer, damage):
    book = Book(where)
    book.put(peer)
    for name in ("bad.json", "Odd Name.json", ".hidden.json"):
        with open(f"{where.peers}/{name}", "w") as file:
            file.write(damage)
    again = Book(where)
    again.load()
    assert again.all() == [peer]
    assert len(os.listdir(where.peers)) == 4


def test_an_identity_is_made_once_and_succeeded_in_one_step(tmp_path):
    directory = str(tmp_path / "peer")
    own = identity.obtain(directory)
    assert identity.obtain(directory) == own
    assert identity.check(own.certificate) == own.fingerprint
    assert identity.verify(own.certificate, own.sign(b"x"), b"x")
    assert not identity.verify(own.certificate, own.sign(b"x"), b"y")
    following = identity.make(directory, "next.pem")
    assert identity.succeed(directory).fingerprint == following.fingerprint
    assert sorted(os.listdir(directory)) == ["identity.pem"]
    assert stat.S_IMODE(os.stat(f"{directory}/identity.pem").st_mode) == 0o600


@given(text=st.text() | st.binary(max_size=300).map(lambda data: base64.encodebytes(data).decode()))
def test_no_text_is_a_certificate(text):
    for certificate in (text, f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"):
        with pytest.raises(ValueError):
            identity.check(certificate)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SHAPE = Shape(
    {"id": Text(16, pattern="[0-9a-f]*"), "n": Whole(0, 9)},
    {
        "ok": Flag(), "rate": Real(0, 1), "names": Items(Text(5), 3), "map": Table(Whole(), 2),
        "maybe": Maybe(Text(choices=("a", "b"))), "any": Anything(),
    },
)  # fmt: skip


@given(value=JSON | st.dictionaries(st.sampled_from([*SHAPE.required, *SHAPE.optional]), JSON))
def test_no_message_makes_the_check_fail_otherwise(value):
    with contextlib.suppress(Mismatch):
        assert SHAPE.check(value) == value
        json.dumps(value, allow_nan=False).encode()


@pytest.mark.parametrize(
    ("there", "here", "hint"),
    [
        ("0.2.0", "0.1.0", "upgrade sysctr here"), ("0.10", "0.9", "upgrade sysctr here"),
        ("0.1.0", "0.2.0", "upgrade sysctr on rio"), ("0.1.0", "0.1.0", "upgrade sysctr here"),
        ("nonsense", "0.1.0", "upgrade sysctr on rio"),
    ],
)  # fmt: skip
def test_what_is_unknown_says_which_side_to_upgrade(there, here, hint):
    with pytest.raises(SysctrError, match=r"unknown field begin\.x|unknown field x") as raised:
        Speakers("rio", there, here).read(Shape({}), {"x": 1}, "begin")
    assert raised.value.hint == hint
    assert Speakers("rio", there, here).unknown("x").hint == hint
