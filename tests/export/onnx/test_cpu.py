"""What the writer of onnx-cpu stores: known answers; narrow caches and reordered inputs, by onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from bluelm.errors import TargetError
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.mobile import KvBits
from export.lowering.ranges import Ranges
from export.onnx import cpu as onnx_cpu
from export.onnx.cpu import BlockLinear, store_weight
from export.onnx.graph import WeightFile
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import open_runtime
from tests.support.checkpoints import lowered as lowering
from tests.support.files.onnx_reading import WIDTHS
from tests.support.quantizing import Stopping

PLAIN: dict[str, Any] = {"tokenizer": False}
QWEN = {**PLAIN, "architecture": "Qwen2ForCausalLM", "layer_norm": False}  # has biases


def weight(codes: torch.Tensor, bits: int, group: int = -1, zero: int | None = None) -> QuantizedTensor:
    """Scales 1, 2, 3 ... group by group."""
    groups = 1 if group == -1 else codes.shape[1] // group
    scales = torch.arange(1, len(codes) * groups + 1).view(len(codes), groups).half()
    zeros = torch.full((len(codes), groups), 2 ** (bits - 1) if zero is None else zero, dtype=torch.uint8)
    return QuantizedTensor(codes.to(torch.uint8), scales, zeros, bits, group)


def stored(tensor: QuantizedTensor, folder: Path) -> tuple[BlockLinear, dict[str, np.ndarray]]:
    with WeightFile(folder / "weights.bin") as weights:
        linear = store_weight(weights, "w", tensor)
    data, found = (folder / "weights.bin").read_bytes(), dict[str, np.ndarray]()
    for name, at in weights.tensors.items():
        raw = data[at.offset : at.offset + at.length]
        found[name] = np.frombuffer(raw, WIDTHS[onnx.TensorProto.DataType.Name(at.dtype)]).reshape(at.shape)
    return linear, found


@pytest.mark.parametrize(
    ("columns", "group", "block"),
    [(512, -1, 256), (256, -1, 256), (384, -1, 128), (192, -1, 64), (96, -1, 32), (80, -1, 16), (100, -1, 16),
     (24, -1, 16), (64, 32, 32), (96, 48, 16), (1024, 512, 256), (128, 16, 16)],
)  # fmt: skip
def test_a_scale_is_repeated_for_the_largest_block_that_divides_its_columns(
    columns: int, group: int, block: int, tmp_path: Path
) -> None:
    codes = torch.arange(2 * columns).view(2, columns) % 251
    linear, found = stored(weight(codes, 8, group), tmp_path)
    assert linear == BlockLinear(2, 8, block, False, False)
    blocks = -(-columns // block)
    assert found["w.codes"].shape == (2, blocks, block) and set(found) == {"w.codes", "w.scales"}
    np.testing.assert_array_equal(found["w.codes"].reshape(2, -1)[:, :columns], codes.numpy())
    assert (found["w.codes"].reshape(2, -1)[:, columns:] == 128).all()  # stands for 0
    groups = 1 if group == -1 else columns // group
    wanted = [number for number in range(1, 2 * groups + 1) for _ in range(blocks // groups)]
    assert found["w.scales"].dtype == np.float16 and found["w.scales"].tolist() == wanted


def test_halves_of_a_byte_and_zero_points(tmp_path: Path) -> None:
    codes = torch.arange(2 * 20).view(2, 20) % 16
    linear, found = stored(weight(codes, 4, zero=3), tmp_path)
    assert linear == BlockLinear(2, 4, 16, True, False)
    assert found["w.codes"].shape == (2, 2, 8)
    assert found["w.codes"][0].tobytes().hex() == "1032547698badcfe" + "1032" + "33" * 6
    assert found["w.zeros"].tobytes().hex() == "3333"
    three = weight(torch.zeros(2, 96), 4, 32, zero=5)
    assert stored(three, tmp_path)[1]["w.zeros"].tobytes().hex() == "5505" * 2  # a row starts on a byte of its own


def test_float32_scales_stay_what_they_are(tmp_path: Path) -> None:
    made = weight(torch.zeros(2, 64), 4, 32)
    linear, found = stored(replace(made, scales=made.scales.float() / 3), tmp_path)
    assert linear.exact_scales and found["w.scales"].dtype == np.float32
    np.testing.assert_array_equal(found["w.scales"], np.arange(1, 5, dtype=np.float32) / np.float32(3))


@pytest.mark.parametrize("group", [8, 24])
def test_groups_that_no_block_divides_are_refused(group: int, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=f"groups of {group}") as error:
        stored(weight(torch.zeros(2, 48), 4, group), tmp_path)
    assert error.value.where == "w"


@pytest.mark.parametrize(("bits", "kind"), [(32, "FLOAT"), (16, "FLOAT16"), (8, "INT8")])
def test_a_cache_of_any_width_answers_as_the_model(bits: KvBits, kind: str, tmp_path: Path) -> None:
    quantized, tokens, told = lowering.quantized(**PLAIN), lowering.tokens(9), Stopping(0)
    ranges = lowering.ranges(**PLAIN)
    made = onnx_cpu.export(
        quantized, tmp_path / "a", context=16, chunk=4, kv_bits=bits, ranges=ranges, accuracy_level=4, progress=told
    )
    assert told.notes == ["prefill.onnx", "decode.onnx"] and made.mask_value == -10000.0
    model = onnx.load(made.path("decode"), load_external_data=False)
    values = {one.name: one.type.tensor_type for one in (*model.graph.input, *model.graph.output)}
    for name in ("past_keys.1", "past_values.0", "keys.0", "values.1"):
        assert values[name].elem_type == onnx.TensorProto.DataType.Value(kind), name
    levels = {a.i for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}
    beside = tmp_path / "a/ranges.json"
    assert (Ranges.load(beside) == ranges) if bits == 8 else not beside.exists()
    exact = TorchRuntime(quantized, 16).logits(tokens)
    with open_runtime(made.folder) as runtime:
        rows = [runtime.logits(tokens[:7]), *(runtime.decode(token)[None] for token in tokens[7:])]
    assert lowering.mean_kl(exact, np.concatenate(rows)) < 5e-3


@dataclass(frozen=True)
class Reordered(QuantizedCheckpoint):
    """Its up_projs lie with their columns turned round, and have float32 scales."""

    def ordered(self, name: str) -> OrderedWeight:
        held = super().ordered(name).weight
        if not name.endswith("up_proj"):
            return OrderedWeight(held)
        turned = QuantizedTensor(
            held.codes.flip(1), held.scales.flip(1).float(), held.zeros.flip(1), held.bits, held.group_size
        )
        return OrderedWeight(turned, torch.arange(held.shape[1] - 1, -1, -1, dtype=torch.int32))


def test_inputs_are_put_in_the_order_of_the_columns(tmp_path: Path) -> None:
    sound, tokens = lowering.quantized("w4-g32-asymmetric", **QWEN), lowering.tokens(5)
    made = onnx_cpu.export(
        Reordered(**{field.name: getattr(sound, field.name) for field in fields(sound)}),
        tmp_path / "a",
        context=8,
        chunk=5,
    )
    with open_runtime(made.folder) as runtime:
        found = runtime.logits(tokens)
    assert lowering.distance(found, TorchRuntime(sound, 8).logits(tokens)) < 1e-5
    model = onnx.load(made.path("decode"), load_external_data=False)
    gathers = [node for node in model.graph.node if node.op_type == "Gather" and node.input[1].endswith(".order")]
    assert len(gathers) == 2 and {a.i for node in gathers for a in node.attribute} == {-1}
    casts = [node.input[0] for node in model.graph.node if node.op_type == "Cast"]
    assert not [name for name in casts if "up_proj" in name] and len(casts) == 13
