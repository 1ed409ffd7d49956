"""What the host sets up in a guest: its name, its resolver, and who may log in."""

import ctypes
import threading
from collections.abc import Sequence

from sysctr.config.values import shown
from sysctr.engine.plan import GuestFile
from sysctr.errors import SysctrError, UsageError

_PUBLIC_KEY_KINDS = (
    "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
)  # fmt: skip
_crypt_lock = threading.Lock()


def guest_files(
    name: str, addresses: Sequence[str], nameservers: Sequence[str], search: Sequence[str], domain: str
) -> tuple[GuestFile, ...]:
    """Return the files that are kept current in a guest before each start.

    /etc/hosts names the container by its first address, or by 127.0.1.1 without one (Debian's custom).
    """
    own = addresses[0].partition("/")[0] if addresses else "127.0.1.1"
    full = f"{name}.{domain} {name}" if domain else name
    hosts = (
        "127.0.0.1 localhost\n"
        f"{own} {full}\n"
        "::1 localhost ip6-localhost ip6-loopback\n"
        "ff02::1 ip6-allnodes\n"
        "ff02::2 ip6-allrouters\n"
    )
    files = [GuestFile("/etc/hostname", f"{name}\n"), GuestFile("/etc/hosts", hosts)]
    if nameservers:
        lines = [f"search {' '.join(search)}"] if search else []
        lines += [f"nameserver {server}" for server in nameservers]
        files.append(GuestFile("/etc/resolv.conf", "\n".join(lines) + "\n"))
    return tuple(files)


def login_setup(ssh_keys: Sequence[str], password_hash: str | None) -> dict | None:
    """Return the work that lets root log in with these keys and this password; None when there is none."""
    if not ssh_keys and password_hash is None:
        return None
    program: dict = {"builtin": "setup"}
    if ssh_keys:
        program["append"] = [
            {"path": "/root/.ssh/authorized_keys", "line": check_ssh_key(key), "mode": 0o600}
            for key in ssh_keys
        ]
    if password_hash is not None:
        program["passwords"] = {"root": password_hash}
    return program


def check_ssh_key(key: str) -> str:
    """Return a public key's line, or raise UsageError when it is none (a private key, say)."""
    line = key.strip()
    if line.startswith("-----BEGIN"):
        raise UsageError("cannot use this ssh key: it is a private key", "give the file that ends in .pub")
    words = line.split()
    if "\n" in line or "\0" in line or not any(kind in words for kind in _PUBLIC_KEY_KINDS):
        raise UsageError(
            f"cannot use the ssh key {shown(line)}: it is not one line of a public key file",
            "give a file such as ~/.ssh/id_ed25519.pub",
        )
    return line


def hash_password(password: str) -> str:
    """Return the crypt(5) hash of a password, with the strongest method the host's libcrypt prefers."""
    if not password or "\0" in password or "\n" in password:
        raise UsageError("cannot use this password: it is empty or has a line break")
    try:
        libcrypt = ctypes.CDLL("libcrypt.so.1")
    except OSError as error:
        raise SysctrError("cannot hash a password: the host has no libcrypt") from error
    libcrypt.crypt_gensalt.restype = ctypes.c_char_p
    libcrypt.crypt_gensalt.argtypes = [ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_int]
    libcrypt.crypt.restype = ctypes.c_char_p
    libcrypt.crypt.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    with _crypt_lock:  # both functions answer in one static buffer
        # SHA-512 rather than yescrypt: every distribution of the last fifteen years can read it.
        salt = libcrypt.crypt_gensalt(b"$6$", 0, None, 0)
        hashed = libcrypt.crypt(password.encode(), salt) if salt else None
    if not hashed or hashed.startswith(b"*"):
        raise SysctrError("cannot hash a password: libcrypt refused it")
    return hashed.decode()
