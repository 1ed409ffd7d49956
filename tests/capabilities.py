"""What root may do besides being root: a thread lays a capability down for a while."""

import contextlib
import ctypes
import struct
from collections.abc import Iterator

from sysctr.linux.syscall import bind, check

CAP_SYS_RESOURCE = 24

_VERSION_3 = 0x20080522
_capget = bind("capget", ctypes.c_char_p, ctypes.c_char_p)
_capset = bind("capset", ctypes.c_char_p, ctypes.c_char_p)


@contextlib.contextmanager
def without_capability(number: int) -> Iterator[None]:
    """Have this thread act without a capability while entered; what it starts has it all the same."""
    header = struct.pack("=Ii", _VERSION_3, 0)
    # Twice 32 of the effective, the permitted and the inheritable ones.
    before = ctypes.create_string_buffer(24)
    check(_capget(header, before), "capget")
    words = list(struct.unpack("=6I", before.raw))
    words[number // 32 * 3] &= ~(1 << number % 32)
    check(_capset(header, struct.pack("=6I", *words)), "capset")
    try:
        yield
    finally:
        check(_capset(header, before.raw), "capset")
