"""Who a host is to others: a key and a certificate that it has signed itself, known by its fingerprint.

DIR/identity.pem    the key and the certificate, together so that they can be replaced in one step
DIR/next.pem        the pair that takes its place once every other host has been told

Nobody but the two hosts has a say: there is no authority, no name and no date in it that counts.
"""

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

from sysctr.errors import SysctrError
from sysctr.linux import files

CERTIFICATE_LIMIT_BYTES = 4096
_FILE_LIMIT_BYTES = 64 << 10
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]+)-----END CERTIFICATE-----\n")
_NAME = "sysctr "


@dataclass(frozen=True)
class Identity:
    """The file of a pair, and what of it others may know."""

    path: str
    certificate: str  # PEM
    fingerprint: str  # sha256 of the DER, in hex

    def sign(self, data: bytes) -> bytes:
        """Return our signature of data."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        text, _ = files.read_bounded(self.path, _FILE_LIMIT_BYTES)
        key: Any = load_pem_private_key(text, None)
        return key.sign(data)


def fingerprint_of(certificate: str) -> str:
    """Return the fingerprint of a certificate in PEM; ValueError for what is none."""
    found = _CERTIFICATE.fullmatch(certificate)
    if found is None or len(certificate) > CERTIFICATE_LIMIT_BYTES:
        raise ValueError("it is no certificate")
    try:
        der = base64.b64decode(found[1].replace("\n", ""), validate=True)
    except binascii.Error as error:
        raise ValueError("it is no certificate") from error
    return hashlib.sha256(der).hexdigest()


def read(directory: str, name: str = "identity.pem") -> Identity:
    """Return the identity in a directory; FileNotFoundError where there is none."""
    path = f"{directory}/{name}"
    text, _ = files.read_bounded(path, _FILE_LIMIT_BYTES)
    found = _CERTIFICATE.search(text.decode("ascii", "replace"))
    if found is None:
        raise SysctrError(f"cannot read {path}: there is no certificate in it", "remove it to get a new one")
    return Identity(path, found[0], fingerprint_of(found[0]))


def obtain(directory: str) -> Identity:
    """Return the identity in a directory, made at first need."""
    try:
        return read(directory)
    except FileNotFoundError:
        return make(directory)


def make(directory: str, name: str = "identity.pem") -> Identity:
    """Make a pair in a directory and return it."""
    os.makedirs(directory, 0o700, exist_ok=True)
    try:
        files.write_atomically(f"{directory}/{name}", _new_pair())
    except OSError as error:
        raise SysctrError(f"cannot make a key for other hosts: {directory}: {error.strerror}") from error
    return read(directory, name)


def succeed(directory: str) -> Identity:
    """Let the next pair take the place of the present one."""
    os.rename(f"{directory}/next.pem", f"{directory}/identity.pem")
    files.sync_directory(directory)
    return read(directory)


def _new_pair() -> bytes:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _name_of(key.public_key()))])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # The clock of either host may be anywhere; trust ends when it is taken back.
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, None)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def _name_of(public_key: Any) -> str:
    from cryptography.hazmat.primitives import serialization

    data = public_key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _NAME + hashlib.sha256(data).hexdigest()[:40]


def check(certificate: str) -> str:
    """Return the fingerprint of a certificate that came from elsewhere; ValueError for one unlike ours.

    The library looks for certificates by their names, so one must not have the name of another's.
    """
    public_key, subject = _open(certificate)
    if subject != _name_of(public_key):
        raise ValueError("its certificate has another's name")
    return fingerprint_of(certificate)


def verify(certificate: str, signature: bytes, data: bytes) -> bool:
    """Tell whether the owner of a certificate has signed this."""
    from cryptography.exceptions import InvalidSignature

    try:
        _open(certificate)[0].verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _open(certificate: str) -> tuple[Any, str]:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    fingerprint_of(certificate)
    try:
        parsed = x509.load_pem_x509_certificate(certificate.encode("ascii"))
        public_key = parsed.public_key()
        if not isinstance(public_key, Ed25519PublicKey):
            raise ValueError("its certificate has another kind of key")
        public_key.verify(parsed.signature, parsed.tbs_certificate_bytes)
        subject = parsed.subject.rfc4514_string()
        if parsed.subject != parsed.issuer:
            raise ValueError("its certificate was signed by another")
    except (InvalidSignature, UnsupportedAlgorithm) as error:
        raise ValueError("its certificate does not hold") from error
    return public_key, subject.removeprefix("CN=")
