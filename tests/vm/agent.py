"""Runs inside a virtual host: executes the commands that the test outside sends over a virtio serial port.

A message is one line of JSON, followed by as many raw bytes as its numbers say. Standard library only.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import BinaryIO

PORT = "/dev/virtio-ports/sysctr"


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests one after the other until the port is closed."""
    send(replies, {"ready": True})
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["size"])
        try:
            if "run" in request:
                run(replies, request, data)
            else:
                put(request, data)
                send(replies, {"done": True})
        except OSError as error:
            send(replies, {"error": str(error)})


def run(replies: BinaryIO, request: dict, data: bytes) -> None:
    # Files instead of pipes: a daemon that a command leaves behind may keep its output open for ever.
    file = tempfile.TemporaryFile
    with file() as stdin, file() as stdout, file() as stderr:
        stdin.write(data)
        stdin.seek(0)
        child = subprocess.Popen(
            request["run"],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=request["cwd"],
            env=request["env"],
            start_new_session=True,
        )
        timed_out = False
        try:
            status = child.wait(request["timeout_s"])
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        output, errors = read(stdout), read(stderr)
    sizes = {"stdout": len(output), "stderr": len(errors)}
    send(replies, {"status": status, "timed_out": timed_out, **sizes}, output + errors)


def read(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def put(request: dict, data: bytes) -> None:
    path = request["put"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, request["mode"])


def send(replies: BinaryIO, message: dict, data: bytes = b"") -> None:
    replies.write(json.dumps(message).encode() + b"\n" + data)
    replies.flush()


if __name__ == "__main__":
    # The port may be opened only once, so both directions share the descriptor.
    port_fd = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    with open(port_fd, "rb") as requests, open(os.dup(port_fd), "wb") as replies:
        serve(requests, replies)
    sys.exit(0)
