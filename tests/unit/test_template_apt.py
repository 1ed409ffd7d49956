"""The host's apt is read right, and nothing is taken of it that does not belong in a template."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.errors import SysctrError
from sysctr.template import apt

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
WANTED = {
    "bookworm": "http://archive.example/debian",
    "bookworm-updates": "http://archive.example/debian",
    "bookworm-security": "http://archive.example/debian-security",
}
SOURCES = f"""\
# Written by an installer
Types: deb deb-src
# a comment inside
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {KEYRING}

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main
"""


def host(tmp_path, *, sources: str = "", one_line: str = "", release: str = "bookworm", keyring: bool = True):
    etc = tmp_path / "etc"
    (etc / "apt" / "sources.list.d").mkdir(parents=True)
    (etc / "os-release").write_text(f"ID=debian\nVERSION_CODENAME={release}\n")
    (etc / "apt" / "sources.list").write_text(one_line)
    (etc / "apt" / "sources.list.d" / "debian.sources").write_text(sources)
    if keyring:
        path = tmp_path / KEYRING.lstrip("/")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"key")
    return str(tmp_path)


def read(root: str, dump: str = "", **options) -> apt.HostApt:
    return apt.read_host(WANTED, ("main",), KEYRING, root=root, dump=dump, **options)


def lines(found: apt.HostApt) -> list[str]:
    return [source.as_line() for source in found.sources]


def test_the_mirrors_of_a_deb822_file_are_used(tmp_path) -> None:
    assert lines(read(host(tmp_path, sources=SOURCES))) == [
        f"deb [signed-by={KEYRING}] http://mirror.example/debian bookworm main",
        f"deb [signed-by={KEYRING}] http://mirror.example/debian bookworm-updates main",
        f"deb [signed-by={KEYRING}] http://mirror.example/debian-security/ bookworm-security main",
    ]


def test_the_mirror_of_a_one_line_file_is_used_with_its_options(tmp_path) -> None:
    text = "deb [arch=amd64 check-valid-until=no] https://m.example/debian bookworm main # the mirror\n"
    found = lines(read(host(tmp_path, one_line=text)))
    assert found == [f"deb [check-valid-until=no signed-by={KEYRING}] https://m.example/debian bookworm main"]


@pytest.mark.parametrize(
    "foreign",
    [
        "deb https://apt.vendor.example bookworm main",
        "deb [signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/apt bookworm main",
        "deb cdrom:[Debian 12]/ bookworm main",
        "deb file:/srv/debian bookworm main",
        "deb-src http://mirror.example/debian bookworm main",
        "# deb http://mirror.example/debian bookworm main",
        "deb http://mirror.example/debian bookworm contrib",
    ],
)
def test_what_is_not_debians_archive_is_not_taken_for_it(tmp_path, foreign: str) -> None:
    found = read(host(tmp_path, one_line=foreign + "\n"))
    assert [source.uri for source in found.sources] == list(WANTED.values())
    assert found.notes


def test_a_disabled_stanza_is_not_used(tmp_path) -> None:
    found = read(host(tmp_path, sources="Enabled: no\n" + SOURCES.split("\n\n")[0]))
    assert found.sources[0].uri == WANTED["bookworm"]


def test_a_newer_debian_lends_its_mirror_but_not_its_suite(tmp_path) -> None:
    root = host(tmp_path, sources=SOURCES.replace("bookworm", "trixie"), release="trixie")
    assert [(source.uri, source.suite) for source in read(root).sources] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://mirror.example/debian-security/", "bookworm-security"),
    ]


def test_a_key_within_the_stanza_is_carried_along(tmp_path) -> None:
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----"
    found = read(host(tmp_path, sources=SOURCES.replace(f" {KEYRING}", key)))
    signed = found.sources[0].signed_by()
    assert signed.startswith("/etc/apt/keyrings/sysctr-")
    data = found.files[signed.removeprefix("/etc/apt/")]
    assert data == (
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQINBF\n-----END PGP PUBLIC KEY BLOCK-----\n"
    )


def test_a_keyring_of_the_hosts_own_is_carried_along(tmp_path) -> None:
    root = host(tmp_path, sources=SOURCES.replace(KEYRING, "/etc/apt/keyrings/own.gpg"))
    with pytest.raises(SysctrError, match=r"own\.gpg is missing"):
        read(root)
    (tmp_path / "etc/apt/keyrings").mkdir()
    (tmp_path / "etc/apt/keyrings/own.gpg").write_bytes(b"own")
    found = read(root)
    assert found.sources[0].signed_by() == "/etc/apt/keyrings/own.gpg"
    assert found.files["keyrings/own.gpg"] == b"own"


def test_a_host_without_debians_keyring_is_told_the_package(tmp_path) -> None:
    with pytest.raises(SysctrError) as caught:
        read(host(tmp_path, sources=SOURCES, keyring=False))
    assert "debian-archive-keyring" in caught.value.hint


def test_only_options_that_reach_archives_are_taken(tmp_path) -> None:
    dump = "\n".join(
        [
            'Acquire::Check-Valid-Until "false";',
            'Acquire::http::Proxy "http://proxy.example:3142";',
            'Acquire::http::Proxy::m.example "DIRECT";',
            'Acquire::https::Verify-Peer "";',
            'APT::Update::Post-Invoke:: "touch /root/owned";',
            'Acquire::http::Proxy-Auto-Detect "/usr/local/bin/proxy";',
            'Acquire::http::Proxy "http://a"; DPkg::Pre-Invoke { "x"; };',
            'Dir::Etc "/somewhere";',
        ]
    )
    assert read(host(tmp_path, sources=SOURCES), dump).options == (
        ("Acquire::Check-Valid-Until", "false"),
        ("Acquire::http::Proxy", "http://proxy.example:3142"),
        ("Acquire::http::Proxy::m.example", "DIRECT"),
    )


def test_a_proxy_on_the_hosts_loopback_stays_out_of_the_container(tmp_path) -> None:
    found = read(host(tmp_path, sources=SOURCES), 'Acquire::http::Proxy "http://127.0.0.1:3142";')
    assert found.job_options == (("Acquire::http::Proxy", "http://127.0.0.1:3142"),)
    assert found.options == ()
    assert any("loopback" in note for note in found.notes)


def test_a_proxy_of_the_environment_is_used_where_apt_names_none(tmp_path) -> None:
    root = host(tmp_path, sources=SOURCES)
    environment = {"http_proxy": "http://p:1"}
    assert read(root, environment=environment).options == (("Acquire::http::Proxy", "http://p:1"),)
    dump = 'Acquire::http::Proxy "http://q:2";'
    assert read(root, dump, environment=environment).options == (("Acquire::http::Proxy", "http://q:2"),)


def test_private_authorities_are_carried_along(tmp_path) -> None:
    root = host(tmp_path, sources=SOURCES.replace("http:", "https:"))
    (tmp_path / "etc/ca.pem").write_bytes(b"private")
    local = tmp_path / "usr/local/share/ca-certificates"
    local.mkdir(parents=True)
    (local / "corp.crt").write_bytes(b"corp")
    found = read(root, 'Acquire::https::CaInfo "/etc/ca.pem";\nAcquire::https::x::CaInfo "/gone";')
    assert found.options == (("Acquire::https::CaInfo", "/etc/apt/sysctr-ca-0.crt"),)
    assert found.files["sysctr-ca-0.crt"] == b"private"
    assert found.authorities == {"corp.crt": b"corp"}
    assert any("/gone" in note for note in found.notes)


def test_local_authorities_stay_out_where_no_mirror_needs_them(tmp_path) -> None:
    root = host(tmp_path, sources=SOURCES)
    local = tmp_path / "usr/local/share/ca-certificates"
    local.mkdir(parents=True)
    (local / "corp.crt").write_bytes(b"corp")
    assert read(root).authorities == {}


@given(st.text(alphabet="deb [signed-by=/a]http://m/n main\n\t:#.=", max_size=200))
def test_no_sources_file_makes_the_reader_fail(text: str) -> None:
    for source in [*apt.parse_list(text), *apt.parse_deb822(text)[0]]:
        assert "\n" not in source.as_line()


@given(st.text(max_size=200))
def test_no_dump_yields_an_option_that_ends_its_line_early(text: str) -> None:
    for key, value in apt.parse_options(text + '\nAcquire::Retries "3";'):
        assert key.startswith("Acquire::")
        assert '"' not in value
        assert "\n" not in value
