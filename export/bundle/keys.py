"""Signing keys: PKCS#12 or PEM of the user's, or a generated development key that says what it is."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import NameOID

from bluelm.errors import InputError
from bluelm.system.files import atomic_file
from bluelm.system.reading import read_bytes
from bluelm.trust import certificates

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

DEVELOPMENT_NAME = "bluelm-export development key - not for release"
RSA_SHA256, ECDSA_SHA256 = 0x0103, 0x0201  # algorithm ids of APK Signature Scheme v2 and v3
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
"""What the library raises at damaged keys and certificates."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True)
class SigningKey:
    """A private key and its certificate."""

    private: PrivateKey
    certificate: x509.Certificate

    @property
    def public_der(self) -> bytes:
        """SubjectPublicKeyInfo."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.private.public_key().public_bytes(serialization.Encoding.DER, form)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def algorithm(self) -> int:
        """Algorithm id of Android's signature schemes."""
        return algorithm_of(self.certificate)

    def sign(self, data: bytes) -> bytes:
        """SHA-256 signature; the same data give the same bytes (PKCS#1 v1.5, or ECDSA by RFC 6979)."""
        if isinstance(self.private, rsa.RSAPrivateKey):
            return self.private.sign(data, padding.PKCS1v15(), hashes.SHA256())
        return self.private.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def algorithm_of(certificate: x509.Certificate) -> int:
    """Android's algorithm id for a certificate's key.

    Raises:
        InputError: neither RSA of 2048 bits and more nor one of the NIST curves.
    """
    try:
        key = certificate.public_key()
    except UNREADABLE as error:
        raise InputError(f"the certificate's key cannot be read: {error}") from error
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
        return RSA_SHA256
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES:
        return ECDSA_SHA256
    raise InputError(
        "the signing key is of a kind that cannot be used",
        fix="use RSA with at least 2048 bits, or an elliptic curve key on P-256, P-384 or P-521",
    )


def verify_signature(certificate: x509.Certificate, signature: bytes, data: bytes) -> bool:
    """Whether `signature` is that of the certificate's key over `data`, with SHA-256."""
    key = certificate.public_key()
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        else:
            return False
    except InvalidSignature:
        return False
    return True


def fingerprint(certificate: x509.Certificate) -> str:
    """Hex SHA-256 of the certificate, as apksigner prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()


def is_development(certificate: x509.Certificate) -> bool:
    """Whether the certificate is one that this tool generated for trying things out."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return any(name.value == DEVELOPMENT_NAME for name in names)


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether the certificate is self-signed, so that nobody else confirms its name."""
    return certificate.subject == certificate.issuer


def load_certificate(data: bytes, where: object) -> x509.Certificate:
    """A certificate from exactly one canonical PEM block.

    Raises:
        InputError: not a certificate, or PEM with anything around it.
    """
    try:
        certificate = x509.load_pem_x509_certificate(data)
        certificates.read_all(certificate)
        again = certificate.public_bytes(serialization.Encoding.PEM)
    except UNREADABLE as error:
        raise InputError(f"not a PEM certificate: {error}", where=where) from error
    if again != data:
        raise InputError("the PEM certificate holds more than one plain certificate", where=where)
    algorithm_of(certificate)
    return certificate


def load_key(path: Path, password: str | None = None, certificate: Path | None = None) -> SigningKey:
    """Load a key from PKCS#12 (.p12, .pfx) or PEM (key and certificate in one file, or apart).

    Raises:
        InputError: unreadable, wrong password, no certificate, or a certificate of another key.
    """
    secret = password.encode() if password else None
    data = _read(path)
    try:
        if data.lstrip().startswith(b"-----"):
            private = serialization.load_pem_private_key(data, secret)
            found = x509.load_pem_x509_certificate(_read(certificate) if certificate else data)
        else:
            private, found, _ = pkcs12.load_key_and_certificates(data, secret)
        if found is not None:
            certificates.read_all(found)
    except UNREADABLE as error:
        fix = "check the password and that the file holds a private key and its certificate (PKCS#12 or PEM)"
        raise InputError(f"the signing key cannot be read: {error}", where=path, fix=fix) from error
    if not isinstance(private, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) or found is None:
        raise InputError("the file holds no RSA or elliptic curve key with a certificate", where=path)
    algorithm_of(found)
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != found.public_key().public_bytes(*form):
        raise InputError("the certificate belongs to another key", where=certificate or path)
    certificates.check(found, where=certificate or path)
    return SigningKey(private, found)


def _read(path: Path) -> bytes:
    return read_bytes(path)


def development_path() -> Path:
    """Where this machine's development key lies."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "bluelm-export" / "development-key.pem"


def development_key(path: Path) -> SigningKey:
    """The development key at `path`, generated at the first use: P-256, valid for 30 years, named as such."""
    if not path.exists():
        private = ec.generate_private_key(ec.SECP256R1())
        key = SigningKey(private, _self_signed(private, DEVELOPMENT_NAME))
        with atomic_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(_pem(private) + key.certificate_pem)
    return load_key(path)


def _pem(private: PrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _self_signed(private: PrivateKey, common_name: str) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    start = datetime.datetime.now(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=30 * 365))
        .add_extension(usage, critical=True)
        .sign(private, hashes.SHA256())
    )
