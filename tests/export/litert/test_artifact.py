"""LiteRT artifacts: exact weights, logits against dequantized torch, chunks, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.errors import InputError, TargetError
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from compress.methods.grid import choose_grid
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.litert import export as litert
from export.litert.file import LitertModel, pack
from export.litert.reader import read
from export.lowering.ranges import Ranges
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.answers import TEXT, mean_kl
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.rounded import linear_names, rounded
from tests.support.quantizing import Stopping


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("litert") / "quantized")


@pytest.fixture(scope="module")
def artifact(demo: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return litert.export(demo, tmp_path_factory.mktemp("litert") / "artifact", context=64, chunk=16)


def test_codes_and_scales_in_the_file_are_the_checkpoints(demo: QuantizedCheckpoint, artifact: Artifact):
    contents = read(artifact.path("model"))
    assert set(contents.linears) == set(linear_names(demo))
    for name, found in contents.linears.items():
        wanted = demo.linear(name)
        assert torch.equal(found.codes, wanted.codes), name
        assert torch.equal(found.scales, wanted.scales), name
        assert (found.bits, found.groups) == (wanted.bits, wanted.groups)


def test_both_signatures_take_the_cache_and_give_its_new_part(artifact: Artifact):
    layers = artifact.model.num_layers
    interpreter = Interpreter(model_path=str(artifact.path("model")))
    signatures = interpreter.get_signature_list()
    past = {f"past_{kind}.{layer}" for kind in ("keys", "values") for layer in range(layers)}
    new = {f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(layers)}
    assert set(signatures) == {"prefill", "decode"}
    for told in signatures.values():
        assert set(told["inputs"]) == {"hidden", "positions", "mask"} | past
        assert set(told["outputs"]) == {"logits"} | new


def test_logits_agree_with_dequantized_torch_over_chunks_and_single_tokens(
    demo: QuantizedCheckpoint, artifact: Artifact
):
    tokens = (TEXT * 3)[:40]  # two whole chunks and a part of one
    reference = TorchRuntime(demo, 64).logits(tokens)
    with open_runtime(artifact.folder) as runtime:
        assert mean_kl(reference, runtime.logits(tokens)) < 5e-3  # 8-bit activations
        runtime.reset()
        stepped = np.stack([runtime.decode(token) for token in tokens])
    assert mean_kl(reference, stepped) < 5e-3
    # a wrong mask or position would show in late rows first
    assert mean_kl(reference[-8:], stepped[-8:]) < 5e-3


def test_eight_bit_rows_run_too(tmp_path):
    quantized = rounded(tmp_path / "q", blocks=1, bits=8, group_size=-1)
    made = litert.export(quantized, tmp_path / "a", context=16, chunk=16)
    contents = read(made.path("model"))
    for name in linear_names(quantized):
        assert torch.equal(contents.linears[name].codes, quantized.linear(name).codes)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(TorchRuntime(quantized, 16).logits(TEXT), runtime.logits(TEXT)) < 5e-3


def test_the_same_checkpoint_gives_the_same_bytes(demo: QuantizedCheckpoint, artifact: Artifact, tmp_path):
    again = litert.export(demo, tmp_path / "again", context=64, chunk=16)
    assert again.files == artifact.files


def test_what_litert_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    asymmetric = rounded(tmp_path / "q", blocks=1, symmetric=False)
    with pytest.raises(TargetError, match="zero points"):
        litert.export(asymmetric, tmp_path / "a", context=16, chunk=4)
    assert not (tmp_path / "a").exists()


def test_weights_that_litert_has_no_kernel_for_are_refused():
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def weight(bits: int, group: int, symmetric: bool = True) -> QuantizedTensor:
        return choose_grid(values, bits, group, symmetric).nearest(values)

    exact = weight(4, 32)
    for sound in (exact, weight(8, -1), weight(4, -1), replace(weight(4, -1), scales=weight(4, -1).scales.float())):
        litert.check_weight(sound, "layer")
    for bad, why in (
        (weight(4, 32, symmetric=False), "no zero points"),
        (weight(8, 32), "no groups for 8-bit"),
        (replace(exact, scales=exact.scales * 1.001), "bfloat16 scales"),
    ):
        with pytest.raises(TargetError, match=why) as error:
            litert.check_weight(bad, "layer")
        assert error.value.where == "layer"


def test_both_signatures_are_told_of_and_ranges_lie_beside_an_8_bit_cache(tmp_path):
    quantized, told = lowering.quantized(tokenizer=False), Stopping(0)
    ranges = lowering.ranges(tokenizer=False)
    made = {
        bits: litert.export(
            quantized, tmp_path / f"{bits}", context=16, chunk=4, kv_bits=bits, ranges=ranges, progress=told
        )
        for bits in (8, 16)
    }
    assert told.notes == ["prefill", "decode"] * 2 and told.tasks == [("lower to LiteRT", 2)] * 2
    assert Ranges.load(made[8].path("ranges")) == ranges and not made[16].paths("ranges")
    assert made[8].mask_value == made[16].mask_value == -10000.0
    rows = EmbeddingTable.open(made[8].path("embedding")).rows([5, 0])
    assert np.array_equal(rows, quantized.embed().dequantize().numpy()[[5, 0]])
    past = {"past_keys.1": [1, 2, 16, 12], "past_values.1": [1, 2, 12, 16], "mask": [1, 1, 4, 16], "positions": [4]}
    for bits, dtype in ((8, np.int8), (16, np.float16)):
        interpreter = Interpreter(model_path=str(made[bits].path("model")))
        inputs = interpreter.get_signature_runner("prefill").get_input_details()
        assert {name: inputs[name]["shape"].tolist() for name in past} == past
        assert inputs["past_keys.1"]["dtype"] == dtype and inputs["positions"]["dtype"] == np.int32


def test_a_damaged_file_is_bad_input(artifact: Artifact, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    path = copy / "model.tflite"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match="cannot load"):
        open_runtime(copy)


@settings(max_examples=25)
@given(rows=st.integers(1, 5), groups=st.integers(1, 4), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_any_weight_survives_the_file(tmp_path_factory, rows: int, groups: int, bits: int, seed: int):
    size = 32 if bits == 4 else -1
    columns = 32 * groups
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    quantized = choose_grid(weight, bits, size, True).nearest(weight)
    model = LitertModel("test")
    graph = model.subgraph("main")
    graph.weight("w", lambda: quantized)
    path = tmp_path_factory.mktemp("weight") / "w.tflite"
    model.signature("main", graph, {}, {})
    model.save(path)
    found = read(path).linears["w"]
    assert torch.equal(found.codes, quantized.codes)
    assert torch.equal(found.dequantize(), quantized.dequantize())
    assert pack(quantized).nbytes == rows * columns * bits // 8
