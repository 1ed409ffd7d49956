"""Where this host listens for others, while there is anybody to listen to, and where others find it.

lib/peer/listen    the address that `sysctr peer token --listen` chose, where host.toml chooses none
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence

from sysctr.config.addresses import parse_listen
from sysctr.engine.host import Host
from sysctr.engine.peer_records import MOST_ADDRESSES
from sysctr.engine.peer_tokens import own_addresses, with_port
from sysctr.errors import Refused, SysctrError
from sysctr.linux import files
from sysctr.peer import identity
from sysctr.peer.channel import Channel
from sysctr.peer.dial import parse_address
from sysctr.peer.server import Server

log = logging.getLogger(__name__)

_ANYWHERE = "[::]:8645"
_OFF = "off"


class Listener:
    """Listens or does not, as `adjust` finds it wanted; until somebody comes it costs a socket."""

    def __init__(
        self,
        host: Host,
        wanted: Callable[[], bool],
        certificates: Callable[[], list[str]],
        serve: Callable[[Channel], None],
    ) -> None:
        self._host = host
        self._directory = host.where.peer
        self._wanted = wanted
        self._certificates = certificates
        self._serve = serve
        # Held while a server is opened or closed; no thread that serves may want it.
        self._lock = threading.Lock()
        self._server: Server | None = None
        self._closed = False
        self.problem = ""

    @property
    def address(self) -> str:
        """Return where it listens now; empty while it does not."""
        return self.wanted_address() if self._server is not None else ""

    def wanted_address(self) -> str:
        """Return where it listens when it does: as host.toml says, as a token chose, or anywhere."""
        if told := self._host.settings.peer.listen:
            return told
        try:
            data, _ = files.read_bounded(f"{self._directory}/listen", 300)
            return parse_listen(data.decode("ascii").strip()) or _ANYWHERE
        except FileNotFoundError:
            return _ANYWHERE
        except (OSError, ValueError, SysctrError) as error:
            log.error("%s/listen: %s", self._directory, error)
            return _ANYWHERE

    def choose(self, where: str) -> None:
        """Listen somewhere else from now on; raises Refused where host.toml says otherwise."""
        told = self._host.settings.peer.listen
        if told and told != where:
            raise Refused(f"cannot listen at {where}: host.toml says {told}", "change [peer] listen there")
        data = parse_listen(where).encode() + b"\n"
        os.makedirs(self._directory, 0o700, exist_ok=True)
        files.write_atomically(f"{self._directory}/listen", data)

    def refuse_if_off(self, doing: str) -> None:
        """Raise Refused where the settings forbid to listen."""
        if self.wanted_address() == _OFF:
            raise Refused(f"cannot {doing}: this host does not listen", "[peer] listen in host.toml is off")

    def adjust(self) -> None:
        """Listen if there is somebody to listen to, where the settings say; `problem` says why it cannot."""
        with self._lock:
            if self._closed:
                return
            where = self.wanted_address()
            address = parse_address(where) if where != _OFF and self._wanted() else None
            if self._server is not None:
                if self._server.address == address:
                    return
                self._server.close()
                self._server = None
                log.info("listening for other hosts no more")
            if address is None:
                self.problem = ""
                return
            server = Server(lambda: identity.obtain(self._directory), self._certificates, self._serve)
            try:
                server.listen(*address)
            except SysctrError as error:
                if error.message != self.problem:
                    log.error("%s", error.message)
                self.problem = error.message
                return
            self.problem = ""
            self._server = server
            log.info("listening for other hosts at %s", where)

    def turn_out(self, fingerprints: Sequence[str]) -> None:
        """End the connections of a host that is not trusted any more."""
        server = self._server
        if server is not None:
            for fingerprint in fingerprints:
                server.turn_out(fingerprint)

    def close(self) -> None:
        """Listen no more and end all connections that others made."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
            if server is not None:
                server.close()

    def addresses(self, given: Sequence[str] = ()) -> tuple[str, ...]:
        """Return where others reach this host: as was said, as the settings say, or what there is."""
        where = self.wanted_address()
        if where == _OFF:
            return ()
        host, port = parse_address(where)
        told = tuple(given) or self._host.settings.peer.addresses
        if told:
            return with_port(told, port)[:MOST_ADDRESSES]
        if host not in ("::", "0.0.0.0"):
            return with_port([where], port)
        return own_addresses(port, self._host.network.bridge)
