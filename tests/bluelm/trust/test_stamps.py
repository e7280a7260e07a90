"""Time stamps of signatures, made by openssl as an authority makes them."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from bluelm.errors import InputError
from bluelm.trust.signature import Trust, verify_folder
from bluelm.trust.timestamps import MAX_BYTES, stamped
from export.bundle.keys import SigningKey
from tests.packages import requires
from tests.support.command_line import call
from tests.support.trust.certificates import ALWAYS, NOW, PAST, ROOT, issue, sign, trusting

pytestmark = requires("openssl")
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


def test_a_stamp_tells_when_a_signature_was_there(folder: Path) -> None:
    """The certificate holds now, so the stamp's time is within it; a day before it is not."""
    home, signature = folder.parent, sign(folder, issue("leaf", ROOT), ROOT)
    answer, authority = stamp(home, signature, stamper())
    moment = stamped(answer, signature, [authority])
    assert abs(moment - NOW) < timedelta(days=1)
    plain = trusting(folder, ROOT)
    verify_folder(
        folder, signature, Trust(certificates=plain.certificates, stamp=answer, stamp_authorities=[authority])
    )
    words = ["verify", folder, "--signature", signature, "--certificate-chain", *plain.certificates]
    assert call(*words, "--signed-at", answer, "--stamp-authority", authority) == 0
    assert call(*words, "--signed-at", answer) == call(*words, "--stamp-authority", authority) == 2


def test_the_stamps_time_is_that_of_the_certificates(folder: Path) -> None:
    """A signer whose certificate had expired when the stamp was made is not saved by it."""
    home, signature = folder.parent, sign(folder, issue("leaf", ROOT, PAST), ROOT)
    answer, authority = stamp(home, signature, stamper())
    found = trusting(folder, ROOT)
    with pytest.raises(InputError, match="leaf is valid from"):
        verify_folder(
            folder, signature, Trust(certificates=found.certificates, stamp=answer, stamp_authorities=[authority])
        )


def test_stamps_that_prove_nothing(folder: Path) -> None:
    home, signature = folder.parent, folder / "config.json"
    answer, authority = stamp(home, signature, stamper())
    (home / "root.pem").write_bytes(ROOT.certificate_pem)
    (home / "other").write_bytes(b"another file")
    damaged = bytearray(answer.read_bytes())
    damaged[-20] ^= 1
    (home / "damaged.tsr").write_bytes(damaged)
    (home / "empty.tsr").write_bytes(b"")
    with (home / "large.tsr").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for one, over, whose, told in [
        (answer, home / "other", authority, "does not hold"), (answer, signature, home / "root.pem", "does not hold"),
        (home / "damaged.tsr", signature, authority, "does not hold|not a time stamp"),
        (home / "empty.tsr", signature, authority, "not a time stamp"),
        (home / "large.tsr", signature, authority, "too large"),
        (home / "none", signature, authority, "not a time stamp"),
        (answer, signature, answer, "authority cannot be read"), (signature, signature, authority, "not a time stamp"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=told):
            stamped(one, over, [whose])


def test_stampers_must_be_for_stamping(folder: Path) -> None:
    home, signature = folder.parent, folder / "config.json"
    answer, authority = stamp(home, signature, stamper())
    assert stamped(answer, signature, [authority])
    for wrong in (stamper(Purpose.CODE_SIGNING), stamper(critical=False)):
        try:
            answer, authority = stamp(home, signature, wrong)
        except subprocess.CalledProcessError:
            continue  # openssl itself refuses to stamp so
        with pytest.raises(InputError, match="does not hold"):
            stamped(answer, signature, [authority])
