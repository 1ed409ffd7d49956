"""Work on foreign trees, done by short-lived processes with a container's ids and no rights over the host."""

import os
from collections.abc import Callable, Mapping, Sequence

from sysctr.engine.plan import Idmap, Shifted, tool_job_plan, volume_job_plan
from sysctr.engine.supervisor import SupervisorClient
from sysctr.errors import SysctrError
from sysctr.storage.base import RootSpec
from sysctr.template.base import Task

# Where a job sees the tree that it copies from.
SOURCE = "/source"
_OUTPUT_LIMIT_BYTES = 64 * 1024


class JobRunner:
    """Runs jobs with one id map: that of a container, or the one kept for templates."""

    def __init__(
        self,
        supervisor: SupervisorClient,
        stage: str,
        idmap: Idmap,
        seccomp: bytes,
        cgroup: Callable[[], dict],
    ) -> None:
        self._supervisor = supervisor
        self._cgroup = cgroup
        self._stage = stage
        self.idmap = idmap
        self._seccomp = seccomp

    def run_tool(
        self,
        argv: Sequence[str],
        *,
        volume: str = "",
        stdin_fd: int | None = None,
        stdout_fd: int | None = None,
        stderr_fd: int | None = None,
        network: bool = False,
        host_view: bool = False,
        binds: Sequence[tuple[str, str]] = (),
        environment: Mapping[str, str] | None = None,
        volumes: Sequence[tuple[str, str]] = (),
        views: Mapping[str, RootSpec | Shifted] | None = None,
        root: RootSpec | None = None,
        container: int | None = None,
        more_fds: Sequence[int] = (),
        task: Task | None = None,
    ) -> int:
        """Run one of the host's programs on the tree `volume`, seen at /volume, and return its exit status.

        Further trees, `volumes` (path below it, directory), are mounted there, and `views` are seen
        read-only at the paths that they name. Without a `volume` there is nothing at /volume. `root` in its
        place is a volume that its driver activated: refused while another job has its upper, or while the
        `container` runs whose it is.

        What it says on standard error goes to the task's log, unless `stderr_fd` takes it. `more_fds` are its
        descriptors from 3 on.
        """
        if host_view:
            binds = [("/etc", "/etc"), *binds]
        program = {
            "argv": list(argv), "environment": {"HOME": "/root", "LANG": "C.UTF-8", **(environment or {})},
            "cwd": "/volume" if volume or root else "/", "seccomp": self._seccomp.hex(), "clean": True,
        }  # fmt: skip
        plan = tool_job_plan(
            idmap=self.idmap, stage=self._stage, volume=volume, program=program, binds=tuple(binds),
            network=network, volumes=tuple(volumes), views=views, root=root, container=container,
        )  # fmt: skip
        return self._run(plan, stdin_fd, stdout_fd, task, stderr_fd, more_fds)

    def run_builtin_on(
        self, directory: str, program: dict, task: Task | None = None, source: RootSpec | None = None
    ) -> None:
        """Do one of the supervisor's own works on a directory, seen at /volume; raises SysctrError."""
        plan = tool_job_plan(
            idmap=self.idmap, stage=self._stage, volume=directory, program=program,
            views={SOURCE: source} if source else None,
        )  # fmt: skip
        status = self._run(plan, None, None, task)
        if status:
            raise SysctrError(f"cannot {program['builtin']} files: the job ended with {status}")

    def run_builtin(self, container_id: int, root: RootSpec, program: dict, task: Task | None = None) -> None:
        """Do one of the supervisor's own works on a stopped container's files; raises SysctrError."""
        plan = volume_job_plan(container_id, root, self.idmap, self._stage, program)
        status = self._run(plan, None, None, task)
        if status:
            raise SysctrError(f"cannot {program['builtin']} files: the job ended with {status}")

    def _run(
        self,
        plan: dict,
        stdin_fd: int | None,
        stdout_fd: int | None,
        task: Task | None,
        stderr_fd: int | None = None,
        more_fds: Sequence[int] = (),
    ) -> int:
        null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        # A file, so that a program that says much never waits for a reader.
        words_fd = os.memfd_create("sysctr-job", os.MFD_CLOEXEC)
        try:
            stdio = (
                null_fd if stdin_fd is None else stdin_fd,
                words_fd if stdout_fd is None else stdout_fd,
                words_fd if stderr_fd is None else stderr_fd,
                *more_fds,
            )
            bounded = {**plan, "cgroup": self._cgroup()}
            return self._supervisor.job(bounded, stdio, task.check if task else None)
        finally:
            if task is not None:
                size = os.fstat(words_fd).st_size
                words = os.pread(words_fd, _OUTPUT_LIMIT_BYTES, max(0, size - _OUTPUT_LIMIT_BYTES))
                for line in words.decode(errors="replace").splitlines():
                    task.log(line)
            os.close(words_fd)
            os.close(null_fd)
