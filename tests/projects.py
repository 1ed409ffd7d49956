"""What somebody inside may try in order to leave a project, and how it has to end."""

import json

# Given to an interpreter that runs as the root of a container: standard library only. Its argument is a
# directory to write to; it prints what came of each attempt on that, on a directory and on a file made in it.
LEAVE = r"""
import ctypes, errno, fcntl, json, os, struct, sys
GET, SET, GETFLAGS, SETFLAGS = 0x801C581F, 0x401C5820, 0x80086601, 0x40086602
PROJINHERIT_XFLAG, PROJINHERIT_FLAG = 0x200, 0x20000000
QUOTACTL_FD, SET_PROJECT_QUOTA, BOTH_LIMITS = 443, 0x800008 << 8 | 2, 5
libc = ctypes.CDLL(None, use_errno=True)

def outcome(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def attempts(path):
    fd = os.open(path, os.O_RDONLY)
    now = bytearray(28)
    fcntl.ioctl(fd, GET, now)
    xflags, extsize, nextents, projid, cowextsize = struct.unpack("=5I8x", now)

    def put(xflags, projid):
        fcntl.ioctl(fd, SET, struct.pack("=5I8x", xflags, extsize, nextents, projid, cowextsize))

    def change_flags():
        flags = bytearray(8)
        fcntl.ioctl(fd, GETFLAGS, flags, True)
        number = struct.unpack("=Q", flags)[0] ^ PROJINHERIT_FLAG
        fcntl.ioctl(fd, SETFLAGS, struct.pack("=Q", number))

    def limit():
        data = struct.pack("=8QII", 1 << 40, 0, 0, 0, 0, 0, 0, 0, BOTH_LIMITS, 0)
        if libc.syscall(QUOTACTL_FD, fd, SET_PROJECT_QUOTA, projid, data) < 0:
            raise OSError(ctypes.get_errno(), "")

    return {
        "project": projid, "same": outcome(put, xflags, projid), "none": outcome(put, xflags, 0),
        "other": outcome(put, xflags, projid + 2), "xflag": outcome(put, xflags ^ PROJINHERIT_XFLAG, projid),
        "flag": outcome(change_flags), "limit": outcome(limit),
    }

top = sys.argv[1]
os.makedirs(f"{top}/made/here")
open(f"{top}/made/file", "w").close()
print(json.dumps([attempts(f"{top}{path}") for path in ("", "/made", "/made/file")]))
"""


def refused(output: str) -> set[int]:
    """See that every attempt was refused, and return the projects that they were made on."""
    projects = set()
    for tried in json.loads(output):
        projects.add(tried.pop("project"))
        # Writing what is there already is allowed, so that it is the change that is refused.
        assert tried.pop("same") == "done"
        assert tried.pop("limit") in ("EPERM", "ENOSYS")
        assert set(tried.values()) <= {"EINVAL", "EPERM"}, tried
    return projects
