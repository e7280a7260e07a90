"""Who signed a bundle: the certificates of the keys that signed count, never what the manifest says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from export.bundle import keys, payload
from export.bundle.manifest import Format, Signing
from tests.support import bundles
from tests.support.bundles import FORMATS
from tests.support.command_line import call

Lie = Callable[[Signing, str], Signing]
LIES: dict[str, Lie] = {
    "none": lambda own, vendor: own,
    "the vendor's digest": lambda own, vendor: own.model_copy(update={"certificate_sha256": vendor}),
    "as the package's": lambda own, vendor: own.model_copy(update={"package_certificate_sha256": vendor}),
    "the vendor's name": lambda own, vendor: own.model_copy(update={"subject": "CN=vendor", "development_key": False}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_attackers_key_is_never_taken_for_the_vendors(
    kind: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """He signs with his own key and writes into the manifest whatever he likes."""
    (tmp_path / "vendor").mkdir()
    vendor, attacker = bundles.development_keys(tmp_path / "vendor"), bundles.development_keys(tmp_path)
    digest, his = (keys.fingerprint(each.model.certificate) for each in (vendor, attacker))
    true = payload.signing_of
    good = bundles.make(kind, tmp_path / "good", vendor)
    assert call("verify", good, "--no-load", "--certificate", digest) == 0
    said = capsys.readouterr().out
    assert f"signer CN={keys.DEVELOPMENT_NAME}, certificate SHA-256 {digest}" in said and "development key:" in said
    for number, lie in enumerate(LIES.values()):
        with monkeypatch.context() as patch:
            patch.setattr(payload, "signing_of", lambda *both, lie=lie: lie(true(*both), digest))
            made = bundles.make(kind, tmp_path / f"bad{number}", attacker)
        assert call("verify", made, "--no-load", "--certificate", digest) == 2
        assert call("verify", made, "--no-load") == (0 if number == 0 else 2)  # an honest manifest is his own bundle's
        told = capsys.readouterr()
        assert his in told.out if number == 0 else "another signer" in told.err
