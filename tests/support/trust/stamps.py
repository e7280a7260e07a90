"""Time stamps by openssl, as an authority makes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from export.bundle.keys import SigningKey
from tests.support.trust.certificates import ALWAYS, issue

AUTHORITY = issue("time", authority=True, valid=ALWAYS)
CONFIG = """[tsa]
default_tsa = here
[here]
serial = {home}/serial
signer_cert = {home}/stamper.pem
certs = {home}/time.pem
signer_key = {home}/stamper.key
signer_digest = sha256
default_policy = 1.2.3.4
digests = sha256
accuracy = secs:1
ess_cert_id_alg = sha256
"""


def stamper(purpose: object = Purpose.TIME_STAMPING, valid: tuple = ALWAYS, critical: bool = True) -> SigningKey:
    """A key of the authority that makes stamps."""
    made = issue("stamper", AUTHORITY, valid)
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    builder = (
        x509.CertificateBuilder()
        .subject_name(made.certificate.subject)
        .issuer_name(made.certificate.issuer)
        .public_key(made.certificate.public_key())
        .serial_number(made.certificate.serial_number)
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=critical)  # pyright: ignore[reportArgumentType]
    )
    return SigningKey(made.private, builder.sign(AUTHORITY.private, hashes.SHA256()))


def stamp(home: Path, signature: Path, by: SigningKey) -> tuple[Path, Path]:
    """(what openssl answers as an authority, the authority's certificate)."""
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (home / "stamper.key").write_bytes(by.private.private_bytes(*form))
    (home / "stamper.pem").write_bytes(by.certificate_pem)
    (home / "time.pem").write_bytes(AUTHORITY.certificate_pem)
    (home / "serial").write_text("01\n")
    (home / "tsa.cnf").write_text(CONFIG.format(home=home))
    query, answer = home / "query.tsq", home / "model.tsr"
    ask = ["openssl", "ts", "-query", "-data", signature, "-sha256", "-cert", "-out", query]
    reply = ["openssl", "ts", "-reply", "-config", home / "tsa.cnf", "-queryfile", query, "-out", answer]
    for words in (ask, reply):
        subprocess.run(list(map(str, words)), check=True, capture_output=True)
    return answer, home / "time.pem"
