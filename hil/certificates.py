"""Throwaway certificates for a bench with mutual TLS: an authority, a broker, clients, and a revocation list.

For tests and the bench on one machine. A mission makes its own, on a machine that is not connected
(docs/deploy/README.md).
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from telemetry.tls import TlsFiles

DAYS = 2
"""How long a throwaway certificate is valid, days."""


@dataclass(frozen=True)
class _Signed:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


class Authority:
    """A certificate authority in a directory.

    Parameters
    ----------
    directory
        Where `ca.crt`, `ca.crl` and what it issues are written, keys with mode 0600.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("penumbra bench authority")
        certificate = (
            _builder(name, name, key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
                    key_encipherment=False, data_encipherment=False, key_agreement=False,
                    encipher_only=False, decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )  # fmt: skip
        self._ca = _Signed(key, certificate)
        self._revoked: list[x509.RevokedCertificate] = []
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self._write_crl()

    @property
    def ca_file(self) -> Path:
        """Certificate of the authority."""
        return self.directory / "ca.crt"

    @property
    def crl_file(self) -> Path:
        """Its list of revoked certificates."""
        return self.directory / "ca.crl"

    def issue(self, name: str, *, server: bool = False) -> TlsFiles:
        """Issue a certificate for a common name; a server's is for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(_name(name), self._ca.certificate.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca.key.public_key()), critical=False
            )
        )
        if server:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificate = builder.sign(self._ca.key, hashes.SHA256())
        crt, secret = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        crt.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        secret.touch(mode=0o600)
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return TlsFiles(ca=self.ca_file, certificate=crt, key=secret)

    def revoke(self, name: str) -> None:
        """Put the certificate of a common name on the list; a broker reads it when it starts."""
        certificate = x509.load_pem_x509_certificate((self.directory / f"{name}.crt").read_bytes())
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(_now())
            .build()
        )
        self._revoked.append(entry)
        self._write_crl()

    def _write_crl(self) -> None:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._ca.certificate.subject)
            .last_update(_now() - datetime.timedelta(minutes=5))
            .next_update(_now() + datetime.timedelta(days=DAYS))
        )
        for entry in self._revoked:
            builder = builder.add_revoked_certificate(entry)
        crl = builder.sign(self._ca.key, hashes.SHA256())
        self.crl_file.write_bytes(crl.public_bytes(serialization.Encoding.PEM))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(minutes=5))
        .not_valid_after(_now() + datetime.timedelta(days=DAYS))
    )
