"""Certificates of signatures: checked against the clock, with their usage and their chain. They are made here with
`cryptography`, the signatures with model-signing's own command line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from bluelm.errors import InputError
from bluelm.trust.signature import verify_folder
from export.bundle import build, keys, payload
from export.bundle.manifest import Format
from tests.support import bundles
from tests.support.command_line import call
from tests.support.trust.certificates import FUTURE, NOW, PAST, ROOT, YEARS, issue, sign, trusting

OLD_ROOT = issue("old root", authority=True, valid=PAST)
MIDDLE = issue("middle", ROOT, authority=True, signs=False)
PLAYER = issue("player", ROOT)
TLS_ROOT = issue("tls", authority=True, purpose=Purpose.SERVER_AUTH)
CASES = {
    "expired leaf": (ROOT, issue("leaf", ROOT, PAST), (), "leaf is valid from"),
    "leaf of next year": (ROOT, issue("leaf", ROOT, FUTURE), (), "leaf is valid from"),
    "expired authority": (OLD_ROOT, issue("leaf", OLD_ROOT), (), "old root is not trusted now: .* expired"),
    "a TLS server's": (ROOT, issue("leaf", ROOT, purpose=Purpose.SERVER_AUTH), (), "is for serverAuth, not for"),
    "a key for encryption": (ROOT, issue("leaf", ROOT, signs=False), (), "not for signing"),
    "of one that is no authority": (ROOT, issue("leaf", PLAYER), (PLAYER,), "player is not trusted"),
    "an authority for TLS": (TLS_ROOT, issue("leaf", TLS_ROOT), (), "tls is for serverAuth"),
    "a stranger's": (ROOT, issue("leaf"), (), "leaf is not trusted"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_certificates_that_do_not_vouch_now(case: str, folder: Path) -> None:
    root, leaf, middle, said = CASES[case]
    signature = sign(folder, leaf, *middle, root)
    with pytest.raises(InputError, match=said):
        verify_folder(folder, signature, trusting(folder, root))


def test_certificates_that_do(folder: Path) -> None:
    leaf = issue("leaf", MIDDLE, purpose=Purpose.CODE_SIGNING)
    verify_folder(folder, sign(folder, leaf, MIDDLE), trusting(folder, ROOT))


def test_an_old_signature_is_believed_on_a_day_that_is_named(folder: Path) -> None:
    signature = sign(folder, issue("leaf", OLD_ROOT, PAST), OLD_ROOT)
    trust = trusting(folder, OLD_ROOT, NOW - 1.5 * YEARS)
    verify_folder(folder, signature, trust)
    words = ["verify", folder, "--signature", signature, "--certificate-chain", folder.parent / "root.pem"]
    assert call(*words) == 2
    assert call(*words, "--signed-at", f"{NOW - 1.5 * YEARS:%Y-%m-%d}") == 0
    for wrong in (f"{NOW - 2.5 * YEARS:%Y-%m-%d}", f"{NOW + YEARS:%Y-%m-%d}", "2024-13-01", "yesterday"):
        assert call(*words, "--signed-at", wrong) == 2
    assert call(*words, "--public-key", folder, "--signed-at", "2024-01-01") == 2  # no certificate is checked


@pytest.mark.parametrize("kind", ("apk", "folder"))
def test_a_bundles_certificate_is_held_against_the_clock(
    kind: Format, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, tls = issue("vendor", valid=PAST), issue("www", purpose=Purpose.SERVER_AUTH)
    made = bundles.make(kind, tmp_path / "old", payload.Keys(old, old))
    assert call("verify", made, "--no-load") == 2
    assert "CN=vendor is valid from" in " ".join(capsys.readouterr().err.split())
    assert call("verify", made, "--no-load", "--signed-at", f"{NOW - 1.5 * YEARS:%Y-%m-%d}") == 0
    said = capsys.readouterr().out
    assert "signer CN=vendor" in said and "whoever made the certificate chose the name" in said
    with pytest.raises(InputError, match="is for serverAuth"):
        build.verify(bundles.make(kind, tmp_path / "tls", payload.Keys(tls, tls)))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(old.private.private_bytes(*form) + old.certificate_pem)
    with pytest.raises(InputError, match="CN=vendor is valid from"):  # before hours are spent on signing with it
        keys.load_key(tmp_path / "key.pem")
