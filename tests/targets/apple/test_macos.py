"""On a Mac: Apple's own prediction on each compute unit against the interpreter. Elsewhere there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from export.coreml import export as coreml
from targets.apple.backend import open_interpreter, open_mac
from targets.apple.macos import compile_package
from tests.support.checkpoints.rounded import rounded

pytestmark = pytest.mark.skipif(sys.platform != "darwin", reason="Core ML's own runtime exists on macOS only")


@pytest.mark.parametrize("unit", ["cpu", "gpu", "ane"])
def test_apples_prediction_is_the_interpreters(tmp_path: Path, unit: str) -> None:
    made = coreml.export(rounded(tmp_path / "q"), tmp_path / "a", context=128, chunk=32, debug=True)
    tokens = np.random.default_rng(1).integers(5, 6000, 90).tolist()
    ours, theirs = open_interpreter(made), open_mac(made, unit)
    want, got = ours.logits(tokens), theirs.logits(tokens)
    assert float(np.linalg.norm(got - want) / np.linalg.norm(want)) < 2e-2
    assert float((got.argmax(-1) == want.argmax(-1)).mean()) > 0.95
    streams = theirs.blocks(tokens), ours.blocks(tokens)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*streams, strict=True)]
    assert max(errors) < 2e-2


def test_apples_compiler_takes_the_package(tmp_path: Path) -> None:
    made = coreml.export(rounded(tmp_path / "q"), tmp_path / "a", context=128, chunk=32)
    assert compile_package(coreml.packages(made)[0], tmp_path).is_dir()
