"""Certificates made here, and signatures by model-signing's own command line."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier

from bluelm.trust.signature import Trust
from export.bundle import keys
from export.bundle.keys import SigningKey

NOW = datetime.now(UTC)
YEARS = timedelta(days=365)
ALWAYS, PAST, FUTURE = (NOW - 3 * YEARS, NOW + YEARS), (NOW - 2 * YEARS, NOW - YEARS), (NOW + YEARS, NOW + 2 * YEARS)


def issue(
    name: str,
    issuer: SigningKey | None = None,
    valid: tuple[datetime, datetime] = ALWAYS,
    purpose: ObjectIdentifier | None = None,
    authority: bool = False,
    signs: bool = True,
) -> SigningKey:
    """A key and its certificate: an authority's, or a signer's."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(signs, False, not signs, False, False, authority, False, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(usage, critical=True)
    )
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return SigningKey(private, builder.sign(issuer.private if issuer else private, hashes.SHA256()))


def sign(folder: Path, signer: SigningKey, *chain: SigningKey) -> Path:
    home = folder.parent
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (home / "key.pem").write_bytes(signer.private.private_bytes(*form))
    (home / "leaf.pem").write_bytes(signer.certificate_pem)
    (home / "chain.pem").write_bytes(b"".join(each.certificate_pem for each in chain))
    words = ["sign", "certificate", "--signature", home / "model.sig", "--private_key", home / "key.pem"]
    words += ["--signing_certificate", home / "leaf.pem", "--certificate_chain", home / "chain.pem", folder]
    subprocess.run([sys.executable, "-m", "model_signing", *map(str, words)], check=True, capture_output=True)
    return home / "model.sig"


def trusting(folder: Path, root: SigningKey, at: datetime | None = None) -> Trust:
    file = folder.parent / "root.pem"
    file.write_bytes(root.certificate_pem)
    return Trust(certificates=(file,), at=at)


ROOT = issue("root", authority=True)


def key_files(folder: Path) -> tuple[Path, Path]:
    key = keys.development_key(folder / "key.pem")
    public = folder / "key.pub"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.private.public_key().public_bytes(serialization.Encoding.PEM, form))
    return folder / "key.pem", public
