"""A daemon and a supervisor as the command line sees them: an HTTP server and a ticket socket."""

import json
import os
import socket
import socketserver
import subprocess
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from sysctr.paths import Layout


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def answer(self):
        parts = urlsplit(self.path)
        size = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.server.stub.requests.append((self.command, unquote(parts.path), query, body))
        found = self.server.stub.routes.get((self.command, unquote(parts.path)))
        if found is None:
            error = {"code": "not-found", "message": f"cannot find {parts.path}: no such route", "hint": ""}
            found = (404, {"error": error})
        if callable(found):
            found = found(query, body)
        if isinstance(found, Exception):
            found = (found.http_status, {"error": found.as_dict()})
        if isinstance(found, list | dict):
            found = (200, found)
        status, value = found
        self.send_response(status)
        if isinstance(value, list) and value and value[0] == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in value[1:]:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
            return
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def get_request(self):
        connection, _ = super().get_request()
        self.stub.connections.append(connection)
        return connection, "unix"


class Stub:
    """An HTTP server on the layout's socket that answers from a table and remembers what was asked."""

    def __init__(self, root):
        self.layout = Layout(str(root))
        os.makedirs(self.layout.run)
        self.routes = {}
        self.requests = []
        self.connections = []
        self.server = _Server(self.layout.api_socket, _Handler)
        self.server.stub = self
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def hang_up(self):
        """Close every connection that is open, as a daemon does with idle ones."""
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self.hang_up()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def task(self, kind="start", container=101, **fields):
        """Return a task as the API sends it."""
        task = {
            "id": "7f3a09c1d2e4", "kind": kind, "container": container, "state": "done", "step": "",
            "progress_bytes": 0, "total_bytes": 0, "created": 1.0, "started": 1.0, "ended": 2.0,
            "error": None, "result": None,
        }  # fmt: skip
        return {**task, **fields}

    def container(self, number=101, name="demo", **fields):
        """Return a container as the API lists it."""
        container = {
            "id": number, "name": name, "state": "running", "booted": True, "template": "debian-12",
            "tags": [],
            "addresses": ["10.0.3.2"], "uptime_s": 61, "pid": 4242, "cpu_s": 1.5, "memory_bytes": 10485760,
            "memory_max_bytes": None, "pids": 9, "onboot": False, "protected": False, "pending": [],
            "exit": None, "task": None,
        }  # fmt: skip
        return {**container, **fields}


class Tickets:
    """A ticket socket; `serve(connection, ticket)` runs in a thread for every connection."""

    def __init__(self, layout, serve):
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(layout.ticket_socket)
        self._listener.listen(16)
        self._serve = serve
        self._threads = []
        self.failures = []
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._run, args=(connection,))
            thread.start()
            self._threads.append(thread)

    def _run(self, connection):
        with connection:
            try:
                self._serve(connection, json.loads(connection.recv(65536))["ticket"])
            except Exception as failure:
                self.failures.append(failure)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for thread in self._threads:
            thread.join()
        assert self.failures == []


def send(connection, message, fds=()):
    socket.send_fds(connection, [json.dumps(message).encode()], list(fds))


def run_program(connection, argv, wait_for_signal=False):
    """Be the supervisor of one program with real pipes, to its exit message."""
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        pipes = (process.stdin, process.stdout, process.stderr)
        names = ["stdin", "stdout", "stderr"]
        send(connection, {"ok": True, "fds": names}, [pipe.fileno() for pipe in pipes])
        for pipe in pipes:
            pipe.close()
        process.stdin = None
        if wait_for_signal:
            process.send_signal(json.loads(connection.recv(65536))["signal"])
        status = process.wait()
        try:
            send(connection, {"exit": status if status >= 0 else 128 - status})
        except BrokenPipeError:
            pass
