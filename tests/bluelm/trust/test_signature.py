"""Signatures made and checked in this process; `test_provenance_folder.py` checks them with the library's own tool."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bluelm.errors import InputError, UnavailableError
from bluelm.trust.signature import MAX_BYTES, Trust, sign, verify_exact, verify_folder

FILES = {"a.txt": "one", "sub/b.txt": "three"}
DIGESTS = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
KEY, OTHER = ec.derive_private_key(12345, ec.SECP256R1()), ec.derive_private_key(54321, ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey, path: Path) -> Path:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text(text)
    return tmp_path / "home"


def test_signatures_are_the_same_each_time_and_hold_exactly() -> None:
    raw = sign("model", DIGESTS, KEY)
    assert sign("model", DIGESTS, KEY) == raw
    verify_exact(raw, "model", DIGESTS, KEY.public_key())
    statement = json.loads(base64.b64decode(json.loads(raw)["dsseEnvelope"]["payload"]))
    rules = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ["model.sig"]}
    assert statement["predicate"]["serialization"] == rules
    assert list(statement) == sorted(statement) and list(statement["predicate"]) == sorted(statement["predicate"])
    for name, digests, key, told in (
        ("another", DIGESTS, KEY, "damaged or changed"),
        ("model", {**DIGESTS, "a.txt": DIGESTS["sub/b.txt"]}, KEY, r"changed: a\.txt"),
        ("model", {"a.txt": DIGESTS["a.txt"]}, KEY, r"missing: sub/b\.txt"),
        ("model", {**DIGESTS, "c": DIGESTS["a.txt"]}, KEY, "added: c"),
        ("model", DIGESTS, OTHER, "not valid"),
    ):
        with pytest.raises(InputError, match=told):
            verify_exact(raw, name, digests, key.public_key())
    with pytest.raises(InputError, match="damaged or changed"):
        verify_exact(raw + b"\n", "model", DIGESTS, KEY.public_key())


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_against_its_signature(folder: Path, tmp_path: Path, inside: bool) -> None:
    trust = Trust(pem(KEY, tmp_path / "key.pub"))
    signature = (folder if inside else tmp_path) / "model.sig"
    signature.write_bytes(sign("home", DIGESTS, KEY))
    found = verify_folder(folder, signature, trust)
    assert found.digests() == DIGESTS
    (folder / "c").write_text("one")
    with pytest.raises(InputError, match=r"1 file differs.*\n  added: c \(not signed\)"):
        verify_folder(folder, signature, trust)
    (folder / "c").unlink()
    (folder / "a.txt").write_text("two")
    with pytest.raises(InputError, match=r"1 file differs.*\n  changed: a\.txt \(its SHA-256 is not the signed one\)"):
        verify_folder(folder, signature, trust)
    (folder / "a.txt").unlink()
    with pytest.raises(InputError, match=r"1 file differs.*\n  missing: a\.txt \(signed, but not there\)"):
        verify_folder(folder, signature, trust)


def test_whom_to_trust_must_be_said_and_be_right(folder: Path, tmp_path: Path) -> None:
    signature = tmp_path / "model.sig"
    signature.write_bytes(sign("home", DIGESTS, KEY))
    with pytest.raises(InputError, match="nothing to trust"):
        verify_folder(folder, signature, Trust())
    with pytest.raises(InputError, match="not valid"):
        verify_folder(folder, signature, Trust(pem(OTHER, tmp_path / "other.pub")))
    (tmp_path / "bad.pub").write_text("no key")
    for trust in (Trust(tmp_path / "bad.pub"), Trust(certificates=[tmp_path / "bad.pub"])):
        with pytest.raises(InputError, match="cannot be read") as caught:
            verify_folder(folder, signature, trust)
        assert "bad.pub" in str(caught.value)


def test_pipes_are_neither_keys_nor_signatures(folder: Path, tmp_path: Path) -> None:
    """Opening one waits for whoever writes into it."""
    signature, pipe, key = tmp_path / "model.sig", tmp_path / "pipe", pem(KEY, tmp_path / "key.pub")
    signature.write_bytes(sign("home", DIGESTS, KEY))
    os.mkfifo(pipe)
    for trust, given, told in (
        (Trust(pipe), signature, "to trust cannot be read"),
        (Trust(certificates=[pipe]), signature, "to trust cannot be read"),
        (Trust(key), pipe, "not a regular file"),
    ):
        with pytest.raises(InputError, match=told):
            verify_folder(folder, given, trust)


def test_files_that_are_no_signature(folder: Path, tmp_path: Path) -> None:
    trust, bad = Trust(pem(KEY, tmp_path / "key.pub")), tmp_path / "model.sig"
    for raw, told in ((b"", "not valid"), (b"{}", "not valid"), (b"[" * 100_000, "nested too deeply|not valid")):
        bad.write_bytes(raw)
        with pytest.raises(InputError, match=told):
            verify_folder(folder, bad, trust)
    assert MAX_BYTES == 64 * 2**20
    with bad.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="too large for a signature"):
        verify_folder(folder, bad, trust)
    with bad.open("r+b") as file:
        file.truncate(MAX_BYTES)
    with pytest.raises(InputError, match=r"not valid: (?!.*too large)"):
        verify_folder(folder, bad, trust)


def test_other_digests_than_sha256_are_not_taken(folder: Path, tmp_path: Path) -> None:
    """Signed by the right key as DSSE says, over another kind of digest."""
    whole = json.loads(sign("home", DIGESTS, KEY))
    envelope = whole["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    for resource in statement["predicate"]["resources"]:
        resource["algorithm"] = "blake2b"
    body, kind = json.dumps(statement).encode(), envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)
    envelope["payload"] = base64.b64encode(body).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(KEY.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()
    (tmp_path / "model.sig").write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"uses \['blake2b'\], only sha256 by file is known"):
        verify_folder(folder, tmp_path / "model.sig", Trust(pem(KEY, tmp_path / "key.pub")))


def test_without_the_library_it_is_said_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UnavailableError, match=r"pip install 'bluelm-export\[bundle\]'"):
        sign("model", DIGESTS, KEY)
