"""Both sides of the BCP 195 TLS Profile (PS3.15 B.12): TLS 1.2 or 1.3, forward secrecy, mutual authentication."""

from __future__ import annotations

import ssl
from pathlib import Path

from dicomnode.errors import LocalError
from dicomnode.remotes import TlsFiles


def server_context(certificate: Path, key: Path, client_ca: Path) -> ssl.SSLContext:
    """For the listener: every peer shows a certificate that `client_ca` signed.

    Raises
    ------
    LocalError
        A file cannot be used.
    """
    return _with_files(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key, client_ca)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For an association of ours: the peer's certificate is signed by `files.ca` and, if so asked, of its host name.

    Raises
    ------
    LocalError
        A file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = files.check_host_name
    return _with_files(context, files.certificate, files.key, files.ca)


def _with_files(context: ssl.SSLContext, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM")  # of TLS 1.2; those of 1.3 are all good (RFC 9325)
    context.verify_mode = ssl.CERT_REQUIRED
    files = f"certificate {certificate} with key {key}"
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        files = f"authority {authority}"
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise LocalError(f"tls: {files}: got {error}, expected PEM files that can be read and fit") from error
    return context


def _no_password() -> str:
    """Or OpenSSL would ask at the terminal, and a service stand there for ever."""
    raise ValueError("a key with a password")
