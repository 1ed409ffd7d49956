"""Extended attributes, read so that every kernel that we support tells them as they are."""

import ctypes
import errno

from sysctr.linux.syscall import KernelError, bind, check

_fgetxattr = bind(
    "fgetxattr", ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, restype=ctypes.c_ssize_t
)


def read(fd: int, name: str) -> bytes:
    """Return one attribute of an open file; raises OSError.

    Linux 6.0 and 6.1 map the users of an access list through an idmapped mount only where the buffer has the
    very size of the list, or one that a list can have: they look at the wrong number. In any other, such as
    that of os.getxattr, all of them are nobody.
    """
    while True:
        size = check(_fgetxattr(fd, name.encode(), None, 0), "fgetxattr", name)
        buffer = ctypes.create_string_buffer(size)
        try:
            count = check(_fgetxattr(fd, name.encode(), buffer, size), "fgetxattr", name)
        except KernelError as error:
            if error.errno == errno.ERANGE:  # it has grown meanwhile
                continue
            raise
        if count == size:
            return buffer.raw
