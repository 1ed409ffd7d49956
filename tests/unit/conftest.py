"""What all unit tests share: none of them may reach the machine's own installation, or start it."""

import pytest


@pytest.fixture(autouse=True)
def _nobodys_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command that was not given a host of the test's own find none, and be unable to make one."""
    monkeypatch.setenv("SYSCTR_ROOT", "/dev/null/no-host")
