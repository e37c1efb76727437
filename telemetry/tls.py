"""TLS to a broker: the files of one side, and the context made of them."""

from __future__ import annotations

import shlex
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from telemetry.errors import PenumbraError


class _ClosingSocket(ssl.SSLSocket):
    """A socket that a failed handshake leaves closed: paho, which made it, forgets it then."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:
            self.close()
            raise


@dataclass(frozen=True)
class TlsFiles:
    """Files in PEM format."""

    ca: Path
    """Certificate of the authority that the broker's is checked by."""
    certificate: Path | None = None
    """Our own, where the broker asks for one."""
    key: Path | None = None
    """Its private key, mode 0600."""

    @classmethod
    def of(cls, ca: str, certificate: str, key: str) -> TlsFiles | None:
        """Return the files by name; empty names are files that are not given.

        Raises
        ------
        PenumbraError
            One of certificate and key without the other, or without the authority.
        """
        if not ca and not certificate and not key:
            return None
        if not ca or bool(certificate) != bool(key):
            raise PenumbraError(
                f"tls_ca = {ca!r}, tls_certificate = {certificate!r}, tls_key = {key!r}:"
                " tls_ca alone, or all three are allowed",
                "name the files that are missing, or take the others away",
            )
        return cls(Path(ca), Path(certificate) if certificate else None, Path(key) if key else None)

    def context(self) -> ssl.SSLContext:
        """Return a client's context: TLS 1.2 or later, the broker's name checked.

        Raises
        ------
        PenumbraError
            A file is missing or not what it should be, or others may read the key.
        """
        for name, path in (("tls_ca", self.ca), ("tls_certificate", self.certificate), ("tls_key", self.key)):
            if path is not None and not path.is_file():
                raise PenumbraError(f"{name} = {str(path)!r}: no such file", "correct its path")
        if self.key is not None:
            mode = stat.S_IMODE(self.key.stat().st_mode)
            if mode & 0o077:
                raise PenumbraError(
                    f"tls_key = {str(self.key)!r}: mode {mode:04o} lets others read it, 0600 is needed",
                    f"chmod 600 {shlex.quote(str(self.key))}",
                )
        try:
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.ca)
        except (ssl.SSLError, OSError) as error:
            raise PenumbraError(
                f"tls_ca = {str(self.ca)!r}: {error}", "it must be a certificate in PEM format"
            ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = _ClosingSocket
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.key)
            except (ssl.SSLError, OSError) as error:
                raise PenumbraError(
                    f"tls_certificate = {str(self.certificate)!r}, tls_key = {str(self.key)!r}: {error}",
                    "they must be a certificate and its private key in PEM format",
                ) from None
        return context
