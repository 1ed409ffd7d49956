"""How backups are made and how many are kept: settings of the host, which a backup job may replace."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sysctr.config import kinds, values
from sysctr.config.table import Key, Kind
from sysctr.errors import ConfigError

MODES = ("snapshot", "suspend", "stop")
CODECS = ("zstd", "gzip", "lzo", "none")
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
# A rate below this would take a day for 5 GiB, and is rather a slip of the unit.
_LEAST_RATE_BYTES = 64 << 10


@dataclass(frozen=True)
class Keep:
    """How many archives of a container are kept; None is no rule, and without rules all are kept."""

    keep_last: int | None = None
    keep_hourly: int | None = None
    keep_daily: int | None = None
    keep_weekly: int | None = None
    keep_monthly: int | None = None
    keep_yearly: int | None = None

    @property
    def rules(self) -> dict[str, int]:
        """Return the rules as retention takes them.

        >>> Keep(keep_last=3, keep_daily=0).rules
        {'last': 3}
        """
        found = {rule: getattr(self, f"keep_{rule}") for rule in RULES}
        return {rule: count for rule, count in found.items() if count}

    @property
    def says_anything(self) -> bool:
        """Tell whether any rule is given, even one that keeps none by itself."""
        return any(getattr(self, field.name) is not None for field in fields(Keep))


@dataclass(frozen=True)
class BackupSettings:
    """Where archives go, how they are made, and how many are kept.

    Empty and None mean that nothing is said; a rate of 0 says that there is no limit.
    """

    directory: str
    mode: str
    compress: str
    bwlimit_bytes: int | None
    keep_last: int | None
    keep_hourly: int | None
    keep_daily: int | None
    keep_weekly: int | None
    keep_monthly: int | None
    keep_yearly: int | None

    @property
    def keep(self) -> Keep:
        """Return the keep rules alone."""
        return Keep(**{field.name: getattr(self, field.name) for field in fields(Keep)})


def choice_kind(placeholder: str, choices: tuple[str, ...], *, may_be_empty: bool) -> Kind:
    """Return the kind of a text that is one of a few."""
    expected = f"one of {', '.join(choices)}"

    def parse(text: str) -> str:
        if text not in choices:
            raise values.refuse(text, expected)
        return text

    return kinds.text_kind(placeholder, expected, parse, choices, may_be_empty=may_be_empty)


def _rate(value: str | int) -> int:
    rate_bytes = values.parse_size(value) if isinstance(value, str) else value
    if rate_bytes != 0 and not _LEAST_RATE_BYTES <= rate_bytes <= values.LARGEST_SIZE_BYTES:
        least = values.format_size(_LEAST_RATE_BYTES)
        hint = "a number without a unit is in bytes" if 0 < rate_bytes < 2**20 else ""
        raise ConfigError(f"{values.shown(value)} is not 0 or a rate of {least} or more a second", hint)
    return rate_bytes


RATE = Kind(
    "RATE", "a rate a second such as 50M, or 0 for no limit", (str, int), _rate, _rate, values.format_size,
    unit="bytes",
)  # fmt: skip


def storing_keys(prefix: str, defaults: Mapping[str, Any], live: str = "live") -> tuple[Key, ...]:
    """Return the keys of BackupSettings; what has no default may be left out, and is then empty or None."""
    mode = choice_kind("MODE", MODES, may_be_empty="mode" not in defaults)
    codec = choice_kind("CODEC", CODECS, may_be_empty="compress" not in defaults)
    rows: tuple[tuple[str, Kind, Any, str], ...] = (
        ("directory", kinds.PATH, "", "directory of the archives"),
        ("mode", mode, "", "snapshot, suspend or stop"),
        ("compress", codec, "", "zstd, gzip, lzo or none"),
        ("bwlimit", RATE, None, "most bytes read a second; 0: no limit"),
        ("keep_last", kinds.KEEP, None, "archives of a container to keep; without rules: all"),
        *(
            (f"keep_{period}", kinds.KEEP, None, f"{unit} of which the last one is kept")
            for period, unit in (
                ("hourly", "hours"), ("daily", "days"), ("weekly", "weeks"), ("monthly", "months"),
                ("yearly", "years"),
            )
        ),
    )  # fmt: skip
    return tuple(
        Key(f"{prefix}{name}", kind, defaults.get(name, default), live, doc)
        for name, kind, default, doc in rows
    )


def in_force(settings: BackupSettings, host: BackupSettings) -> BackupSettings:
    """Return settings of which each that says nothing is replaced by the host's; keep rules go together."""
    found = {field.name: getattr(settings, field.name) for field in fields(BackupSettings)}
    keep = settings.keep if settings.keep.says_anything else host.keep
    for name in ("directory", "mode", "compress"):
        found[name] = found[name] or getattr(host, name)
    if found["bwlimit_bytes"] is None:
        found["bwlimit_bytes"] = host.bwlimit_bytes
    return BackupSettings(**found | {field.name: getattr(keep, field.name) for field in fields(Keep)})
