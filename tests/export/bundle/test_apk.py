"""APKs held against Debian's apksigner, zipalign, aapt2 and against androguard."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)

from bluelm.errors import InputError
from export.bundle import build, keys, payload
from export.bundle.android import apk
from export.bundle.build import Input
from export.bundle.zip32 import FileSource
from tests.packages import need
from tests.support import bundles

DEBIAN = {"apksigner": "apksigner", "zipalign": "zipalign", "aapt2": "aapt"}  # a tool's package


def tool(*command: str | Path) -> str:
    """Standard output of a tool that must succeed."""
    need(DEBIAN[str(command[0])])
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def user_key(folder: Path, private: keys.PrivateKey, form: str) -> Path:
    """A user's own key with a certificate, as PKCS#12 with a password or as PEM."""
    certificate: x509.Certificate = keys._self_signed(private, "Somebody")
    if form == "p12":
        path = folder / "key.p12"
        sealed = BestAvailableEncryption(b"secret")
        path.write_bytes(pkcs12.serialize_key_and_certificates(b"k", private, certificate, None, sealed))
        return path
    path = folder / "key.pem"
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + certificate.public_bytes(Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apk")
    return bundles.make("apk", folder / "pack", bundles.development_keys(folder))


def test_apksigner_accepts_both_schemes(signed: Path) -> None:
    old = tool("apksigner", "verify", "-v", "--min-sdk-version", "24", "--max-sdk-version", "27", signed)
    assert "(APK Signature Scheme v2): true" in old
    new = tool("apksigner", "verify", "-v", "--print-certs", "--min-sdk-version", "28", signed)
    assert "(APK Signature Scheme v3): true" in new
    assert f"CN={keys.DEVELOPMENT_NAME}" in new


def test_zipalign_and_aapt2_accept_the_pack(signed: Path) -> None:
    tool("zipalign", "-c", "16384", signed)
    badging = tool("aapt2", "dump", "badging", signed)
    assert "package: name='org.bluelm.demo' versionCode='3' versionName='1.2'" in badging
    assert "application: label='BlueLM 演示'" in badging
    tree = tool("aapt2", "dump", "xmltree", "--file", "AndroidManifest.xml", signed)
    assert "hasCode(0x0101000c)=false" in tree


def test_androguard_reads_the_same(signed: Path) -> None:
    from androguard.core.apk import APK
    from loguru import logger

    logger.disable("androguard")
    found = APK(str(signed))
    assert (found.get_package(), found.get_androidversion_code()) == ("org.bluelm.demo", "3")
    assert found.is_signed_v2() and found.is_signed_v3()
    assert found.get_file("assets/artifact/weights.bin") == bundles.FILES["artifact/weights.bin"]


def test_the_model_can_be_mapped_from_the_apk(signed: Path) -> None:
    raw = signed.read_bytes()
    assert raw.index(bundles.FILES["artifact/weights.bin"]) % apk.ALIGNMENT == 0


@pytest.mark.parametrize("form", ["p12", "pem"])
def test_a_users_rsa_key(form: str, tmp_path: Path) -> None:
    """RSA signs the APK; the model signature needs an elliptic curve key beside it."""
    path = user_key(tmp_path, rsa.generate_private_key(65537, 2048), form)
    package = keys.load_key(path, "secret" if form == "p12" else None)
    with pytest.raises(InputError, match="elliptic curve"):
        bundles.make("apk", tmp_path / "x", payload.Keys(package, package))
    model = keys.development_key(tmp_path / "development.pem")
    made = bundles.make("apk", tmp_path / "x", payload.Keys(package, model))
    again = bundles.make("apk", tmp_path / "y", payload.Keys(package, model))
    assert made.read_bytes() == again.read_bytes()
    assert "CN=Somebody" in tool("apksigner", "verify", "--print-certs", made)
    found = build.verify(made)
    assert found.manifest.signing.package_certificate_sha256 == keys.fingerprint(package.certificate)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_elliptic_curve_keys(curve: ec.EllipticCurve, tmp_path: Path) -> None:
    key = keys.load_key(user_key(tmp_path, ec.generate_private_key(curve), "pem"))
    made = bundles.make("apk", tmp_path / "x", payload.Keys(key, key))
    tool("apksigner", "verify", made)
    assert not any("development" in note for note in build.verify(made).notes)


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    path = user_key(tmp_path, ec.generate_private_key(ec.SECP256R1()), "p12")
    with pytest.raises(InputError, match="cannot be read"):
        keys.load_key(path, "wrong")
    path.write_bytes(b"-----BEGIN nothing")
    with pytest.raises(InputError):
        keys.load_key(path)
    weak = user_key(tmp_path, rsa.generate_private_key(65537, 1024), "pem")
    with pytest.raises(InputError, match="2048"):
        keys.load_key(weak)
    other = tmp_path / "other.pem"
    other.write_bytes(keys.development_key(tmp_path / "development.pem").certificate_pem)
    with pytest.raises(InputError, match="another key"):
        keys.load_key(user_key(tmp_path, ec.generate_private_key(ec.SECP256R1()), "pem"), certificate=other)
    with pytest.raises(InputError):
        keys.load_key(tmp_path / "absent.p12")


def test_large_models_are_split(tmp_path: Path) -> None:
    """Files go whole where they fit; one that fits nowhere is cut, and joined again by its reader."""
    signing = bundles.development_keys(tmp_path)
    cap = apk.RESERVE + 300_000
    contents = {f"artifact/{name}": os.urandom(size) for name, size in (("a", 200_000), ("b", 900_000), ("c", 150_000))}
    inputs = bundles.inputs(contents)
    made = build.make(bundles.draft("apk"), inputs, signing, tmp_path / "big", build.Options(cap=cap))
    files = sorted(path.name for path in made.iterdir())
    assert files[0] == "base.apk" and len(files) > 3
    for path in made.iterdir():
        tool("apksigner", "verify", "--min-sdk-version", "24", path)
        tool("zipalign", "-c", "16384", path)
        names = tool("aapt2", "dump", "badging", path)
        assert "name='org.bluelm.demo' versionCode='3'" in names
    found = build.verify(made)
    for name, data in contents.items():
        assert b"".join(found.sources[name].pieces()) == data
    last = made / files[-1]
    kept = last.read_bytes()
    for change in (lambda: last.unlink(), lambda: (made / "extra.apk").write_bytes(kept)):
        change()
        with pytest.raises(InputError):
            build.verify(made)
        last.write_bytes(kept)
    (made / "extra.apk").unlink()
    build.verify(made)


def test_a_part_of_a_file_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    content = payload.measure("f", "", FileSource(path), [30, 70])
    assert b"".join(content.part_source(content.parts[1]).pieces()) == bytes(range(30, 100))


def test_names_that_leave_the_bundle_are_refused(tmp_path: Path) -> None:
    signing = bundles.development_keys(tmp_path)
    for name in ("../x", "/x", "a//b", "a\\b", "c:x", "a/./b", "x\n", "manifest.json"):
        bad = [Input(name, "", bundles.BytesSource(b""))]
        with pytest.raises(InputError):
            build.make(bundles.draft("apk"), bad, signing, tmp_path / "bad")
    assert not list(tmp_path.glob("bad*"))
