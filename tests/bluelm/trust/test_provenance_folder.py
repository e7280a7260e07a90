"""Manifests and signatures of checkpoint folders, and what a folder may not hold."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.trust.manifest import FolderManifest, verify_folder
from bluelm.trust.safety import check_folder
from bluelm.trust.signature import Trust
from bluelm.trust.signature import verify_folder as verify_signature
from export.bundle import keys
from pipeline.run.provenance import PINNED, admit
from tests.support.trust.certificates import key_files


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint(), folder)
    return folder


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_every_difference_is_named(checkpoint: Path, tmp_path: Path) -> None:
    pinned = tmp_path / "pinned.json"
    FolderManifest.of(checkpoint).save(pinned)
    manifest = FolderManifest.open(pinned)
    verify_folder(checkpoint, manifest)
    assert manifest.digest() == FolderManifest.of(demo_checkpoint()).digest()
    generator = random.Random(1)
    weights = checkpoint / "model.safetensors"
    for _ in range(5):
        place = generator.randrange(weights.stat().st_size)
        flip(weights, place)
        with pytest.raises(InputError, match=r"changed: model\.safetensors"):
            verify_folder(checkpoint, manifest)
        flip(weights, place)
    (checkpoint / "sub").mkdir()
    (checkpoint / "sub" / "extra").write_text("x")
    (checkpoint / "tokenizer.model").unlink()
    with pytest.raises(InputError) as caught:
        verify_folder(checkpoint, manifest)
    assert "added: sub/extra" in str(caught.value) and "missing: tokenizer.model" in str(caught.value)


def test_manifests_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for bad in (
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"files": {"../x": {"bytes": 1, "sha256": "' + b"0" * 64 + b'"}}}',
    ):
        path.write_bytes(bad)
        with pytest.raises(InputError):
            FolderManifest.open(path)
    with pytest.raises(InputError):
        FolderManifest.open(tmp_path / "absent.json")


def sign(folder: Path, where: Path, *arguments: str) -> Path:
    """Sign with model-signing's own command line."""
    signature = where / "model.sig"
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "sign",
        *arguments,
        "--signature",
        str(signature),
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return signature


def test_a_signature_by_key(checkpoint: Path, tmp_path: Path) -> None:
    private, public = key_files(tmp_path)
    signature = sign(checkpoint, tmp_path, "key", "--private_key", str(private))
    trust = Trust(public)
    verify_signature(checkpoint, signature, trust)
    assert admit(checkpoint, trust, signature, required=True)["signature"].startswith("verified")
    flip(checkpoint / "model.safetensors", 12345)
    with pytest.raises(InputError, match=r"changed: model\.safetensors"):
        verify_signature(checkpoint, signature, trust)
    flip(checkpoint / "model.safetensors", 12345)
    (checkpoint / ".gitattributes").write_text("x")  # model-signing's own verifier overlooks it
    with pytest.raises(InputError, match=r"added: \.gitattributes"):
        verify_signature(checkpoint, signature, trust)
    (checkpoint / ".gitattributes").unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="not valid"):
        verify_signature(checkpoint, signature, Trust(key_files(tmp_path / "other")[1]))
    raw = signature.read_bytes()
    for bad in (b"", b"{}", raw[:-40], b"[" * 100_000):
        signature.write_bytes(bad)
        with pytest.raises(InputError):
            verify_signature(checkpoint, signature, trust)


def test_a_signature_by_certificate(checkpoint: Path, tmp_path: Path) -> None:
    private, _ = key_files(tmp_path)
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(keys.load_key(private).certificate_pem)
    words = ("--private_key", str(private), "--signing_certificate", str(certificate))
    signature = sign(checkpoint, tmp_path, "certificate", *words, "--certificate_chain", str(certificate))
    verify_signature(checkpoint, signature, Trust(certificates=(certificate,)))
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(keys.development_key(tmp_path / "s.pem").certificate_pem)
    with pytest.raises(InputError, match="not trusted now"):
        verify_signature(checkpoint, signature, Trust(certificates=(stranger,)))


def test_a_required_signature(checkpoint: Path, tmp_path: Path) -> None:
    assert admit(checkpoint)["signature"] == "not signed"
    with pytest.raises(InputError, match="nobody to trust"):
        admit(checkpoint, required=True)
    _, public = key_files(tmp_path)
    with pytest.raises(InputError, match="not signed"):
        admit(checkpoint, Trust(public), required=True)


def test_what_fetch_pinned_is_checked_at_each_run(checkpoint: Path) -> None:
    FolderManifest.of(checkpoint).save(checkpoint / PINNED)
    admit(checkpoint)
    flip(checkpoint / "config.json", 3)
    with pytest.raises(InputError, match=r"changed: config\.json"):
        admit(checkpoint)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/evil-ran",)


