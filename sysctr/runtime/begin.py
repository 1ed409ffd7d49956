"""How keeper and supervisor are started, and how both speak to the journal."""

import os
import sys


def log(text: str, priority: int = 6) -> None:
    """Write a line for the journal, which reads the priority in front."""
    sys.stderr.write(f"<{priority}>{text}\n")
    sys.stderr.flush()


def supervisor_argv(keeper_fd: int, state_fd: int = -1) -> "list[str]":
    """Return the command line of a supervisor.

    `keeper_fd` is its end of the link to the keeper, `state_fd` what an earlier image of it left; or -1.
    """
    descriptors = ["--keeper-fd", str(keeper_fd), "--state-fd", str(state_fd)]
    return [*_argv("sysctr.runtime.supervisor", ""), *descriptors]


def descriptor_argument(name: str) -> int:
    """Return the descriptor that our command line gives under this name, -1 for none."""
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else -1


def keeper_argv() -> "list[str]":
    """Return a command line whose process ends at once and leaves a keeper that is nobody's child."""
    return _argv("sysctr.runtime.keeper", "import os; os.fork() and os._exit(0); os.setsid(); ")


def _argv(module: str, before: str) -> "list[str]":
    # -I: nothing of the environment or the current directory is imported; -S: nor of site-packages.
    package_dir = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    program = (
        f"import sys; sys.path.insert(0, sys.argv.pop(1)); {before}"
        f"from {module} import main; sys.exit(main())"
    )
    return [sys.executable, "-I", "-S", "-c", program, package_dir]
