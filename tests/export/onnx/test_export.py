"""ONNX artifacts: exact codes, one weight file, equal bytes, and logits that agree with torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.errors import InputError, TargetError
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.onnx import cpu as onnx_cpu
from export.onnx import npu as onnx_npu
from targets.host.torch_runtime import TorchRuntime, TwinRuntime
from targets.runtime import Runtime, open_runtime
from tests.support.checkpoints import lowered as lowering
from tests.support.files.onnx_reading import Weight, cpu_weights, npu_weights, structure

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
SYMMETRIC, RECIPES = sorted(lowering.SYMMETRIC), sorted(lowering.RECIPES)


def assert_same_weights(found: dict[str, Weight], quantized: QuantizedCheckpoint) -> None:
    """Codes, scales and zero points bit for bit; blocks may split a group, each with the group's scale."""
    names = {f"model.layers.{i}.{kind}" for i in range(2) for kind in quantized_linears()} | {"lm_head"}
    assert set(found) == names
    for name, weight in found.items():
        expected = quantized.linear(name)
        np.testing.assert_array_equal(weight.codes, expected.codes.numpy(), err_msg=name)
        repeat = weight.scales.shape[1] // expected.groups
        scales = expected.scales.double().numpy().repeat(repeat, axis=1)
        np.testing.assert_array_equal(weight.scales, scales, err_msg=name)
        zeros = expected.zeros.numpy().repeat(repeat, axis=1)
        np.testing.assert_array_equal(weight.zeros, zeros, err_msg=name)


def quantized_linears() -> tuple[str, ...]:
    attention = [f"self_attn.{k}_proj" for k in "qkvo"]
    return (*attention, *(f"mlp.{k}_proj" for k in ("gate", "up", "down")))


