"""ONNX and LiteRT artifacts as arm64 code: the aarch64 wheels under qemu give this machine's logits."""

from __future__ import annotations

import logging

import numpy as np
import psutil
import pytest

from bluelm.errors import TargetError, UnavailableError
from export.litert import export as litert
from export.onnx import cpu as onnx_cpu
from export.onnx import genai as onnx_genai
from targets.emulator import count as qemu_count
from targets.emulator.guest import Guest
from targets.runtime import open_runtime
from tests.packages import requires
from tests.support.answers import TEXT, mean_kl
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import tiny_checkpoint

EMULATOR = requires("qemu-user", "debian-archive-keyring")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("emulator")
    return rounded(folder / "q", source=tiny_checkpoint(folder / "tiny"), blocks=1)


@EMULATOR
@pytest.mark.parametrize("exporter", [onnx_cpu, onnx_genai, litert])
def test_arm64_code_gives_this_machines_logits(quantized, exporter, tmp_path):
    made = exporter.export(quantized, tmp_path / "a", context=32, chunk=8)
    with open_runtime(made.folder) as here, open_runtime(made.folder, "arm64") as there:
        assert "cortex" in there.name
        expected = here.logits(TEXT)
        assert mean_kl(expected, there.logits(TEXT)) < 1e-3  # 8-bit rounding falls differently in other kernels
        there.reset()
        stepped = np.stack([there.decode(token) for token in TEXT[:3]])
        assert mean_kl(expected[:3], stepped) < 1e-3


@EMULATOR
def test_a_stopped_guest_is_noticed_and_goes_on(quantized, tmp_path, monkeypatch, caplog):
    """`kill -STOP` from outside is said while waiting; let go on, it answers as it would have."""
    monkeypatch.setattr("targets.emulator.guest.HEARTBEAT_S", 0.05)
    made = onnx_cpu.export(quantized, tmp_path / "a", context=32, chunk=8)
    before = set(psutil.Process().children())  # of other tests in this process
    with open_runtime(made.folder, "arm64") as there:
        expected = there.logits(TEXT[:8])
        (guest,) = set(psutil.Process().children()) - before

        class LetGoOn(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "is stopped" in record.getMessage():
                    guest.resume()

        heard = LetGoOn()
        logging.getLogger("bluelm_export").addHandler(heard)
        guest.suspend()
        there.reset()
        found = there.logits(TEXT[:8])
        logging.getLogger("bluelm_export").removeHandler(heard)
    assert np.array_equal(found, expected)
    assert "the arm64 guest" in caplog.text and "is stopped" in caplog.text


@EMULATOR
def test_a_damaged_model_is_told_with_the_guests_words(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"nothing")
    with pytest.raises(TargetError, match="failed as arm64 code"):
        Guest("litert", [path])


def test_without_qemu_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(qemu_count.shutil, "which", lambda name: None)
    with pytest.raises(UnavailableError, match="qemu") as refused:
        Guest("onnx", [])
    assert "apt-get install qemu-user" in (refused.value.fix or "")
