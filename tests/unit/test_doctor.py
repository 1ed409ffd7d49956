"""The doctor's judgements, on facts that no test machine has all at once."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sysctr.engine import doctor
from sysctr.paths import Layout

ROOT = Path(__file__).parents[2]
HYBRID = """\
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
"""
PURE = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("6.1.0-37-amd64", "ok"),
        ("6.18.44", "ok"),
        ("10.0", "ok"),
        ("6.0.19", "fail"),
        ("5.15.0-91-generic", "fail"),
        ("odd", "warn"),
    ],
)
def test_kernel_must_be_as_new_as_debian_12(release: str, state: str) -> None:
    check = doctor.check_kernel(release)
    assert check.state == state
    assert "6.1" in check.detail + check.hint


def test_a_container_with_a_range_of_ids_is_no_host() -> None:
    assert doctor.check_outer_namespace("0 0 4294967295\n").state == "ok"
    inside = doctor.check_outer_namespace("         0     100000      65536\n")
    assert inside.state == "fail"
    assert "65536" in inside.detail


def test_user_namespaces_switched_off_are_found() -> None:
    assert doctor.check_user_namespaces(None).state == "fail"
    assert doctor.check_user_namespaces(0).state == "fail"
    assert doctor.check_user_namespaces(1).state == "ok"


def test_controllers_count_wherever_they_are() -> None:
    hybrid = doctor.check_cgroups(HYBRID, lambda _path: "")
    assert (hybrid.state, "memory (v1)" in hybrid.detail) == ("ok", True)
    files = {"/sys/fs/cgroup/cgroup.controllers": "cpuset cpu memory pids"}
    pure = doctor.check_cgroups(PURE, files.__getitem__)
    assert (pure.state, "memory (v2)" in pure.detail) == ("ok", True)


def test_a_missing_controller_is_named() -> None:
    check = doctor.check_cgroups(PURE, lambda _path: "cpuset cpu pids")
    assert check.state == "warn"
    assert "memory" in check.detail


def test_without_cgroup2_nothing_runs() -> None:
    assert doctor.check_cgroups("cgroup /c cgroup rw,memory 0 0\n", lambda _path: "").state == "fail"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("", "ok"),
        ("root:100000:65536\n", "ok"),
        ("root:100000:65536\nsysctr:165536:1000000\n", "ok"),
        ("root:100000:65536\nsysctr:165535:65536\n", "fail"),
        ("sysctr:100000:65536\nme:100000:1\n", "fail"),
        ("sysctr:100000:65536\nme:99999:1\n", "ok"),
        ("sysctr:100000:65536\nnonsense\nme:x:y\n", "ok"),
    ],
)
def test_overlapping_id_ranges_are_refused(text: str, state: str) -> None:
    assert doctor.check_subids("/etc/subuid", text, "sysctr").state == state


def test_space_is_judged_in_bytes_and_inodes() -> None:
    gib = 1024**3
    judge = doctor.check_space
    assert judge("/p", free_bytes=gib // 8, free_inodes=10**6, total_inodes=10**7).state == "fail"
    assert judge("/p", free_bytes=gib, free_inodes=10**6, total_inodes=10**7).state == "warn"
    assert judge("/p", free_bytes=9 * gib, free_inodes=100, total_inodes=10**7).state == "warn"
    # btrfs counts no inodes.
    assert judge("/p", free_bytes=9 * gib, free_inodes=0, total_inodes=0).state == "ok"


def test_missing_tools_are_named_with_their_packages() -> None:
    checks = doctor.check_tools(lambda tool: None if tool in ("nft", "busybox") else f"/bin/{tool}")
    failed = [check for check in checks if check.state == "fail"]
    assert [check.hint for check in failed] == ["`apt-get install nftables`"]
    assert [check.name for check in checks if check.state == "warn"] == ["busybox"]


def test_forwarding_switched_off_cuts_containers_off() -> None:
    states = {check.name: check.state for check in doctor.check_network(True, "sysctr0", "0\n", ())}
    assert states == {"network": "ok", "forwarding": "fail"}
    checks = doctor.check_network(True, "sysctr0", "1\n", [("FORWARD drops", "allow it")])
    assert [(check.state, check.hint) for check in checks if check.state != "ok"] == [("fail", "allow it")]
    assert [check.state for check in doctor.check_network(False, "sysctr0", "0\n", ())] == ["ok"]


def test_versions_that_differ_are_shown() -> None:
    assert doctor.check_versions({"daemon": "1.0", "supervisor": "1.0"}).state == "ok"
    assert doctor.check_versions({"daemon": "1.1", "supervisor": "1.0"}).state == "warn"


def test_what_the_probe_could_not_do_fails_with_its_reason() -> None:
    checks = doctor.check_probe({"userns": "", "idmap": "Operation not permitted"}, "/pool")
    by_name = {check.name: check for check in checks}
    assert by_name["idmapped mount on /pool"].detail == "Operation not permitted"
    assert by_name["overlay on /pool"].state == "fail", "a fact that is missing was not proven"
    assert by_name["user namespace with a map"].state == "ok"


def test_every_failure_says_how_to_mend_it() -> None:
    checks = [
        doctor.check_kernel("5.0"), doctor.check_outer_namespace("0 1 2\n"), doctor.check_user_namespaces(0),
        doctor.check_cgroups("", lambda _path: ""), doctor.check_seccomp(""), doctor.check_fuse(False),
        doctor.check_lxcfs(""), doctor.check_group("sysctr", ""), *doctor.check_probe({}, "/p"),
    ]  # fmt: skip
    assert [check.name for check in checks if check.state == "ok" or not check.hint] == []


def test_the_api_form_keeps_warnings_ok() -> None:
    assert doctor.warn("a", "b", "c").as_dict() == {
        "check": "a", "ok": True, "state": "warn", "detail": "b", "hint": "c",
    }  # fmt: skip


def test_nearest_directory_needs_not_exist(tmp_path: Path) -> None:
    assert doctor.nearest_directory(f"{tmp_path}/a/b/c") == str(tmp_path)


def test_doctor_and_probe_import_the_standard_library_only() -> None:
    for file in ("sysctr/engine/doctor.py", "sysctr/runtime/probe.py"):
        tree = ast.parse((ROOT / file).read_text())
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if node.module}
        foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names | {"sysctr"}}
        assert not foreign


@pytest.mark.root
def test_the_bare_interpreter_runs_the_whole_pre_check(tmp_path: Path) -> None:
    """As quickstart does on a machine that has nothing: no site-packages, no environment, no daemon."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import sysctr.engine.doctor as d; sys.exit(d.main())"
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", code, str(ROOT)],
        env={"SYSCTR_ROOT": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "overlay on" in done.stdout
    assert os.listdir(tmp_path) == [], "the probe left something behind"


@pytest.mark.root
def test_a_host_that_runs_these_tests_has_no_failing_check(tmp_path: Path) -> None:
    checks = doctor.before_install(Layout(str(tmp_path)))
    assert [check for check in checks if check.state == "fail"] == []


def test_inotify_warns_where_the_systemds_of_many_containers_would_not_boot():
    assert doctor.check_inotify(65536).state == "ok"
    assert doctor.check_inotify(None).state == "ok"
    few = doctor.check_inotify(128)
    assert few.state == "warn"
    assert "max_user_instances=8192" in few.hint
