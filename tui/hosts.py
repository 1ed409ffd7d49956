"""The connection to one host: requests in threads, events as they come, and for ever another try.

The command line's own client does the talking, so both say the same of what goes wrong. It waits for answers,
and the terminal must not: everything here that waits does so in a thread.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sysctr import errors
from sysctr.client import Client, path
from sysctr.tui.store import HostView

_THREADS = 8
# Of a log without line ends so much is one line.
_LONGEST_LINE_BYTES = 64 * 1024
# From one try to the next; each waits longer, up to the last.
_TRIES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
# What happens at once is asked about once.
_GATHER_S = 0.15
# Lists that are asked for when they are looked at, and what of an event they come from.
LISTS = {
    "templates": ("templates",), "backups": ("backups",), "backup-jobs": ("backup-jobs",),
    "pools": ("pools",),
    "peers": ("peers",), "migrations": ("migrations",), "replicas": ("replicas",),
}  # fmt: skip
_BEGUN = object()
_KEYS = {"backups": "archives", "backup-jobs": "jobs"}
_TOUCHED = {
    "template": ("templates",), "backup": ("backups", "backup-jobs"), "backup-job": ("backup-jobs",),
    "pool": ("pools",), "pool-low": ("pools",), "migration": ("migrations",), "peer": ("peers",),
    "container": ("replicas", "migrations"),
}  # fmt: skip


class Connection:
    """Keeps what is known of one host up to date, and sends it requests."""

    def __init__(
        self, view: HostView, make_client: Callable[[], Client], changed: Callable[[str], None]
    ) -> None:
        self.view = view
        self._make_client = make_client
        # Called with what has changed: "link", "containers", "tasks", or the name of a list.
        self._changed = changed
        # Of its own: a host that hangs must not take the threads of the others.
        self._threads = ThreadPoolExecutor(_THREADS, f"requests of {view.name}")
        self._idle: list[Client] = []
        self._lock = threading.Lock()
        self._again = asyncio.Event()
        self._touched: set[str] = set()
        self._closing = False
        self._following: Client | None = None
        self.wanted_lists: set[str] = set()
        # Set when it is known for the first time whether the host answers.
        self.tried = asyncio.Event()

    # Requests

    async def request(
        self, method: str, where: str, body: object = None, query: "Mapping[str, object] | None" = None
    ) -> Any:
        """Send a request and return the answer; raises SysctrError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._request, method, where, body, query)

    def _request(self, method: str, where: str, body: object, query: "Mapping[str, object] | None") -> Any:
        with self._lock:
            client = self._idle.pop() if self._idle else self._make_client()
        try:
            return client.request(method, where, body, query)
        finally:
            with self._lock:
                if self._closing:
                    client.close()
                else:
                    self._idle.append(client)

    async def get(self, *segments: "str | int", **query: object) -> Any:
        """Return what is at an address of the API."""
        return await self.request("GET", path(*segments), None, query)

    async def follow(
        self, where: str, query: "Mapping[str, object] | None" = None
    ) -> "AsyncGenerator[list[str]]":
        """Yield the lines of an answer as they come, some at a time; raises SysctrError.

        The answer is ended when nobody wants the next lines any more.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        client = self._make_client()
        closed = threading.Event()

        def put(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        def read() -> None:
            try:
                for piece in client.stream(where, query):
                    if closed.is_set():
                        break
                    put(piece)
                put(None)
            except errors.SysctrError as error:
                put(error)
            finally:
                client.close()

        threading.Thread(target=read, name=f"log of {self.view.name}", daemon=True).start()
        left, ended = b"", False
        try:
            while not ended:
                batch = [await pieces.get()]
                # What comes meanwhile is drawn with it: each drawing takes its time.
                await asyncio.sleep(_GATHER_S)
                while not pieces.empty():
                    batch.append(pieces.get_nowait())
                lines: list[bytes] = []
                for piece in batch:
                    if isinstance(piece, bytes):
                        *more, left = (left + piece).split(b"\n")
                        lines += more
                        if len(left) > _LONGEST_LINE_BYTES:
                            lines.append(left)
                            left = b""
                    elif isinstance(piece, errors.SysctrError):
                        raise piece
                    else:
                        ended = True
                if ended and left:
                    lines.append(left)
                yield [line.decode("utf-8", "replace").rstrip("\r") for line in lines]
        finally:
            closed.set()
            client.hang_up()

    # Keeping up

    async def run(self) -> None:
        """Follow the host until the connection is closed."""
        tries = 0
        while not self._closing:
            self._set_link("connecting" if not tries else self.view.link, self.view.reason)
            began_s = time.monotonic()
            try:
                await self._follow()
                reason = "the daemon has ended"
            except (errors.Refused, errors.NotFound) as error:
                # A peer that this host may not manage: it stays one line in the list of hosts.
                self._set_link("refused", error.message.partition(": ")[2] or error.message)
                self.view.containers.clear()
                self._changed("containers")
                # Until one asks for it: that may have been changed there.
                self._again.clear()
                await self._again.wait()
                continue
            except errors.SysctrError as error:
                reason = error.message.partition(": ")[2] or error.message
            except Exception as error:  # a mistake must not end what keeps the host up to date
                reason = f"a mistake in sysctr: {error!r}"
            if self._closing:
                return
            # One that was up for a while is likely to come back soon.
            tries = 0 if self.view.up and time.monotonic() - began_s > _TRIES_S[-1] else tries
            pause_s = _TRIES_S[min(tries, len(_TRIES_S) - 1)]
            tries += 1
            self.view.retry_at_s = time.monotonic() + pause_s
            self._set_link("down", reason)
            self._again.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._again.wait()

    def try_now(self) -> None:
        """Do not wait for the next try."""
        self._again.set()

    def close(self) -> None:
        """End it; what waits for an answer is left alone."""
        self._closing = True
        self._again.set()
        if self._following is not None:
            self._following.hang_up()
        with self._lock:
            for client in self._idle:
                client.close()
            self._idle.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _set_link(self, link: str, reason: str) -> None:
        if link == "down":
            self.view.forget_running()
        self.view.link, self.view.reason = link, reason
        if link != "connecting":
            self.tried.set()
        self._changed("link")

    async def _follow(self) -> None:
        """Ask for everything, and then for what events say has changed; returns when they end."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def listen(client: Client) -> None:
            try:
                for event in client.events(begun=lambda: put(_BEGUN)):
                    put(event)
                put(None)
            except errors.SysctrError as error:
                put(error)
            except Exception as error:
                put(errors.SysctrError(f"a mistake in sysctr: {error!r}"))
            finally:
                client.close()

        client = self._following = self._make_client()
        name = f"events of {self.view.name}"
        threading.Thread(target=listen, args=(client,), name=name, daemon=True).start()
        try:
            await self._take_all(queue)
        finally:
            client.hang_up()

    async def _take_all(self, queue: "asyncio.Queue[Any]") -> None:
        stale_s: float | None = None
        while not self._closing:
            try:
                async with asyncio.timeout(None if stale_s is None else max(0.0, stale_s - time.monotonic())):
                    item = await queue.get()
            except TimeoutError:
                stale_s = None
                await self._refresh_touched()
                continue
            if item is None:
                return
            if isinstance(item, errors.SysctrError):
                raise item
            if item is _BEGUN:
                await self.refresh()
            elif self._take(*item) and stale_s is None:
                stale_s = time.monotonic() + _GATHER_S

    async def refresh(self) -> None:
        """Ask for everything that is shown."""
        await self.refresh_containers()
        self.view.set_tasks((await self.get("tasks"))["tasks"])
        self.view.facts = (await self.get("host"))["host"]
        for name in {"peers", *self.wanted_lists}:
            await self.refresh_list(name)
        self._set_link("up", "")
        self._changed("tasks")

    async def refresh_containers(self) -> None:
        """Ask for the containers."""
        number = self.view.ask()
        answer = await self.get("containers")
        if self.view.set_containers(number, answer, time.monotonic()):
            self._changed("containers")

    async def refresh_snapshots(self, number: int) -> "Any":
        """Ask for the snapshots of a container."""
        return await self.get("containers", number, "snapshots")

    async def refresh_list(self, name: str) -> None:
        """Ask for one of the lists that are looked at seldom; what is wrong with it is kept beside it."""
        try:
            answer = await self.get(*LISTS[name])
        except errors.NoDaemon:
            raise
        except errors.SysctrError as error:
            self.view.problems[name] = error.message
        else:
            self.view.lists[name] = answer[_KEYS.get(name, name)]
            self.view.problems.pop(name, None)
        self._changed(name)

    async def _refresh_touched(self) -> None:
        touched, self._touched = self._touched, set()
        await self.refresh_containers()
        for name in sorted(self.wanted_lists & touched):
            await self.refresh_list(name)

    def _take(self, kind: str, data: Any) -> bool:
        """Take one event; True where something has to be asked for because of it."""
        touched = _TOUCHED.get(kind, ())
        self._touched.update(touched)
        if kind == "task":
            before = self.view.tasks.get(data["task"]["id"])
            self.view.set_task(data["task"])
            self._changed("tasks")
            # Its progress changes nothing but itself.
            return before is None or before["state"] != data["task"]["state"]
        return kind == "container" or bool(self.wanted_lists.intersection(touched))
