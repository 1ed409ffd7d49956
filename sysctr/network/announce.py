"""Tells a network that an address is here now, with this MAC: what RFC 5227 calls an ARP announcement.

A container that comes from another host, or takes over an address, would else be looked for where others saw
it last until their caches expire.
"""

import logging
import socket
import struct
import threading
from collections.abc import Iterable
from ipaddress import IPv4Address

log = logging.getLogger(__name__)

ETH_P_ARP = 0x0806
_BROADCAST = b"\xff" * 6
_UNKNOWN = bytes(6)
_ETHERNET = struct.Struct("!6s6sH")  # to, from, protocol
# struct arphdr with Ethernet and IPv4: their types and lengths, operation, sender and target.
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_REQUEST, _REPLY = 1, 2
_ETHERNET_TYPE, _IPV4_TYPE = 1, 0x0800


def announcements(mac: str, address: str) -> tuple[bytes, bytes]:
    """Return the frames that announce an address: the request of RFC 5227, and the reply some listen for.

    >>> [frame[20:22].hex() for frame in announcements("02:00:00:00:00:01", "192.0.2.7")]
    ['0001', '0002']
    """
    own, ip = bytes.fromhex(mac.replace(":", "")), IPv4Address(address).packed
    header = _ETHERNET.pack(_BROADCAST, own, ETH_P_ARP)

    def frame(operation: int, target: bytes) -> bytes:
        return header + _ARP.pack(_ETHERNET_TYPE, _IPV4_TYPE, 6, 4, operation, own, ip, target, ip)

    return frame(_REQUEST, _UNKNOWN), frame(_REPLY, _BROADCAST)


class Announcer:
    """Sends announcements out of bridges of this host, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def announce(self, bridge: str, mac: str, addresses: Iterable[str]) -> None:
        """Announce addresses to everybody on a bridge. Nobody waits for it: what fails is logged."""
        try:
            for address in addresses:
                for frame in announcements(mac, address):
                    self._opened().sendto(frame, socket.MSG_DONTWAIT, (bridge, ETH_P_ARP))
        except OSError as error:
            log.warning("cannot announce %s on %s: %s", " ".join(addresses), bridge, error)

    def close(self) -> None:
        """Close the socket; the next announcement opens another one."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _opened(self) -> socket.socket:
        # Kept open, because the kernel takes tens of milliseconds to close one of these. It receives nothing:
        # its protocol is 0.
        with self._lock:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            return self._socket
