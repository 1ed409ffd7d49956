"""The file of a backup job: its keys, its errors, and that what is written is read back."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import backup_job
from sysctr.config.backup import CODECS, MODES
from sysctr.config.backup_job import expand_notes, new_text, parse_job, read_job
from sysctr.errors import ConfigError


def test_a_job_is_read_with_its_defaults() -> None:
    job = parse_job({"all": True})
    assert (job.schedule, job.enabled, job.notes) == ("daily 02:00", True, "{{guestname}}")
    assert (job.directory, job.mode, job.compress, job.bwlimit_bytes) == ("", "", "", None)
    assert not job.keep.says_anything


_TEXTS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30)
_JOBS = st.fixed_dictionaries(
    {"containers": st.lists(st.sampled_from(["101", "web", "db-1"]), min_size=1, unique=True)},
    optional={
        "schedule": st.sampled_from(["off", "hourly", "weekly sun 22:00"]), "enabled": st.booleans(),
        "directory": st.sampled_from(["/srv/dump", '/srv/a "quoted" one', "/srv/ünï\\code"]),
        "mode": st.sampled_from(MODES), "compress": st.sampled_from(CODECS),
        "bwlimit": st.sampled_from(["50M", "0", 65536, 0]), "keep_last": st.integers(0, 1000),
        "keep_yearly": st.integers(0, 1000), "notes": _TEXTS.filter(lambda text: "{{" not in text),
        "protected": st.booleans(), "exclude_paths": st.lists(st.just("/var/cache/*"), max_size=1),
        "on_failure": st.lists(_TEXTS, max_size=4).map(lambda words: ["/bin/x", *words]),
        "mail_to": st.lists(st.sampled_from(["root", "a.b+c@example.org"]), unique=True),
    },
)  # fmt: skip


@given(_JOBS)
def test_what_is_written_is_read_back(mapping: dict) -> None:
    job = parse_job(mapping)
    text = new_text("nightly", job)
    assert read_job(text) == job
    assert new_text("nightly", read_job(text)) == text


def test_the_words_of_a_command_stay_as_they_are() -> None:
    words = ["/bin/x", "-a", "-a", "", "two words", '"']
    assert parse_job({"all": True, "on_failure": words}).on_failure == tuple(words)


@pytest.mark.parametrize(
    ("mapping", "part"),
    [
        ({}, "not exactly one of containers, tag and all"),
        ({"all": True, "tag": "prod"}, "not exactly one of"),
        ({"containers": ["web"], "all": True}, "not exactly one of"),
        ({"containers": ["web"], "exclude": ["db"]}, "cannot accept exclude: the containers are listed"),
        ({"containers": "web"}, "cannot accept containers = 'web'"),
        ({"containers": ["We b"]}, "containers: 'We b' is not a container name"),
        ({"containers": ["7"]}, "containers: 7 is not a container number"),
        ({"all": True, "schedul": "daily"}, "the nearest is schedule"),
        ({"all": True, "schedule": "sometimes"}, "schedule: 'sometimes' is not off, hourly"),
        ({"all": True, "mode": "fast"}, "mode: 'fast' is not one of snapshot, suspend, stop"),
        ({"all": True, "compress": "xz"}, "compress: 'xz' is not one of"),
        ({"all": True, "directory": "dump"}, "directory: 'dump' is not an absolute path"),
        ({"all": True, "keep_last": 1001}, "keep_last: 1001 is not a whole number"),
        ({"all": True, "notes": "{{host}}"}, "notes: '{{host}}' is not a variable of notes"),
        ({"all": True, "notes": "a\nb"}, "notes: "),
        ({"all": True, "on_failure": "/bin/x"}, "cannot accept on_failure = '/bin/x'"),
        ({"all": True, "on_failure": ["", "x"]}, "the name of the program is empty"),
        ({"all": True, "on_failure": ["/bin/x", 1]}, "on_failure: 1 is not a text"),
        ({"all": True, "on_failure": ["/bin/x", "a\0b"]}, "on_failure: "),
        ({"all": True, "mail_to": ["-oQ/tmp"]}, "mail_to: '-oQ/tmp' is not a mail address"),
        ({"all": True, "mail_to": ["a@b\nBcc: c@d"]}, "is not a mail address"),
        ({"all": True, "mail_to": ["a, b"]}, "is not a mail address"),
        ({"all": True, "exclude_paths": [""]}, "exclude_paths: '' is not a pattern of paths"),
        ({"all": True, "exclude_paths": ["a\nb"]}, "exclude_paths: "),
        ({"all": True, "exclude_paths": ["/var/"]}, "without / at its end"),
    ],
)
def test_a_mistake_is_named(mapping: dict, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(mapping)
    assert part in caught.value.message


def test_a_file_of_a_newer_sysctr_is_refused() -> None:
    with pytest.raises(ConfigError, match="a newer sysctr wrote it"):
        read_job("schema = 2\nall = true\n")
    with pytest.raises(ConfigError, match="without schema"):
        read_job("all = true\n")


@given(_TEXTS, _TEXTS)
def test_what_a_fact_says_is_no_template(name: str, text: str) -> None:
    facts = {"guestname": f"{{{{vmid}}}}\\n{name}", "vmid": "101", "node": "here"}
    assert expand_notes("{{guestname}}", facts) == facts["guestname"]
    plain = text.replace("{", "").replace("\\", "")
    assert expand_notes(f"{plain}{{{{vmid}}}}", facts) == f"{plain}101"


def test_escapes_are_those_of_proxmox() -> None:
    facts = {"guestname": "web", "vmid": "101", "node": "here"}
    assert expand_notes(r"{{guestname}}\n{{node}}\\n\x", facts) == "web\nhere\\n\\x"


def test_the_examples_hold() -> None:
    assert doctest.testmod(backup_job).failed == 0
