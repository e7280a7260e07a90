"""Signatures and pinned manifests of everything that a model is made of: the checkpoint and its adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from bluelm.errors import InputError
from bluelm.trust import signature
from bluelm.trust.manifest import FolderManifest
from export.bundle import keys
from pipeline.judge import evaluating
from pipeline.run.provenance import PINNED
from tests.support.checkpoints.adapters import write_adapter
from tests.support.checkpoints.shapes import tiny_checkpoint, write_checkpoint
from tests.support.command_line import call
from tests.support.trust.certificates import key_files

SMALL = ["--method", "rtn", "--samples", "4", "--length", "32"]
RUN = ["--target", "generic-arm64", "--runtime", "onnx-cpu", "--eval-tokens", "256", "--context", "64", "--dry-run"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model")


def sign(folder: Path, home: Path) -> None:
    private = keys.load_key(home / "key.pem").private
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    digests = FolderManifest.of(folder).digests()
    (folder / "model.sig").write_bytes(signature.sign(folder.name, digests, private))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that ends with 2."""
    capsys.readouterr()
    assert call(*words) == 2
    return " ".join(capsys.readouterr().err.split())


def test_quantize_requires_signatures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, public = key_files(tmp_path)
    words = ["quantize", model, tmp_path / "out", *SMALL, "--require-signature"]
    assert "nobody to trust" in refused(capsys, *words)
    words += ["--public-key", public]
    assert "the checkpoint is not signed" in refused(capsys, *words)
    sign(model, tmp_path)
    assert call(*words, "--dry-run") == 0
    (model / "README.md").write_text("new")
    assert "added: README.md" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_adapters_are_signed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, public = key_files(tmp_path)
    base, adapter = write_checkpoint(tmp_path / "base"), tmp_path / "adapter"
    write_adapter(adapter)
    sign(base, tmp_path)
    trust = ["--adapter", adapter, "--require-signature", "--public-key", public, *SMALL]
    commands = (["quantize", base, tmp_path / "out", "--dry-run"], ["--model", base, "--out", tmp_path / "run", *RUN])
    for words in commands:
        assert "the adapter is not signed" in refused(capsys, *words, *trust)
    sign(adapter, tmp_path)
    assert call(*commands[0], *trust) == 0
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 9'))
    for words in commands:
        assert "changed: adapter_config.json" in refused(capsys, *words, *trust)


def test_a_pinned_manifest_that_disagrees_is_refused_everywhere(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FolderManifest.of(model).save(model / PINNED)
    words = ["quantize", model, tmp_path / "out", "--dry-run", *SMALL]
    assert call(*words) == 0
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" ")
    run = ["--model", model, "--out", tmp_path, *RUN, *SMALL]
    plan = ["plan", *(word for word in run if word != "--dry-run")]
    for each in (words, run, plan, ["compare", model, model]):
        assert "changed: config.json" in refused(capsys, *each)
    asked = dataclasses.replace(evaluating.Asked(tmp_path), reference=model)
    with pytest.raises(InputError, match=r"changed: config\.json"):
        evaluating._reference(asked, None, None)
