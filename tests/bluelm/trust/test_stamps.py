"""Time stamps of signatures, made by openssl as an authority makes them."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from bluelm.errors import InputError
from bluelm.trust.signature import Trust, verify_folder
from bluelm.trust.timestamps import MAX_BYTES, stamped
from tests.packages import requires
from tests.support.command_line import call
from tests.support.trust.certificates import NOW, PAST, ROOT, issue, sign, trusting
from tests.support.trust.stamps import stamp, stamper

pytestmark = requires("openssl")


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