def test_pickles_that_could_run_code_are_refused_and_not_run(checkpoint: Path) -> None:
    Path("/tmp/evil-ran").unlink(missing_ok=True)
    path = checkpoint / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    check_folder(checkpoint)
    torch.save(collections.OrderedDict(a=torch.nn.Parameter(torch.zeros(3))), path)
    check_folder(checkpoint)
    torch.save({"a": Evil()}, path)
    with pytest.raises(InputError, match=r"calls (posix|os)\.system"):
        check_folder(checkpoint)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="bare pickle"):
        check_folder(checkpoint)
    path.unlink()
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "state.pkl").write_bytes(pickle.dumps(1))
    with pytest.raises(InputError, match="pickled code"):
        check_folder(checkpoint)
    assert not Path("/tmp/evil-ran").exists()


def test_what_trainers_leave_beside_safetensors_is_not_opened(checkpoint: Path) -> None:
    """transformers' Trainer, accelerate and DeepSpeed leave pickles of their own state."""
    Path("/tmp/evil-ran").unlink(missing_ok=True)
    (checkpoint / "global_step100").mkdir()
    left = ("training_args.bin", "rng_state.pth", "rng_state_0.pth", "optimizer.pt", "scheduler.pt", "scaler.pt",
            "random_states_0.pkl", "global_step100/mp_rank_00_model_states.pt")  # fmt: skip
    for name in left:
        torch.save({"a": Evil()}, checkpoint / name)
    assert set(left) < set(admit(checkpoint)["files"])
    Checkpoint.open(checkpoint).tensor("model.norm.weight")
    for weights in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"):
        torch.save({"a": Evil()}, checkpoint / weights)
        with pytest.raises(InputError, match=r"calls (posix|os)\.system"):
            admit(checkpoint)
        (checkpoint / weights).unlink()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"could run code|pickled code"):
        admit(checkpoint)
    assert not Path("/tmp/evil-ran").exists()


def test_a_link_to_a_model_is_the_model(checkpoint: Path, tmp_path: Path) -> None:
    link, private = tmp_path / "link", key_files(tmp_path)
    link.symlink_to(checkpoint, target_is_directory=True)
    assert admit(link) == admit(checkpoint)
    assert Checkpoint.open(link).digest() == Checkpoint.open(checkpoint).digest()
    signature = sign(checkpoint, tmp_path, "key", "--private_key", str(private[0]))
    verify_signature(link, signature, Trust(private[1]))
    (checkpoint / "inside").symlink_to(tmp_path)
    with pytest.raises(InputError, match="symbolic link"):
        admit(link)


def test_computed_names_in_pickles_are_refused(checkpoint: Path) -> None:
    """STACK_GLOBAL takes its names from the stack, where a pickle may have computed them."""
    names = b"\x8c\x02os\x94\x8c\x06system\x940\x8c\x0bcollections\x8c\x0bOrderedDict"
    raw = b"\x80\x04" + names + b"00h\x00h\x01\x93."
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("a/data.pkl", raw)
    (checkpoint / "pytorch_model.bin").write_bytes(body.getvalue())
    with pytest.raises(InputError):
        check_folder(checkpoint)


def test_bombs_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50_000_000))
    with pytest.raises(InputError, match="bomb"):
        check_folder(checkpoint)
    # many directory entries that share one run of bytes
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(100_000))
        first = archive.filelist[0]
        archive.filelist += [first] * 50
    with pytest.raises(InputError, match="bomb"):
        check_folder(checkpoint)


def test_links_and_special_files_are_refused(checkpoint: Path) -> None:
    (checkpoint / "link").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="symbolic link"):
        check_folder(checkpoint)
    (checkpoint / "link").unlink()
    os.mkfifo(checkpoint / "pipe")
    with pytest.raises(InputError, match="regular"):
        FolderManifest.of(checkpoint)


def test_the_hubs_own_cache_is_accepted(checkpoint: Path, tmp_path: Path) -> None:
    """`<repo>/snapshots/<revision>/file -> <repo>/blobs/<hash>` is how the hub's client keeps files."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert FolderManifest.of(snapshot).digest() == FolderManifest.of(checkpoint).digest()
    (snapshot / "more").symlink_to("/etc/passwd")
    with pytest.raises(InputError):
        check_folder(snapshot)


def test_truncated_safetensors_change_the_manifest(checkpoint: Path) -> None:
    manifest = FolderManifest.of(checkpoint)
    weights = checkpoint / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: struct.unpack("<Q", raw[:8])[0]])
    with pytest.raises(InputError, match="in the manifest"):
        verify_folder(checkpoint, manifest)
