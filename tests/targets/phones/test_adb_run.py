"""A real artifact on a phone over adb: its graphs, inputs and tokens/s by onnxruntime itself, through the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from bluelm.config import ModelConfig
from eval.history import History
from export.artifacts.artifact import Artifact, list_files
from export.onnx import genai as onnx_genai
from pipeline.run.phone import make_calls
from targets.arm64.onnx import session_step
from targets.emulator.feeds import prompt_tokens, record
from targets.phones.programs import load_program
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.phones.phone import FakePhone, running_phone

ROOT = Path(__file__).parents[3]
# Stands where onnxruntime_perf_test does: runs the pushed graph on the pushed inputs and says what that says.
RUNNER = f"""#!{sys.executable}
import sys, time  # processor time: the same on a busy machine
from pathlib import Path
import numpy as np, onnx, onnxruntime
from onnx import numpy_helper
model = Path(sys.argv[-1])
inputs = [onnx.load_tensor(str(p)) for p in model.parent.glob("test_data_set_0/input_*.pb")]
session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
feeds = {{t.name: numpy_helper.to_array(t) for t in inputs}}
assert set(feeds) == {{i.name for i in session.get_inputs()}}
seconds = []
for _ in range(3):
    started = time.process_time(); outputs = session.run(None, feeds); seconds.append(time.process_time() - started)
assert all(np.isfinite(o).all() for o in outputs)
print("Average inference time cost: %f ms" % (1000 * sum(seconds) / 3))
print("P50 Latency: %.9f s" % sorted(seconds)[1])
print("Peak working set size: 12345678 bytes")
"""


def ask(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakePhone]:
    with running_phone(tmp_path_factory.mktemp("phone")) as phone:
        yield phone


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    binary = folder / "perf_test"
    binary.write_text(RUNNER)
    path = folder / "runners.yaml"
    path.write_text(yaml.safe_dump({"onnx-cpu": {"binary": str(binary)}}))
    return path


@pytest.fixture(scope="module")
def run(folder: Path, phone: FakePhone, config: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole way with a tiny model, measured on the phone."""
    small = ["--samples", "2", "--length", "16", "--eval-tokens", "256", "--method", "rtn", "--bits", "8"]
    where = ["--target", "generic-arm64", "--runtime", "onnx-cpu", "--out", str(folder), "--name", "run", "--no-bundle"]
    model = ["--model", str(tiny_checkpoint(folder / "tiny"))]
    budget = folder / "budget.yaml"
    budget.write_text("min_decode_tokens_per_s: {at_least: 1, accept: [measured]}")
    small += ["--budget", str(budget)]
    on = ["--device", phone.serial, "--runner-config", str(config), "--history", str(folder / "h.sqlite")]
    done = ask(*where, *model, *small, *on, ANDROID_ADB_SERVER_PORT=str(phone.server.port))
    return folder / "run", done


def test_a_run_measures_on_the_phone_and_the_history_keeps_it(run, folder, phone):
    path, done = run
    assert done.returncode == 0, done.stderr
    (kept,) = History(folder / "h.sqlite").runs()
    decode = kept.figure("decode_tokens_per_s", "soc")
    prefill = kept.figure("prefill_tokens_per_s", "soc")
    assert decode is not None and decode.how == "measured" and decode.n == 5 and decode.value > 1
    assert decode.by == f"onnxruntime_perf_test on V2309A {phone.serial}"
    assert prefill is not None and prefill.value > decode.value
    assert decode.low is not None and decode.low <= decode.value
    assert "thermal before: none" in decode.note and "V2309A" in decode.note
    host = kept.figure("decode_tokens_per_s", "host")
    assert host is not None and host.how == "measured"
    assert any(m.name.startswith("decode_tokens_per_s@") for m in kept.measurements)
    assert len(list((path / "device").glob("*.log"))) == 12
    assert phone.files() == []
    assert "ok   min_decode_tokens_per_s (soc)" in done.stdout


def test_measure_again_at_a_depth(run, folder, phone, config):
    path, _ = run
    asked = ("measure", str(path), "--device", phone.serial, "--runner-config", str(config), "--depth", "300")
    done = ask(*asked, "--history", str(folder / "h.sqlite"), ANDROID_ADB_SERVER_PORT=str(phone.server.port))
    assert done.returncode == 0, done.stderr
    assert "decode_tokens_per_s@300" in done.stdout and "run 2 of the history" in done.stdout