@pytest.mark.parametrize("recipe", SYMMETRIC)
@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_npu_graph_holds_the_checkpoints_codes(recipe: str, graph: str) -> None:
    assert_same_weights(npu_weights(lowering.npu(recipe).path(graph)), lowering.quantized(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_cpu_graph_holds_the_checkpoints_codes(recipe: str, graph: str) -> None:
    assert_same_weights(cpu_weights(lowering.cpu(recipe).path(graph)), lowering.quantized(recipe))


def test_rows_that_no_block_divides() -> None:
    """inner = 100: a row of down_proj is filled up with zero points."""
    recipe = "w4-row-asymmetric-head4"
    artifact = lowering.cpu(recipe, inner=100)
    found = cpu_weights(artifact.path("prefill"))["model.layers.1.mlp.down_proj"]
    expected = lowering.quantized(recipe, inner=100).linear("model.layers.1.mlp.down_proj")
    np.testing.assert_array_equal(found.codes, expected.codes.numpy())
    tokens = lowering.tokens(9)
    exact = TorchRuntime(lowering.quantized(recipe, inner=100), lowering.CONTEXT).logits(tokens)
    with open_runtime(artifact.folder) as runtime:
        assert lowering.distance(runtime.logits(tokens), exact) < 1e-5


@pytest.mark.parametrize("recipe", ["w4-g32", "w8-row-asymmetric-embed4"])
def test_embedding_file_holds_the_checkpoints_rows(recipe: str) -> None:
    table = EmbeddingTable.open(lowering.cpu(recipe).path("embedding"))
    expected = lowering.quantized(recipe).embed().dequantize().numpy()
    np.testing.assert_array_equal(table.rows(range(lowering.VOCAB)), expected)


@pytest.mark.parametrize("build", [lowering.npu, lowering.cpu])
def test_graphs_are_valid_and_share_one_weight_file(build: Callable[[], Artifact]) -> None:
    built = build()
    places = []
    for graph in ("prefill", "decode"):
        onnx.checker.check_model(str(built.path(graph)))
        model = onnx.load(built.path(graph), load_external_data=False)
        external = {
            t.name: {e.key: e.value for e in t.external_data}
            for t in model.graph.initializer
            if t.data_location == onnx.TensorProto.EXTERNAL
        }
        places.append({name: (e["location"], e["offset"]) for name, e in external.items()})
    assert places[0] == places[1]
    assert {location for location, _ in places[0].values()} == {built.path("weights").name}
    assert sum(f.bytes for f in built.files if f.role in ("prefill", "decode")) < 200_000


@pytest.mark.parametrize("kind", ["npu", "cpu"])
def test_same_input_same_bytes(kind: str, tmp_path: Path) -> None:
    first = getattr(lowering, kind)()
    source = lowering.quantized()
    if kind == "npu":
        again = onnx_npu.export(source, lowering.ranges(), tmp_path / "again", context=32, chunk=8)
    else:
        again = onnx_cpu.export(source, tmp_path / "again", context=32, chunk=8)
    assert again.files == first.files
    assert (again.folder / "artifact.json").read_bytes() == (first.folder / "artifact.json").read_bytes()
    again.verify()


@pytest.mark.parametrize("recipe", RECIPES)
def test_cpu_artifact_answers_as_the_dequantized_model(recipe: str) -> None:
    tokens = lowering.tokens(30)
    expected = TorchRuntime(lowering.quantized(recipe), lowering.CONTEXT).logits(tokens)
    with open_runtime(lowering.cpu(recipe).folder) as runtime:
        found = runtime.logits(tokens)
    assert found.dtype == np.float32
    assert lowering.mean_kl(expected, found) < 1e-10


@pytest.mark.parametrize("recipe", SYMMETRIC)
def test_npu_graph_on_the_cpu_answers_as_its_twin(recipe: str) -> None:
    """onnxruntime's own QuantizeLinear and DequantizeLinear against torch; only ties may round apart."""
    tokens = lowering.tokens(30)
    twin = TwinRuntime(lowering.quantized(recipe), lowering.ranges(recipe), lowering.CONTEXT).logits(tokens)
    exact = TorchRuntime(lowering.quantized(recipe), lowering.CONTEXT).logits(tokens)
    with open_runtime(lowering.npu(recipe).folder) as runtime:
        found = runtime.logits(tokens)
    assert lowering.mean_kl(twin, found) < 1e-6
    assert 0 < lowering.mean_kl(exact, found) < 1e-6


def test_a_head_that_is_the_embedding_table() -> None:
    tokens = lowering.tokens(30)
    exact = TorchRuntime(lowering.quantized(tied=True), lowering.CONTEXT).logits(tokens)
    with open_runtime(lowering.npu(tied=True).folder) as runtime:
        assert lowering.mean_kl(exact, runtime.logits(tokens)) < 1e-6


@pytest.mark.parametrize(("activations", "cache"), [(16, 8), (8, 8)])
def test_ranges_of_8_bits_make_graphs_of_8_bits(activations: int, cache: int, tmp_path: Path) -> None:
    weights, tokens = lowering.quantized(), lowering.tokens(30)
    ranges = lowering.ranges().model_copy(update={"activation_bits": activations, "cache_bits": cache})
    artifact = onnx_npu.export(weights, ranges, tmp_path / "npu", context=lowering.CONTEXT, chunk=lowering.CHUNK)
    assert artifact.cache == "int8"
    twin = TwinRuntime(weights, ranges, lowering.CONTEXT).logits(tokens)
    exact = TorchRuntime(weights, lowering.CONTEXT).logits(tokens)
    with open_runtime(artifact.folder) as runtime:
        found = runtime.logits(tokens)
    lost = lowering.mean_kl(exact, twin)
    assert 1e-7 < lost < 0.05
    assert lowering.mean_kl(twin, found) < 0.1 * lost  # the same but for ties


@pytest.mark.parametrize("sizes", [(32, 32), (24, 10), (5, 1)], ids=str)
def test_other_contexts_and_chunks(sizes: tuple[int, int]) -> None:
    context, chunk = sizes
    tokens = lowering.tokens(context)
    expected = TorchRuntime(lowering.quantized(), context).logits(tokens)
    with open_runtime(lowering.cpu(lowering.PLAIN, context, chunk).folder) as runtime:
        assert lowering.distance(runtime.logits(tokens), expected) < 1e-5


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.data())
@settings(max_examples=30)
def test_any_mix_of_prefill_and_decode_gives_the_same_logits(parts: list[int], data: st.DataObject) -> None:
    """Chunks that begin anywhere, also where the past slots of the prefill graph end."""
    runtime, whole, tokens = whole_prefill()
    runtime.reset()
    done = 0
    for count in parts:
        count = min(count, lowering.CONTEXT - done)
        if count == 0:
            break
        piece = tokens[done : done + count]
        decode = count == 1 and data.draw(st.booleans())
        found = runtime.decode(piece[0])[None] if decode else runtime.prefill(piece)
        np.testing.assert_allclose(found, whole[done : done + count], atol=2e-4)
        done += count


@cache
def whole_prefill() -> tuple[Runtime, np.ndarray, list[int]]:
    """An open runtime, the logits of one long prefill, and its tokens."""
    tokens = lowering.tokens(lowering.CONTEXT)
    runtime = open_runtime(lowering.cpu().folder)
    return runtime, runtime.logits(tokens), tokens


def test_tokens_that_do_not_fit() -> None:
    with open_runtime(lowering.cpu().folder) as runtime:
        with pytest.raises(InputError, match="do not fit a context of 32"):
            runtime.logits(lowering.tokens(33))
        with pytest.raises(InputError, match="outside the vocabulary"):
            runtime.logits([lowering.VOCAB])
        with pytest.raises(InputError, match="no tokens"):
            runtime.prefill([])
        assert runtime.logits([1, 2]).shape == (2, lowering.VOCAB)


@pytest.mark.parametrize("kind", ["npu", "cpu"])
def test_structure_is_as_it_was(kind: str) -> None:
    """A change of layout is seen in a diff. `rm tests/data/golden/onnx-*` and a run of this test write it anew."""
    found = structure(getattr(lowering, kind)().path("decode"))
    path = GOLDEN / f"onnx-{kind}-decode.txt"
    if not path.exists():
        path.write_text(found)
        pytest.fail(f"{path} was missing and is written now: look at it and commit it")
    assert found == path.read_text()


def test_the_npu_refuses_what_does_not_belong(tmp_path: Path) -> None:
    asymmetric = lowering.quantized("w4-g32-asymmetric")
    with pytest.raises(TargetError, match="zero points"):
        onnx_npu.export(asymmetric, lowering.ranges("w4-g32-asymmetric"), tmp_path / "a", context=32, chunk=8)
    with pytest.raises(InputError, match="other weights"):
        onnx_npu.export(asymmetric, lowering.ranges(), tmp_path / "a", context=32, chunk=8)
    assert list(tmp_path.iterdir()) == []


def test_damaged_artifacts(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(lowering.cpu().folder, folder)
    weights = folder / "weights.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:100] + b"\xff" + content[101:])
    with pytest.raises(InputError, match="was changed"):
        Artifact.open(folder).verify()
    weights.write_bytes(content[:-1])
    with pytest.raises(InputError, match="missing or cut"):
        Artifact.open(folder)
    weights.write_bytes(content)
    (folder / "prefill.onnx").write_bytes(b"x" * (folder / "prefill.onnx").stat().st_size)
    with pytest.raises(InputError, match="cannot load the graph"):
        open_runtime(folder)
    (folder / "artifact.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        Artifact.open(folder)
    with pytest.raises(InputError, match=r"no artifact\.json"):
        Artifact.open(tmp_path)
    with pytest.raises(InputError, match="does not run on 'htp'"):
        open_runtime(lowering.cpu().folder, on="htp")


def test_an_artifact_that_points_outside(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(lowering.cpu().folder, folder)
    text = (folder / "artifact.json").read_text()
    (folder / "artifact.json").write_text(text.replace('"weights.bin"', '"../weights.bin"'))
    with pytest.raises(InputError, match="outside its folder"):
        Artifact.open(folder)
