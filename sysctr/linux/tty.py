"""Pseudo-terminals of one devpts instance, by descriptor (pts(4), ioctl_tty(2))."""

import fcntl
import os
import struct
import termios

TIOCGPTPEER = 0x5441
TIOCSPTLCK = 0x40045431
TIOCGPTN = 0x80045430


def open_pty(ptmx_path: str = "/dev/pts/ptmx") -> tuple[int, int, int]:
    """Return (master_fd, slave_fd, number) of a new pty; both descriptors are close-on-exec."""
    master_fd = os.open(ptmx_path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master_fd, TIOCSPTLCK, struct.pack("i", 0))
        number = struct.unpack("i", fcntl.ioctl(master_fd, TIOCGPTN, struct.pack("i", 0)))[0]
        # TIOCGPTPEER needs no path, so it cannot be led to another file system by what is mounted there.
        slave_fd = fcntl.ioctl(master_fd, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        os.close(master_fd)
        raise
    return master_fd, slave_fd, number


def set_window_size(fd: int, rows: int, columns: int) -> None:
    """Set the size a terminal reports."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def make_controlling(fd: int) -> None:
    """Make `fd` the controlling terminal of this session leader."""
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
