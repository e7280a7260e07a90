"""ONNX for onnxruntime-genai: logits as dequantized torch's, and genai itself generates the same tokens."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.onnx import genai as onnx_genai
from export.readback import differing
from targets.host.torch_runtime import TorchRuntime
from targets.registry import find
from targets.runtime import open_runtime
from tests.support.answers import TEXT, mean_kl
from tests.support.checkpoints.families import glm
from tests.support.checkpoints.rounded import rounded
from tests.support.checkpoints.rounded import rounded as small

CONTEXT, CHUNK = 96, 4  # chunks shorter than the prompt


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return rounded(tmp_path_factory.mktemp("genai") / "quantized")


@pytest.fixture(scope="module")
def artifact(quantized: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("genai") / "artifact"
    return onnx_genai.export(quantized, folder, context=CONTEXT, chunk=CHUNK)


def test_logits_agree_in_one_go_and_token_by_token(quantized: QuantizedCheckpoint, artifact: Artifact):
    reference = TorchRuntime(quantized, CONTEXT).logits(TEXT)
    with open_runtime(artifact.folder) as runtime:
        assert mean_kl(reference, runtime.logits(TEXT)) < 1e-9
        runtime.reset()
        runtime.prefill(TEXT[:5])
        stepped = np.stack([runtime.decode(token) for token in TEXT[5:]])
    assert mean_kl(reference[5:], stepped) < 1e-9


def test_genai_generates_what_the_reference_does(quantized: QuantizedCheckpoint, artifact: Artifact):
    genai: Any = importlib.import_module("onnxruntime_genai")  # has no annotations
    model = genai.Model(str(artifact.folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(TEXT) + 24, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(TEXT)
    while not generator.is_done():
        generator.generate_next_token()
    said = list(generator.get_sequence(0))[len(TEXT) :]
    reference = TorchRuntime(quantized, CONTEXT)
    wanted = [int(reference.logits(TEXT)[-1].argmax())]
    while len(wanted) < len(said):
        wanted.append(int(reference.decode(wanted[-1]).argmax()))
    assert said == wanted


def test_codes_and_scales_in_the_file_are_the_checkpoints(quantized: QuantizedCheckpoint, artifact: Artifact):
    graph = onnx.load(artifact.path("model")).graph  # the format's own reader, weights included
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for layer in range(quantized.config.num_layers):
        at = f"model.layers.{layer}"
        for name in (f"{at}.self_attn.o_proj", f"{at}.mlp.gate_proj", f"{at}.mlp.down_proj"):
            check(held, name, quantized.linear(name).codes.numpy(), quantized.linear(name).scales.numpy())
        parts = [quantized.linear(f"{at}.self_attn.{kind}_proj") for kind in "qkv"]
        codes, scales = (np.concatenate([getattr(part, a).numpy() for part in parts]) for a in ("codes", "scales"))
        check(held, f"{at}.self_attn.qkv", codes, scales)
    table = quantized.embed()
    assert np.array_equal(held["embed.codes"], table.codes.numpy())
    assert np.array_equal(held["embed.scales"], table.scales.numpy())
    head = quantized.linear("lm_head")
    assert np.array_equal(held["lm_head.codes"].reshape(head.shape), head.codes.numpy())


def check(held: dict[str, np.ndarray], name: str, codes: np.ndarray, scales: np.ndarray) -> None:
    packed = held[f"{name}.codes"].reshape(len(codes), -1)
    assert np.array_equal(packed & 15, codes[:, 0::2]), name
    assert np.array_equal(packed >> 4, codes[:, 1::2]), name
    assert np.array_equal(held[f"{name}.scales"].reshape(scales.shape), scales), name


def test_norms_and_attention_are_fused(artifact: Artifact):
    kinds = [node.op_type for node in onnx.load(artifact.path("model"), load_external_data=False).graph.node]
    layers = artifact.model.num_layers
    assert kinds.count("GroupQueryAttention") == layers
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * layers
    assert kinds.count("MatMulNBits") == 5 * layers + 1
    assert kinds.count("Cast") == 2 + kinds.count("MatMulNBits") + kinds.count("GatherBlockQuantized")  # scales
    config = json.loads(artifact.path("genai").read_text())
    assert config["model"]["eos_token_id"] == 2
    assert config["search"]["chunk_size"] == CHUNK


def test_what_the_target_ships_has_8_bit_activations_and_stays_close(quantized: QuantizedCheckpoint, tmp_path):
    target = find("generic-arm64")
    made = target.lower(quantized, None, tmp_path / "a", context=CONTEXT, chunk=32)
    assert made.format == "onnx-genai"
    nodes = onnx.load(made.path("model"), load_external_data=False).graph.node
    assert {a.i for n in nodes if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"} == {4}
    with open_runtime(made.folder) as runtime:
        assert mean_kl(TorchRuntime(quantized, CONTEXT).logits(TEXT), runtime.logits(TEXT)) < 5e-3


def test_a_row_of_4_bit_codes_is_looked_up_and_read_back(tmp_path):
    narrow = rounded(tmp_path / "q", blocks=1, embed_bits=4)
    made = onnx_genai.export(narrow, tmp_path / "a", context=32)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(TorchRuntime(narrow, 32).logits(TEXT), runtime.logits(TEXT)) < 1e-9
    assert differing(made, narrow) == []


def test_asymmetric_weights_run_too(tmp_path):
    asymmetric = rounded(tmp_path / "q", blocks=1, symmetric=False)
    made = onnx_genai.export(asymmetric, tmp_path / "a", context=32)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(TorchRuntime(asymmetric, 32).logits(TEXT), runtime.logits(TEXT)) < 1e-9


def test_widths_that_differ_within_attention_leave_it_unpacked(tmp_path: Path) -> None:
    """Each of the three has a product and a bias of its own, and a row of the table is one block of a power of two."""
    wide = {f"model.layers.{layer}.self_attn.v_proj": {"bits": 8, "group_size": 32} for layer in (0, 1)}
    made = small(tmp_path / "quantized", source=glm(tmp_path / "float"), layers=wide)
    artifact = onnx_genai.export(made, tmp_path / "a", context=64, chunk=16)
    assert differing(artifact, made) == []
    graph = onnx.load(artifact.path("model"), load_external_data=False).graph
    (table,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    width = made.config.hidden_size
    assert width & (width - 1) == 0  # the least power of two that holds a row is the row
    assert {a.name: a.i for a in table.attribute}["block_size"] == width
    biases = [name for node in graph.node for name in node.input if name.endswith("_proj.bias")]
    assert len(biases) == 3 * made.config.num_layers
