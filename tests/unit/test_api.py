"""The API over a real unix socket: every answer is JSON of one shape, whatever the client sends."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sysctr.api import live, openapi, server
from sysctr.api.fields import Anything, Array, Boolean, Field, Nullable, Number, Object, Table, Text
from sysctr.api.route import find, tree
from sysctr.api.routes import ROUTES
from sysctr.errors import SysctrError, UsageError
from sysctr.runtime import wire
from tests.unit.served import Served
from tests.wait import wait_until


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(str(tmp_path))
    yield served
    served.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(str(tmp_path_factory.mktemp("api")))
    yield served
    served.close()


def test_the_list_comes_as_the_engine_gives_it(shared: Served) -> None:
    status, answer = shared.request("GET", "/1/containers?tag=web")
    assert status == 200
    assert answer == {"containers": shared.engine.list(), "notices": []}


def test_an_action_is_accepted_as_a_task_that_can_be_waited_for(shared: Served) -> None:
    status, answer = shared.request("POST", "/1/containers/web/stop", {"timeout_s": 5, "kill": True})
    assert status == 202
    assert shared.engine.calls[-1] == ("stop", "web", {"timeout_s": 5, "kill": True})
    task = answer["task"]
    status, answer = shared.request("GET", f"/1/tasks/{task['id']}/wait?timeout=20")
    assert (status, answer["task"]["state"]) == (200, "done")
    assert task["id"] in [one["id"] for one in shared.request("GET", "/1/tasks?state=done")[1]["tasks"]]
    assert b"done in" in shared.request("GET", f"/1/tasks/{task['id']}/log")[1]


def test_a_long_poll_ends_at_its_time_and_with_its_task_and_takes_no_thread(served: Served) -> None:
    task = served.request("POST", "/1/containers/held/start")[1]["task"]
    assert served.request("GET", f"/1/tasks/{task['id']}/wait?timeout=0.01")[1]["task"]["state"] == "running"
    with ThreadPoolExecutor(60) as pool:
        waiting = [
            pool.submit(served.request, "GET", f"/1/tasks/{task['id']}/wait?timeout=60") for _ in range(60)
        ]
        wait_until(lambda: len(served.api.wakers) == 60, what="60 long polls")
        assert served.request("GET", "/1/host")[0] == 200
        assert sum(thread.name.startswith("api") for thread in threading.enumerate()) <= server.THREADS
        served.engine.gate.set()
        assert {future.result(20)[1]["task"]["state"] for future in waiting} == {"done"}


def test_a_client_that_hangs_up_ends_its_long_poll(served: Served) -> None:
    task = served.request("POST", "/1/containers/held/start")[1]["task"]
    with wire.connect(served.where.api_socket, 20, socket.SOCK_STREAM) as sock:
        sock.sendall(f"GET /1/tasks/{task['id']}/wait?timeout=600 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(lambda: served.api.wakers, what="the long poll")
    wait_until(lambda: not served.api.wakers, what="its end")


def test_cancelling_a_task(served: Served) -> None:
    task = served.request("POST", "/1/containers/held/start")[1]["task"]
    status, answer = served.request("DELETE", f"/1/tasks/{task['id']}")
    assert status == 200
    assert answer["task"]["cancelling"]


def test_waiting_for_a_state_ends_when_it_is_reached(served: Served) -> None:
    assert served.request("GET", "/1/containers/web/wait?state=stopped&timeout=0.01")[1]["reached"] is False
    timer = threading.Timer(0.05, served.engine.become, ("web", "stopped"))
    timer.start()
    answer = served.request("GET", "/1/containers/web/wait?state=stopped&timeout=20")[1]
    assert answer["reached"] is True
    assert answer["container"]["state"] == "stopped"
    timer.join()


def test_fifty_at_once(shared: Served) -> None:
    with ThreadPoolExecutor(50) as pool:
        futures = [pool.submit(shared.request, "GET", "/1/containers") for _ in range(50)]
        futures += [pool.submit(shared.request, "POST", "/1/containers/web/start", {}) for _ in range(50)]
        assert [future.result(30)[0] for future in futures] == [200] * 50 + [202] * 50


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not-found"),
        ("GET", "/2/host", 404, "not-found"),
        ("GET", "/1/containers/", 404, "not-found"),
        ("GET", "/1/containers/missing", 404, "not-found"),
        ("GET", "/1/containers/a%0ab", 404, "not-found"),
        ("GET", "/1/tasks/0123456789ab", 404, "not-found"),
        ("PATCH", "/1/containers", 405, "usage"),
        ("GET", "/1/containers?tga=web", 400, "usage"),
        ("GET", "/1/containers?tag=a&tag=b", 400, "usage"),
        ("GET", "/1/containers?tag", 400, "usage"),
        ("GET", "/1/tasks?state=sleeping", 400, "usage"),
        ("GET", "/1/containers/web/wait", 400, "usage"),
        ("GET", "/1/containers/web/wait?state=stopped&timeout=nan", 400, "usage"),
        ("GET", "/1/containers/web/wait?state=stopped&timeout=601", 400, "usage"),
        ("DELETE", "/1/containers/protected", 403, "refused"),
        ("GET", "/1/containers/oserror/usage", 507, "no-space"),
        ("GET", "/1/containers/web/exec/ws", 400, "usage"),
    ],
)
def test_every_error_is_json_with_its_state(
    shared: Served, method: str, path: str, status: int, code: str
) -> None:
    assert shared.error(method, path)[:2] == (status, code)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "name is missing"),
        ({"name": "web", "nmae": 1}, "no field nmae"),
        ({"name": 1}, "name must be a string"),
        ({"name": "web", "id": "101"}, "id must be a whole number"),
        ({"name": "web", "id": True}, "id must be a whole number"),
        ({"name": "web", "id": 10**400}, "id must be"),
        ({"name": "web", "onboot": 1}, "onboot must be true or false"),
        ({"name": "web", "tags": "a,b"}, "tags must be a list"),
        ({"name": "web", "tags": ["a", 1]}, "tags[1] must be a string"),
        ({"name": "web", "set": {"limits.memory": "a\0b"}}, "set.limits.memory"),
        ({"name": "w\ud800b"}, "name must be valid Unicode"),
        ([], "must be a JSON object"),
        (b'{"name": NaN}', "NaN is not JSON"),
        (b'{"name": "web", "set": {"a": 1e999}}', "set.a must be a finite number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "not JSON"),
        (b'{"name":', "not JSON"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_refused_with_the_name_of_what_is_wrong(
    shared: Served, body: Any, named: str
) -> None:
    calls = len(shared.engine.calls)
    status, code, message = shared.error("POST", "/1/containers", body)
    assert (status, code) == (400, "usage")
    assert named in message
    assert len(shared.engine.calls) == calls


def test_a_bug_is_told_by_a_number_that_the_log_has(shared: Served, caplog: pytest.LogCaptureFixture) -> None:
    status, answer = shared.request("GET", "/1/containers/web/usage")
    assert (status, answer["error"]["code"]) == (500, "bug")
    assert "secret" not in json.dumps(answer)
    number = answer["error"]["hint"].split()[-1]
    (logged,) = [record for record in caplog.records if number in record.getMessage()]
    assert logged.exc_info[0] is ZeroDivisionError
    assert shared.error("GET", "/1/containers/unserialisable/usage")[:2] == (500, "bug")


def test_who_changes_something_is_logged_and_no_body_is(
    shared: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shared.request("POST", "/1/containers/web/passwd", {"password": "hunter2"})
    shared.request("POST", "/1/containers/web/passwd?password=hunter2", {"password": "hunter2"})
    wait_until(lambda: len(caplog.records) >= 2)
    lines = [record.getMessage() for record in caplog.records]
    assert f"POST /1/containers/web/passwd by uid {os.getuid()}, pid {os.getpid()}: 202" in lines
    assert not [line for line in lines if "hunter2" in line]


def test_a_large_body_is_refused_before_it_is_read_whole(shared: Served) -> None:
    head = b"POST /1/containers HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    assert shared.raw(head + b"x" * 1000).startswith(b"HTTP/1.1 413 ")
    chunks = b"POST /1/containers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks += (b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n") * 40
    assert b"413 " in shared.raw(chunks)[:20]
    status, code, _ = shared.error("POST", "/1/containers", b'"' + b"x" * (2 << 20) + b'"')
    assert (status, code) == (413, "usage")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /1/host HTTP/9.9 extra\r\n\r\n",
        b"GET /1/host HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET /1/host HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"POST /1/containers HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /1/containers HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /1/containers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["tls", "bad version", "long header", "many headers", "negative", "both", "bad chunk"],
)
def test_what_is_not_http_gets_a_short_json_answer_and_the_connection_ends(
    shared: Served, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = shared.raw(data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert set(json.loads(body)) == {"error"}
    assert len(answer) < 1000
    assert not [record for record in caplog.records if record.exc_info]


def test_a_slow_client_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.1)
    assert served.raw(b"") == b""
    assert served.raw(b"GET /1/host HTT") == b""
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 15)
    monkeypatch.setattr(server, "BODY_TIMEOUT_S", 0.1)
    answer = served.raw(b"POST /1/containers HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_its_answer_is_dropped(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WRITE_TIMEOUT_S", 0.1)
    served.engine.count = 5000
    with wire.connect(served.where.api_socket, 20, socket.SOCK_STREAM) as sock:
        sock.sendall(b"GET /1/containers HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: served.api.connections == 1)
        wait_until(lambda: served.api.connections == 0, what="the end of the connection")


def test_a_web_page_and_a_compressed_body_are_refused(shared: Served) -> None:
    assert shared.error("GET", "/1/host", Origin="https://example.org")[:2] == (403, "refused")
    headers = {"Content-Encoding": "gzip"}
    assert shared.error("POST", "/1/containers", b"x", **headers)[:2] == (400, "usage")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WITH_BODY = [route for route in ROUTES if route.body and not route.path.endswith("/ws")]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_no_json_makes_the_server_fail(shared: Served, data: st.DataObject) -> None:
    route = data.draw(st.sampled_from(WITH_BODY))
    names = st.sampled_from([field.name for field in route.body]) | st.text()
    body = data.draw(st.dictionaries(names, JSON, max_size=6) | JSON)
    status, answer = shared.request(route.method, route.path.replace("{ref}", "web"), body)
    assert status in (200, 202, 400), answer
    assert (status == 400) == ("error" in answer)


@settings(max_examples=200, deadline=None)
@given(tail=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#"), max_size=60))
def test_no_path_or_query_makes_the_server_fail(shared: Served, tail: str) -> None:
    status, answer = shared.request("GET", f"/1/{tail}".replace("usage", "use").replace("events", "e"))
    assert status in (200, 400, 404, 405), answer


TYPES = (
    Text(5), Text(5, raw=True), Text(choices=("a", "b")), Number(-3, 7), Number(0, 1, whole=False), Boolean(),
    Array(Number(0, 9), 3), Table(Text(3), 2), Nullable(Boolean()), Anything(),
    Object((Field("a", Boolean(), "", required=True), Field("b", Text(3), ""))),
)  # fmt: skip


@settings(max_examples=500)
@given(type_=st.sampled_from(TYPES), value=JSON)
def test_a_checked_value_is_the_value_and_can_be_encoded(type_: Any, value: Any) -> None:
    try:
        checked = type_.check(value, "x")
    except UsageError as error:
        error.message.encode()
        return
    assert checked == value
    json.dumps(checked, allow_nan=False)


def test_events_come_as_they_happen(served: Served) -> None:
    with served.stream("/1/events") as response:
        assert response.getheader("Content-Type") == "text/event-stream"
        assert response.readline() == b": from now on\n"
        assert response.readline() == b"\n"
        served.engine.bus.publish("container", id=101, change="started")
        assert response.readline() == b"event: container\n"
        event = json.loads(response.readline().removeprefix(b"data: "))
        assert (event["kind"], event["id"], event["change"]) == ("container", 101, "started")
    wait_until(lambda: not served.engine.bus.heard, what="the end of the subscription")


def test_a_silent_stream_has_a_heartbeat(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_S", 0.02)
    with served.stream("/1/events") as response:
        lines = [response.readline() for _ in range(6)]
    assert lines.count(b": still here\n") == 2


def test_a_log_is_followed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FOLLOW_S", 0.01)
    assert served.request("GET", "/1/containers/web/logs?kind=console") == (200, b"boot\n")
    with served.stream("/1/containers/web/logs?follow=true") as response:
        assert response.readline() == b"boot\n"
        served.engine.console = b"ot\nlogin:\n"
        assert response.readline() == b"login:\n"


def test_the_daemon_tells_of_itself_and_ends_when_asked(served: Served) -> None:
    daemon = served.request("GET", "/1/daemon")[1]["daemon"]
    assert (daemon["pid"], daemon["supervisor"]) == (os.getpid(), None)
    assert served.request("POST", "/1/daemon/stop") == (200, {})
    assert served.stop_asked.wait(10)


def test_a_missing_container_is_told_before_the_upgrade(shared: Served) -> None:
    headers = {
        "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }  # fmt: skip
    assert shared.error("GET", "/1/containers/missing/exec/ws", **headers)[:2] == (404, "not-found")


def test_the_description_names_every_route_once(shared: Served) -> None:
    status, document = shared.request("GET", "/1/openapi.json")
    assert status == 200
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == len(ROUTES)
    assert len({operation["operationId"] for operation in operations}) == len(ROUTES)
    body = document["paths"]["/1/containers"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["name"]
    assert body["additionalProperties"] is False
    assert openapi.document(ROUTES) == document


def test_every_route_is_found_by_its_path() -> None:
    root = tree(ROUTES)
    for route in ROUTES:
        segments = [segment.replace("{", "").replace("}", "") for segment in route.path.split("/")[1:]]
        assert find(root, segments)[0][route.method] is route


def test_errors_keep_their_http_state() -> None:
    assert {error.http_status for error in (server.TooLarge, server.TooSlow, server.WrongMethod)} == {
        413,
        408,
        405,
    }
    assert issubclass(server.TooLarge, SysctrError)
