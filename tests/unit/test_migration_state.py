"""What is written down of migrations, and what is told of a container: read back as it was, or refused."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from sysctr.engine.migration_journal import MigrationJournal
from sysctr.engine.migration_offer import Offer, OfferedSnapshot, OfferedVolume, Wishes, parse_offer
from sysctr.engine.record import Guest
from sysctr.errors import UsageError
from sysctr.paths import Layout

MID = "0123456789abcdef"
UUID = "95f21535-f84d-4c27-b8c1-68f18a6a9cc0"


def journal(tmp_path: Path) -> MigrationJournal:
    read = MigrationJournal(Layout(str(tmp_path)))
    read.load()
    return read


def entry(**changes: object) -> dict:
    return {"id": MID, "role": "source", "phase": "sending", "number": 101, **changes}


def test_an_entry_is_there_for_the_next_daemon(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.write(first.write(entry()), phase="stopped")
    second = journal(tmp_path)
    assert second.get(MID) == entry(phase="stopped", schema=1)
    assert second.of(101) == second.get(MID)
    assert second.all("target", "replica") == []
    second.remove(MID)
    second.remove(MID)
    assert journal(tmp_path).all() == []


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", "\udcff", json.dumps(entry()),
        json.dumps(entry(schema=2)), json.dumps(entry(schema=1, id="f" * 16)),
        json.dumps(entry(schema=1, role="spectator")),
        '{"schema": 1, "id": ' + "[" * 5000,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_set_aside_and_the_others_are_read(tmp_path: Path, text: str) -> None:
    whole = journal(tmp_path)
    whole.write(entry(id="a" * 16))
    directory = Layout(str(tmp_path)).migrations
    Path(directory, f"{MID}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    read = journal(tmp_path)
    assert [one["id"] for one in read.all()] == ["a" * 16]
    assert sorted(os.listdir(directory)) == [f"{MID}.json.damaged", f"{'a' * 16}.json"]


def offer(**changes: object) -> Offer:
    whole = Offer(
        number=101, uuid=UUID, generation=3, created=1.5, config='schema = 1\nname = "web"\n',
        template="tiny", guest=Guest(init="/sbin/init"), arch="x86_64", running=True,
        volumes=(
            OfferedVolume("101-2", "default", "overlay", root=True, own_bytes=5, total_bytes=9),
            OfferedVolume("101-data", "fast", "btrfs", native=True, size_bytes=1 << 30),
        ),
        snapshots=(
            OfferedSnapshot("one", 1.0, {"101-2": "", "101-data": ""}, expires=9.0),
            OfferedSnapshot("two", 2.0, {"101-2": "one"}, config='schema = 1\nname = "was"\n'),
        ),
        addresses={"0": "10.0.0.2"}, wishes=Wishes(pools={"fast": "slow"}, leave_out=("bind",)),
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def test_an_offer_is_read_as_it_was_sent() -> None:
    assert parse_offer(json.loads(json.dumps(offer().as_dict()))) == offer()
    # A root that was restored in place is called by its number again.
    assert [offer().own_part(one.name) for one in offer().volumes] == ["", "-data"]


def root(**changes: object) -> OfferedVolume:
    return dataclasses.replace(offer().volumes[0], **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"number": 99}, "99"), ({"uuid": UUID.upper()}, "uuid"), ({"generation": -1}, "generation"),
        ({"config": "name = 3"}, "schema"), ({"arch": "x86\n64"}, "arch"),
        ({"created": float("nan")}, "created"),
        ({"volumes": ()}, "volumes do not hold"), ({"volumes": (root(), root())}, "volumes do not hold"),
        ({"volumes": (root(), root(name="102-data", root=False))}, "no volume of 101"),
        ({"volumes": (root(name="../x"),)}, "volume"), ({"volumes": (root(size_bytes=0),)}, "size_bytes"),
        ({"snapshots": (OfferedSnapshot("now", 1.0, {"101-2": ""}),)}, "now"),
        ({"snapshots": (OfferedSnapshot("tmp-x", 1.0, {"101-2": ""}),)}, "is none"),
        ({"snapshots": (OfferedSnapshot("a", 1.0, {"101-2": "b"}),)}, "does not come before"),
        ({"snapshots": (OfferedSnapshot("a", 1.0, {"101-data": ""}),)}, "other volumes"),
        ({"snapshots": (OfferedSnapshot("a", 1.0, {"101-2": ""}, config="x"),)}, ""),
        ({"wishes": Wishes(number=7)}, "7"), ({"wishes": Wishes(name="a\nb")}, "name"),
        ({"wishes": Wishes(leave_out=("everything",))}, "leave_out"),
    ],
)  # fmt: skip
def test_an_offer_that_does_not_hold_is_refused(changes: dict, reason: str) -> None:
    with pytest.raises(UsageError, match="cannot accept the container that is offered") as refused:
        parse_offer(offer(**changes).as_dict())
    assert reason in refused.value.message


def test_both_sides_are_told_who_has_to_upgrade() -> None:
    newer = {**offer().as_dict(), "seeds": 1}
    with pytest.raises(UsageError, match="unknown field 'seeds' in its offer: upgrade sysctr here"):
        parse_offer(newer)
    older = offer().as_dict()
    del older["wishes"]["copy"]
    with pytest.raises(UsageError, match="field copy is missing in its wishes: upgrade sysctr there"):
        parse_offer(older)
