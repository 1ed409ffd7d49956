"""Golden plans: what a container, a job on its files and a job of tools are made of, step by step.

A plan that changed on purpose is written anew by `python -m tests.unit.test_plan`; the difference in the
golden file is then what a reviewer reads.
"""

import json
import re
import uuid
from pathlib import Path

import pytest

from sysctr.engine import plan
from sysctr.runtime import steps
from sysctr.storage.base import RootSpec, Tree

GOLDEN = Path(__file__).parents[1] / "data" / "plan"
_NO_UUID = "00000000-0000-0000-0000-000000000000"

ROOT = RootSpec(
    trees=(Tree("pool", "/pool", read_only=True), Tree("volume", "/pool/uppers/101.1")),
    lowers=("pool/uppers/101.0/rootfs", "pool/layers/base/rootfs"), upper="volume/rootfs", work="volume/work",
)  # fmt: skip
FACTS = plan.ContainerFacts(
    name="web",
    uuid="6ed12c92-99ad-47c7-b576-546742a46fd1",
    idmap=plan.Idmap(1_000_000, 65536),
    root=ROOT,
    stage="/run/stage",
    init=("/sbin/init",),
    environment={"GREETING": "hello"},
    seccomp=b"\x06\x00",
    host_os_release='ID=debian\nVERSION_ID="12"\nNAME=Debian\n',
    overmounts=(("/lxcfs/proc/meminfo", "/proc/meminfo"),),
    guest_files=(plan.GuestFile("/etc/hostname", "web\n"),),
)


def container() -> dict:
    """Return a container's plan with the one random text of it made known."""
    made = plan.container_plan(FACTS)
    for step in made["prepare"]:
        if step["do"] == "file" and step["target"].endswith("/boot_id"):
            assert uuid.UUID(step["text"].strip()).version == 4
            step["text"] = f"{_NO_UUID}\n"
    return made


def volume_job() -> dict:
    return plan.volume_job_plan(101, ROOT, FACTS.idmap, "/run/stage", {"builtin": "tar", "paths": ["/etc"]})


def tool_job() -> dict:
    return plan.tool_job_plan(
        idmap=FACTS.idmap, stage="/run/stage", volume="/pool/layers/.new", program={"argv": ["tar"]},
        binds=(("/etc/resolv.conf", "/etc/resolv.conf"),), network=True,
        views={"/source": ROOT},
    )  # fmt: skip


def root_job() -> dict:
    return plan.tool_job_plan(
        idmap=FACTS.idmap, stage="/run/stage", volume="", program={"argv": ["rsync"]}, root=ROOT,
        container=101,
    )  # fmt: skip


PLANS = {"container": container, "volume-job": volume_job, "tool-job": tool_job, "root-job": root_job}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_the_golden_one(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(PLANS[name]())) == golden


@pytest.mark.parametrize("name", PLANS)
def test_every_step_of_a_plan_can_be_read_back_and_described(name: str) -> None:
    made = PLANS[name]()
    for data in [*made["prepare"], *made.get("enter", ())]:
        step = steps.from_json(data)
        assert steps.to_json(step) == data
        assert re.fullmatch(r"[a-zA-Z0-9].{2,}", step.describe())


def test_a_job_that_mounts_an_upper_says_which() -> None:
    assert root_job()["upper"] == "/pool/uppers/101.1/rootfs"
    plain = RootSpec((Tree("volume", "/pool/volumes/101"),))
    made = plan.tool_job_plan(idmap=FACTS.idmap, stage="/s", volume="", program={}, root=plain)
    assert "upper" not in made
    assert "container" not in made
    assert "upper" not in tool_job(), "a view mounts none"


def test_every_start_has_a_boot_id_of_its_own() -> None:
    first, second = plan.container_plan(FACTS), plan.container_plan(FACTS)
    assert first != second
    assert container() == container(), "and nothing else is left to chance"


def test_what_a_plan_takes_from_the_guest_cannot_lead_it_elsewhere() -> None:
    """Every source of a container's plan is a path of the host that the guest has no say in."""
    made = container()
    paths = [entry["path"] for entry in (*made["trees"], *made["sources"])]
    assert all(path.startswith(("/pool", "/dev/", "/lxcfs/")) for path in paths)
    assert not any(path.startswith("/pool/uppers/101.1/") for path in paths)


def test_the_environment_of_init_is_all_in_the_plan() -> None:
    environment = plan.init_environment(FACTS)
    assert environment["container_uuid"] == FACTS.uuid
    assert environment["container_host_id"] == "debian"
    assert environment["container_host_version_id"] == "12"
    assert environment["GREETING"] == "hello"
    assert "NAME" not in environment


def test_an_administrators_variable_wins_over_ours() -> None:
    facts = plan.ContainerFacts(
        name="web", uuid=FACTS.uuid, idmap=FACTS.idmap, root=ROOT, stage="/s", init=("/sbin/init",),
        environment={"TERM": "dumb"},
    )  # fmt: skip
    assert plan.init_environment(facts)["TERM"] == "dumb"


if __name__ == "__main__":
    for name, make in PLANS.items():
        text = json.dumps(make(), indent=1, sort_keys=True) + "\n"
        (GOLDEN / f"{name}.json").write_text(text, encoding="utf-8")
