"""The frames of an announcement, byte by byte, as RFC 5227 and RFC 826 have them."""

import doctest

from sysctr.network import announce


def test_both_frames_say_who_has_the_address() -> None:
    request, reply = announce.announcements("02:00:5e:00:07:01", "198.51.100.7")
    ethernet = "ffffffffffff02005e0007010806"
    kinds = "000108000604"
    sender = "02005e000701c6336407"
    assert request.hex() == ethernet + kinds + "0001" + sender + "000000000000c6336407"
    assert reply.hex() == ethernet + kinds + "0002" + sender + "ffffffffffffc6336407"


def test_examples_hold() -> None:
    results = doctest.testmod(announce)
    assert results.attempted > 0
    assert results.failed == 0