def test_android_s_emulator_is_no_phone(run, folder, phone, config):
    path, _ = run
    properties = phone.root / "bin" / "properties"
    before = properties.read_text()
    asked = ("measure", str(path), "--device", phone.serial, "--runner-config", str(config))
    try:
        properties.write_text(before + "[ro.boot.qemu]: [1]\n")
        done = ask(*asked, "--history", str(folder / "h.sqlite"), ANDROID_ADB_SERVER_PORT=str(phone.server.port))
    finally:
        properties.write_text(before)
    assert done.returncode == 3, done.stderr  # the budget asks for measured
    assert "emulated by onnxruntime_perf_test on the Android emulator V2309A" in done.stdout
    assert "FAIL min_decode_tokens_per_s (soc): not measured (only emulated by" in done.stdout


def test_a_device_that_is_not_there_costs_five_before_anything_is_built(folder, phone, config):
    asked = ("--target", "generic-arm64", "--runtime", "onnx-cpu", "--out", str(folder), "--name", "none")
    on = ("--device", "nobody", "--runner-config", str(config))
    done = ask(*asked, *on, ANDROID_ADB_SERVER_PORT=str(phone.server.port))
    assert done.returncode == 5 and "nobody" in done.stderr
    assert not (folder / "none").exists()


def test_another_chip_is_refused_before_anything_is_built(folder, phone, config):
    asked = ("--target", "snapdragon", "--runtime", "onnx-cpu", "--out", str(folder), "--name", "other")
    done = ask(
        *asked,
        *("--device", phone.serial, "--runner-config", str(config)),
        ANDROID_ADB_SERVER_PORT=str(phone.server.port),
    )
    assert done.returncode == 4 and "MT6989" in done.stderr and "--allow-other-soc" in done.stderr
    assert not (folder / "other").exists()


def test_recorded_inputs_give_the_recorded_logits(run):
    artifact = Artifact.open(run[0] / "onnx-cpu")
    feeds, logits = record(artifact, depth=200)
    for graph in ("prefill", "decode"):
        again = session_step(artifact.path(graph))(feeds[graph])["logits"]
        assert abs(again - logits[graph]).max() == 0
    assert feeds["decode"]["positions"].tolist() == [200]
    hidden = feeds["decode"]["mask"].reshape(-1) < 0
    assert (~hidden).sum() == 201  # 200 tokens in the cache, and itself


def test_other_runners_get_the_folder_and_a_prompt(run, tmp_path):
    artifact = Artifact.open(run[0] / "onnx-cpu")
    calls = make_calls(artifact, load_program("executorch-xnnpack"), tmp_path, [300])
    assert [(call.phase, call.depth) for call in calls] == [("decode", 0), ("decode", 300)]
    assert calls[1].values["prompt"].split() == ["a"] * 300


def test_every_part_of_a_compiled_model_is_called_with_its_binary(tmp_path):
    folder = tmp_path / "artifact"
    folder.mkdir()
    roles: dict[str, str] = {}
    for part in (1, 2):
        binary = f"part{part}.bin"
        (folder / binary).write_bytes(b"compiled")
        roles[binary] = "context"
        for graph in ("prefill", "decode"):
            wrapper = f"{graph}-{part}.onnx"
            given = helper.make_tensor_value_info("hidden", TensorProto.UINT16, (1, 4, 8))
            node = helper.make_node("EPContext", ["hidden"], ["out"], domain="com.microsoft", ep_cache_context=binary)
            onnx.save(helper.make_model(helper.make_graph([node], graph, [given], [])), folder / wrapper)
            roles[wrapper] = graph
    config = json.loads((tiny_checkpoint(tmp_path / "tiny") / "config.json").read_text())
    artifact = Artifact(
        format="qnn-context",
        model=ModelConfig.from_dict(config),
        context=16,
        chunk=4,
        mask_value=0.0,
        cache="int16",
        parameters=1,
        bits_per_weight=4,
        quantized_digest="",
        producers={},
        files=list_files(folder, roles),
    )
    artifact.save(folder)
    calls = make_calls(Artifact.open(folder), load_program("qnn-context"), tmp_path / "calls", [])
    assert [(call.phase, len(call.parts)) for call in calls] == [("prefill", 2), ("decode", 2)]
    for call in calls:
        for number, part in enumerate(call.parts, 1):
            assert {path.name for path in part.model.iterdir()} == {part.entry, f"part{number}.bin", "test_data_set_0"}
            given = onnx.load_tensor(str(part.model / "test_data_set_0" / "input_0.pb"))
            assert (given.data_type, list(given.dims)) == (TensorProto.UINT16, [1, 4, 8])


def test_a_graph_that_takes_any_number_of_tokens_is_timed_on_a_prompt_with_room_behind_it(tmp_path):
    quantized = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"), blocks=1)
    artifact = onnx_genai.export(quantized, tmp_path / "a", context=32)
    feeds, logits = record(artifact)
    assert logits["prefill"].shape[1] == prompt_tokens(artifact) == 16
    assert feeds["decode"]["attention_mask"].shape[1] == 17
