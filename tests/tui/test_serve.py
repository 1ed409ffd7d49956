"""The UI in a browser: whoever has not the key of its address gets nothing of it."""

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

pytest.importorskip("textual_serve")

from sysctr.tui.serve import Guarded


def asked(path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """Return the status, the text and the headers of an answer."""

    async def ask() -> tuple[int, str, dict[str, str]]:
        guarded = Guarded("true", 8123)
        guarded.key = "secret"
        server = TestServer(await guarded._make_app(), host="127.0.0.1")
        await server.start_server()
        async with TestClient(server) as client:
            answer = await client.get(path, headers={"Host": "127.0.0.1:8123", **headers})
            return answer.status, await answer.text(), dict(answer.headers)

    return asyncio.run(ask())


def test_the_page_has_no_secret_and_may_be_in_nobody_elses() -> None:
    status, text, headers = asked("/")
    assert status == 200
    assert "secret" not in text
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["Referrer-Policy"] == "no-referrer"
    # A cookie would go to every port of this machine.
    assert "Set-Cookie" not in headers


def test_nothing_that_the_page_loads_is_elsewhere() -> None:
    _, text, _ = asked("/")
    own = ("http://127.0.0.1:8123", "ws://127.0.0.1:8123")
    addresses = [word for word in text.replace('"', " ").split() if "://" in word]
    assert [one for one in addresses if not one.startswith(own)] == []


@pytest.mark.parametrize("path", ["/ws", "/ws/", "/ws/wrong", "/ws/secre", "/ws/secrets", "/ws/%ff", "/ws/é"])
def test_without_the_key_there_is_no_terminal(path: str) -> None:
    assert asked(path)[0] in (403, 404)


def test_with_the_key_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[asyncio.subprocess.Process] = []
    begin = asyncio.create_subprocess_shell

    async def noted(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        begun.append(await begin(*arguments, **options))
        return begun[-1]

    # The library does not wait for its programs, and this loop ends before they do.
    monkeypatch.setattr(asyncio, "create_subprocess_shell", noted)

    async def open_it() -> None:
        guarded = Guarded("true", 8123)
        server = TestServer(await guarded._make_app(), host="127.0.0.1")
        await server.start_server()
        async with TestClient(server) as client:
            socket = await client.ws_connect(f"/ws/{guarded.key}", headers={"Host": "127.0.0.1:8123"})
            await socket.close()
        assert [await one.wait() for one in begun] == [0]

    asyncio.run(open_it())


@pytest.mark.parametrize("headers", [{"Host": "evil.example:8123"}, {"Origin": "http://evil.example"}])
@pytest.mark.parametrize("path", ["/", "/ws/secret", "/static/js/textual.js", "/download/x"])
def test_a_page_of_elsewhere_gets_nothing_even_with_the_key(path: str, headers: dict[str, str]) -> None:
    assert asked(path, **headers)[0] == 403
