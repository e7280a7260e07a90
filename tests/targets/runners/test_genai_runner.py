"""onnxruntime-genai in its child process reads, answers and ends as the checkpoint says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bluelm.errors import TargetError
from bluelm.text.tokenizer import Message
from export.artifacts.artifact import Artifact
from export.formats import StandardRunner
from export.onnx import genai
from targets.host.torch_runtime import TorchRuntime
from targets.runners.genai import open_genai
from tests.support.checkpoints.rounded import rounded

RUNNER = StandardRunner("onnxruntime-genai", "", "onnxruntime-genai")
TEXT = [1, *range(4, 44)]


def test_genai_reads_answers_and_ends(tmp_path: Path) -> None:
    quantized = rounded(tmp_path / "q", blocks=1)
    tokenizer = quantized.tokenizer()
    artifact = genai.export(quantized, tmp_path / "a", context=64, chunk=16)
    with open_genai(artifact, RUNNER) as runner:
        assert (runner.context, runner.vocab_size) == (64, 6144) and "genai 0." in runner.name
        text = "[|Human|]:你好[|AI|]:"
        assert runner.tokens([text]) == [tokenizer.encode(text, marks=True)]
        prompt = runner.chat([{"role": "user", "content": "你好"}])
        assert list(prompt.tokens) == tokenizer.chat([Message("user", "你好")])
        logits = TorchRuntime(quantized, 64).logits(TEXT).astype(np.float64)[-9:]
        wanted = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(runner.distributions(TEXT, len(TEXT) - 8), wanted, atol=1e-3)
        assert runner.answer(TEXT, 4, begin=2).ended
        assert not runner.answer(TEXT, 4, begin=5).ended
        assert runner.answer(TEXT, 4).tokens[0] == int(wanted[-1].argmax())
    hurt = Artifact.open(Path(shutil.copytree(artifact.folder, tmp_path / "hurt")))
    path = hurt.folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["filename"] = "other.onnx"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TargetError, match="refuses the folder"):
        open_genai(hurt, RUNNER)
