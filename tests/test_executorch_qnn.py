"""ExecuTorch with the QNN delegate: a tiny model, lowered for HTP and run on Qualcomm's simulator."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from bluelm.errors import TargetError
from bluelm.weights import LINEARS
from compress.recipe import Recipe
from eval import size_plan, structure
from export import readback
from targets.registry import find
from targets.runtime import open_runtime
from targets.torch_runtime import TorchRuntime
from tests import damage
from tests.rounded import rounded
from tests.test_litert_artifact import mean_kl
from tests.test_targets_mobile import SEVEN
from tests.tiny import tiny_checkpoint

TOKENS = [1, 400, 23, 871, 5000, 77]


def test_a_pte_runs_on_the_npus_simulator(tmp_path):
    quantized = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"), layers=1)
    target = find("snapdragon", runtime="executorch-qnn")
    made = target.lower(quantized, None, tmp_path / "a", context=16, chunk=4)
    with open_runtime(made.folder, target.default_on) as runtime:
        chunked = runtime.logits(TOKENS[:5])
        last = runtime.decode(TOKENS[5])
    shares = {m.name: m.value for m in structure.npu_shares(made, "npu")}
    assert shares == {"delegated_share": 1, "npu_node_share": 1, "npu_mac_share": 1}
    assert readback.differing(made, quantized) == []
    wrong = [f"model.layers.0.{name}" for name in LINEARS]
    assert sorted(readback.differing(made, damage.scales(quantized, 0)) or []) == sorted(wrong)
    parts = size_plan.planned_parts(quantized, made)
    assert parts is not None
    assert size_plan.deviation(sum(parts.values()), made) < 0.02
    expected = TorchRuntime(quantized, 16).logits(TOKENS)
    assert mean_kl(expected, np.concatenate([chunked, last[None]])) < 1e-3  # 16-bit activations


def test_a_7b_in_float16_is_refused_in_advance():
    with pytest.raises(TargetError, match="float16 weights do not fit"):
        find("snapdragon", runtime="executorch-qnn").check(SEVEN, Recipe.load("w4-g32"))


def test_what_the_compiler_cannot_hold_here_is_refused_in_advance(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20e9))
    target = find("snapdragon", runtime="executorch-qnn")
    with pytest.raises(TargetError, match=r"about 2\d GB of memory \(an estimate\), 20 GB are available"):
        target.check(replace(SEVEN, num_layers=2), Recipe.load("w4-g32"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40e9))
    target.check(replace(SEVEN, num_layers=2), Recipe.load("w4-g32"))
