"""Values as text: every pair is inverse, canonical spellings stay, any text is either read or refused."""

import doctest
import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import addresses, values
from sysctr.errors import ConfigError

PARSERS = [
    values.parse_text,
    values.parse_bool,
    values.parse_whole,
    values.parse_size,
    values.parse_cpu,
    values.parse_cores,
    values.parse_name,
    values.parse_container_id,
    values.parse_ref,
    values.parse_tag,
    values.parse_template,
    values.parse_path,
    values.parse_signal,
    values.parse_environment_name,
    values.parse_properties,
    addresses.parse_ifname,
    addresses.parse_mac,
    addresses.parse_ip,
    addresses.parse_ip4,
    addresses.parse_cidr4,
    addresses.parse_subnet4,
    addresses.parse_domain,
]
# Those whose value is a text: parsing gives the one spelling, so parsing that again changes nothing.
CANONICAL = [
    values.parse_text,
    values.parse_name,
    values.parse_tag,
    values.parse_template,
    values.parse_path,
    values.parse_signal,
    addresses.parse_ifname,
    addresses.parse_mac,
    addresses.parse_ip,
    addresses.parse_ip4,
    addresses.parse_cidr4,
    addresses.parse_subnet4,
    addresses.parse_domain,
]

# Arbitrary text finds few values; these characters are what values are made of.
LIKELY = st.text("0123456789abcdefghimrtzKMGTP.:-/,=+_ %\n\0é٣\ud800", max_size=24)
ANY = st.one_of(st.text(max_size=40), LIKELY)
PLAIN = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=30)


def _refusal(function: Callable, *arguments: object) -> str:
    """Return the message of the ConfigError that a call ends with, else nothing; any other error passes."""
    try:
        function(*arguments)
    except ConfigError as error:
        return error.message
    return ""


def _name(function) -> str:
    return function.__name__


@pytest.mark.parametrize("parse", PARSERS, ids=_name)
@given(text=ANY)
def test_any_text_is_read_or_refused(parse, text: str) -> None:
    # The message is one printable line, whatever the text was.
    message = _refusal(parse, text)
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("parse", CANONICAL, ids=_name)
@given(text=ANY)
def test_the_spelling_that_parsing_gives_is_final(parse, text: str) -> None:
    try:
        once = parse(text)
    except ConfigError:
        return
    assert parse(once) == once


@pytest.mark.parametrize("parse", PARSERS, ids=_name)
@pytest.mark.parametrize(
    "text", ["a\nb", "\0", "10.0.0.1\n", "1\r", "\x7f", "\x1b[31m", "a\u2028b", "\ud800"]
)
def test_no_value_has_a_control_character(parse, text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


@given(st.integers(0, values.LARGEST_SIZE_BYTES))
def test_sizes_go_there_and_back(size_bytes: int) -> None:
    assert values.parse_size(values.format_size(size_bytes)) == size_bytes


@given(
    st.one_of(st.integers(1, 8192), st.sets(st.integers(0, 8191), min_size=1).map(lambda s: tuple(sorted(s))))
)
def test_cores_go_there_and_back(cores: int | tuple[int, ...]) -> None:
    assert values.parse_cores(values.format_cores(cores)) == cores


@given(st.one_of(st.integers(1, 31), st.integers(34, 64)))
def test_signals_go_there_and_back(number: int) -> None:
    assert values.signal_number(values.format_signal(number)) == number


PROPERTIES = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), PLAIN.filter(lambda v: "," not in v), min_size=1
)


@given(PROPERTIES, st.sampled_from(["", "a", "volume"]))
def test_properties_go_there_and_back(properties: dict[str, str], default_key: str) -> None:
    written = values.format_properties(properties, default_key)
    assert values.parse_properties(written, default_key) == properties


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("512m", 2**29), ("8GiB", 2**33), ("1.5K", 1536), ("2TB", 2**41), ("7B", 7), ("0.1K", 102)],
)
def test_sizes_are_read_as_people_write_them(text: str, size_bytes: int) -> None:
    assert values.parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "-1M", "1 M", "1X", "1.M", "9999999999P", "1e3", "0x10", "٣M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        values.parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "2-1", "1,", "-1", "8193", "0-8192", "a", "1;2"])
def test_what_is_no_set_of_processors_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        values.parse_cores(text)


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "101", "a.b", "a_b", "a" * 64, "é"])
def test_what_cannot_be_a_host_name_names_no_container(text: str) -> None:
    with pytest.raises(ConfigError):
        values.parse_name(text)
    assert values.parse_name("a" * 63) == "a" * 63


def test_a_reference_is_a_number_or_a_name() -> None:
    assert values.parse_ref("101") == 101
    assert values.parse_ref("web") == "web"
    for text in ("99", "10000", "1" * 40, "", "../1"):
        with pytest.raises(ConfigError):
            values.parse_ref(text)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "lo", "all", "default", "a b", "a/b", "a:b", "a%d", "a" * 16, "eth0\n", "é", "a,b"],
)
def test_what_the_kernel_takes_for_no_interface_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        addresses.parse_ifname(text)


@pytest.mark.parametrize(
    "text",
    ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "02:00:00:00:00", "02:00-00:00:00:01"],
)
def test_only_an_address_of_one_card_is_a_mac(text: str) -> None:
    with pytest.raises(ConfigError):
        addresses.parse_mac(text)


@given(st.integers(0, 2**48 - 1))
def test_macs_go_there_and_back(number: int) -> None:
    text = ":".join(f"{byte:02X}" for byte in number.to_bytes(6))
    if number >> 40 & 1 or not number:
        with pytest.raises(ConfigError):
            addresses.parse_mac(text)
    else:
        assert addresses.parse_mac(text) == text.lower()


@pytest.mark.parametrize(
    "text",
    ["10.0.0.2", "10.0.0.0/24", "10.0.0.255/24", "127.0.0.1/8", "224.0.0.1/24", "0.0.0.0/32", "1.2.3.4/0"],
)
def test_an_address_no_host_can_have_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        addresses.parse_cidr4(text)


@given(st.ip_addresses(v=4), st.integers(1, 32))
def test_addresses_keep_their_network(address: ipaddress.IPv4Address, prefix: int) -> None:
    try:
        text = addresses.parse_cidr4(f"{address}/{prefix}")
    except ConfigError:
        return
    assert ipaddress.IPv4Interface(text) == ipaddress.IPv4Interface((address, prefix))


@pytest.mark.parametrize(
    "text", ["10.0.0.1/24", "10.0.0.0/8", "10.0.0.0/30", "127.0.0.0/24", "169.254.0.0/24"]
)
def test_a_network_that_holds_no_containers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        addresses.parse_subnet4(text)


@pytest.mark.parametrize("text", ["a=1,a=2", "a", "=1", "a=1,,b=2", "A=1", ""])
def test_ill_formed_properties_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        values.parse_properties(text)


@pytest.mark.parametrize("text", ["/", "sbin/init", "/a/../b", "/a/./b", "//a", "/a/", "/" + "a" * 5000])
def test_a_path_has_one_spelling(text: str) -> None:
    with pytest.raises(ConfigError):
        values.parse_path(text)


@pytest.mark.parametrize("module", [values, addresses], ids=lambda module: module.__name__)
def test_the_examples_hold(module) -> None:
    assert doctest.testmod(module).failed == 0
