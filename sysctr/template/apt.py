"""What the host's own apt knows: mirrors, keyrings, proxies; so that a template builds wherever apt works.

Reads sources.list(5) in both of its formats and `apt-config dump`; what it returns is data. Nothing of the
host's apt configuration is used but what is named here: no hooks, no preferences, no credentials.
"""

import glob
import os
import re
import urllib.parse
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sysctr.errors import SysctrError
from sysctr.linux import process
from sysctr.template.rootfs_check import read_os_release

_SOURCE_MAX_BYTES = 256 * 1024
_SCHEMES = ("http", "https", "mirror+http", "mirror+https")
_LOOPBACK = ("localhost", "127.", "[::1]", "::1")
# Debian's own archive by its place in the address: third parties also offer suites called "bookworm".
_ARCHIVE_PATH = re.compile(r"/debian(-security)?/?$|snapshot\.[^/]*/archive/debian(-security)?/")
_KEPT_SOURCE_OPTIONS = ("signed-by", "trusted", "check-valid-until", "check-date", "allow-insecure")
_KEPT_ACQUIRE = re.compile(
    r"Acquire::("
    r"Check-Valid-Until|Check-Date|Max-FutureTime|Max-ValidTime|Retries|ForceIPv4|ForceIPv6|By-Hash"
    r"|(?:http|https)(?:::[A-Za-z0-9._-]+)?::(?:Proxy|Timeout|Verify-Peer|Verify-Host|CaInfo|Pipeline-Depth)"
    r"|(?:http|https)::Proxy::[A-Za-z0-9._-]+"
    r")"
)
_ONE_LINE = re.compile(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*(.*)")
_DUMP_LINE = re.compile(r'([A-Za-z0-9:._-]+) "(.*)";')


@dataclass(frozen=True)
class AptSource:
    """One archive: a line of sources.list."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def signed_by(self) -> str:
        """Return the keyring it names, "" for none."""
        return dict(self.options).get("signed-by", "")

    def as_line(self) -> str:
        """Return it as a line of sources.list.

        >>> AptSource("http://m/debian", "bookworm", ("main",), (("signed-by", "/k.gpg"),)).as_line()
        'deb [signed-by=/k.gpg] http://m/debian bookworm main'
        """
        options = " ".join(f"{key}={value}" for key, value in self.options)
        bracket = f"[{options}] " if options else ""
        return f"deb {bracket}{self.uri} {self.suite} {' '.join(self.components)}"


@dataclass(frozen=True)
class HostApt:
    """How packages are fetched: while building (`job_options`) and in the container (`options`)."""

    sources: tuple[AptSource, ...]
    options: tuple[tuple[str, str], ...] = ()
    job_options: tuple[tuple[str, str], ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)  # below /etc/apt, in the job and the container
    authorities: dict[str, bytes] = field(default_factory=dict)  # below /usr/local/share/ca-certificates
    notes: tuple[str, ...] = ()


def parse_list(text: str) -> list[AptSource]:
    """Read one-line entries; what is no entry for binary packages is passed over.

    >>> parse_list("deb [arch=amd64 trusted=yes] http://m/debian bookworm main # x")[0].options
    (('trusted', 'yes'),)
    """
    sources = []
    for line in text.split("\n"):
        found = _ONE_LINE.fullmatch(line.split("#")[0].rstrip())
        if found:
            pairs = (item.partition("=") for item in (found[1] or "").split())
            options = [(key.lower(), value) for key, _, value in pairs if key.lower() in _KEPT_SOURCE_OPTIONS]
            sources.append(AptSource(found[2], found[3], tuple(found[4].split()), tuple(options)))
    return sources


def parse_deb822(text: str) -> tuple[list[AptSource], dict[str, str]]:
    """Read stanzas of a .sources file; also return the keys that stand in it, by a name for each."""
    sources: list[AptSource] = []
    keys: dict[str, str] = {}
    for stanza in re.split(r"\n[ \t]*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        values = _stanza(stanza)
        disabled = values.get("enabled", "").lower() in ("no", "false")
        if disabled or "deb" not in values.get("types", "").split():
            continue
        if "BEGIN PGP" in values.get("signed-by", ""):
            lines = values["signed-by"].strip().split("\n")
            key = "\n".join("" if line.strip() == "." else line.strip() for line in lines) + "\n"
            name = f"sysctr-{zlib.crc32(key.encode()):08x}.asc"
            keys[name] = key
            values["signed-by"] = f"/etc/apt/keyrings/{name}"
        options = []
        for key in _KEPT_SOURCE_OPTIONS:
            if words := values.get(key, "").split():
                options.append((key, ",".join(words)))
        for uri in values.get("uris", "").split():
            for suite in values.get("suites", "").split():
                components = tuple(values.get("components", "").split())
                sources.append(AptSource(uri, suite, components, tuple(options)))
    return sources, keys


def _stanza(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    key = ""
    for line in text.split("\n"):
        if line[:1] in (" ", "\t") and key:
            values[key] += "\n" + line.strip()
        elif ":" in line:
            key, _, value = line.partition(":")
            key = key.strip().lower()
            values[key] = value.strip()
    return values


def parse_options(dump: str) -> list[tuple[str, str]]:
    r"""Return the options of `apt-config dump` that say how to reach an archive.

    >>> parse_options('Acquire::http::Proxy "http://p:3142";\nAPT::Update::Post-Invoke:: "rm -rf /";')
    [('Acquire::http::Proxy', 'http://p:3142')]
    """
    options = []
    for line in dump.split("\n"):
        found = _DUMP_LINE.fullmatch(line)
        if found and found[2] and '"' not in found[2] and _KEPT_ACQUIRE.fullmatch(found[1]):
            options.append((found[1], found[2]))
    return options


class NoArchive(SysctrError):
    """Neither the host's apt nor the recipe says where packages come from."""

    code = "no-archive"


def choose(sources: Iterable[AptSource], wanted: Mapping[str, str], codename: str) -> list[AptSource]:
    """Return where the suites `wanted` (suite -> default address) come from, by what the host uses.

    A host of another release of Debian has the same mirrors under other suites: `codename` is its own, the
    first of `wanted` is the one looked for.
    """
    usable = [source for source in sources if _is_archive(source)]
    release = next(iter(wanted))
    if not any(source.suite == release for source in usable):
        renamed = []
        for source in usable:
            if codename and (source.suite == codename or source.suite.startswith(f"{codename}-")):
                suite = release + source.suite[len(codename) :]
                renamed.append(AptSource(source.uri, suite, source.components, source.options))
        usable = renamed
    chosen = []
    for suite in wanted:
        for source in usable:
            if source.suite == suite:
                chosen.append(AptSource(source.uri, suite, ("main",), source.options))
                break
    return chosen if chosen and chosen[0].suite == release else []


def _is_archive(source: AptSource) -> bool:
    if "main" not in source.components or urllib.parse.urlsplit(source.uri).scheme not in _SCHEMES:
        return False
    keyring = os.path.basename(source.signed_by().split(",")[0])
    return keyring.startswith("debian-archive-") or bool(_ARCHIVE_PATH.search(source.uri.rstrip("/")))


def read_host(
    wanted: Mapping[str, str],
    components: tuple[str, ...],
    keyring: str,
    *,
    root: str = "",
    dump: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> HostApt:
    """Return how the host reaches the suites `wanted`; their default addresses where it does not.

    `root` and `dump` replace the host's files and the words of apt-config, for tests.
    Raises SysctrError when `keyring` would be needed and is not installed.
    """
    found, files = _read_sources(f"{root}/etc/apt")
    chosen = choose(found, wanted, _codename(root or "/"))
    notes = []
    if not chosen:
        release = next(iter(wanted))
        if not wanted[release]:
            raise NoArchive(
                f"cannot find an archive of {release}: the host's apt knows none",
                hint=f"add one to it, or give --set bootstrap.sources.{release}=ADDRESS",
            )
        notes.append("the host's apt has no such archive: using the recipe's own addresses")
        chosen = [AptSource(uri, suite, ("main",)) for suite, uri in wanted.items() if uri]
    sources = []
    for source in chosen:
        signed = _own_keyring(source, keyring, root, files)
        sources.append(AptSource(source.uri, source.suite, components, signed))
    files |= _trusted_keys(f"{root}/etc/apt/trusted.gpg.d")
    if dump is None:
        dump = process.run(["apt-config", "dump"], accept=(0, 1, 100)).stdout.decode(errors="replace")
    options = _with_ca_files(_with_environment(parse_options(dump), environment or {}), files, root, notes)
    inside = [(key, value) for key, value in options if not _is_loopback(value)]
    if len(inside) != len(options):
        notes.append("a proxy on this host's loopback is used for building, and not set in the container")
    authorities = {}
    if any(urllib.parse.urlsplit(source.uri).scheme.endswith("https") for source in sources):
        authorities = _local_authorities(f"{root}/usr/local/share/ca-certificates")
    return HostApt(tuple(sources), tuple(inside), tuple(options), files, authorities, tuple(notes))


def _read_sources(directory: str) -> tuple[list[AptSource], dict[str, bytes]]:
    sources: list[AptSource] = []
    files: dict[str, bytes] = {}
    paths = sorted(glob.glob(f"{glob.escape(directory)}/sources.list.d/*"))
    for path in [f"{directory}/sources.list", *paths]:
        text = _read(path).decode(errors="replace")
        if path.endswith(".list"):
            sources += parse_list(text)
        elif path.endswith(".sources"):
            stanzas, keys = parse_deb822(text)
            sources += stanzas
            files |= {f"keyrings/{name}": key.encode() for name, key in keys.items()}
    return sources, files


def _own_keyring(
    source: AptSource, keyring: str, root: str, files: dict[str, bytes]
) -> tuple[tuple[str, str], ...]:
    """Return the source's options with a keyring that exists in the job and in the container."""
    options = dict(source.options)
    named = options.get("signed-by", "").split(",")[0]
    if options.get("trusted") == "yes" and not named:
        return source.options
    if named.startswith("/") and not os.path.basename(named).startswith("debian-archive-"):
        place = f"keyrings/{os.path.basename(named)}"
        if place not in files:
            files[place] = _read(root + named)
        if not files[place]:
            raise SysctrError(f"cannot verify {source.uri}: its keyring {named} is missing or empty")
        options["signed-by"] = f"/etc/apt/{place}"
    elif os.path.exists(root + keyring):
        options["signed-by"] = keyring
    else:
        raise SysctrError(
            f"cannot verify {source.uri}: {keyring} is missing",
            hint="`apt-get install debian-archive-keyring`",
        )
    return tuple(options.items())


def _trusted_keys(directory: str) -> dict[str, bytes]:
    keys = {}
    for path in sorted(glob.glob(f"{glob.escape(directory)}/*")):
        name = os.path.basename(path)
        if name.endswith((".gpg", ".asc")) and not name.startswith(("debian-archive-", "ubuntu-")):
            keys[f"trusted.gpg.d/{name}"] = _read(path)
    return keys


def _with_environment(
    options: list[tuple[str, str]], environment: Mapping[str, str]
) -> list[tuple[str, str]]:
    # apt itself takes these from its environment, which a job does not inherit.
    for scheme in ("http", "https"):
        proxy = environment.get(f"{scheme}_proxy", "")
        key = f"Acquire::{scheme}::Proxy"
        if proxy and '"' not in proxy and all(name != key for name, _ in options):
            options.append((key, proxy))
    return options


def _with_ca_files(
    options: list[tuple[str, str]], files: dict[str, bytes], root: str, notes: list[str]
) -> list[tuple[str, str]]:
    """Carry private certificate authorities along, under a path of their own."""
    result = []
    for key, value in options:
        if key.endswith("::CaInfo"):
            data = _read(root + value)
            if not data:
                notes.append(f"{key} names {value}, which cannot be read: left out")
                continue
            place = f"sysctr-ca-{len([name for name in files if name.startswith('sysctr-ca-')])}.crt"
            files[place] = data
            value = f"/etc/apt/{place}"
        result.append((key, value))
    return result


def _local_authorities(directory: str) -> dict[str, bytes]:
    paths = sorted(glob.glob(f"{glob.escape(directory)}/*.crt"))
    return {os.path.basename(path): _read(path) for path in paths}


def _is_loopback(value: str) -> bool:
    host = urllib.parse.urlsplit(value).netloc.rpartition("@")[2]
    return host.startswith(_LOOPBACK)


def _codename(root: str) -> str:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        release = read_os_release(fd)
    finally:
        os.close(fd)
    return release.get("VERSION_CODENAME", "") if release.get("ID") == "debian" else ""


def _read(path: str) -> bytes:
    """Return a file of the host, b"" where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(_SOURCE_MAX_BYTES)
    except OSError:
        return b""
