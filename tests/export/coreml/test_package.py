"""Reading packages: every storage type, compressed weights, damage, and coremltools' own stateful decoder."""

from __future__ import annotations

import contextlib
import shutil
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bluelm.errors import InputError, TargetError
from export.coreml.importing import import_coremltools
from export.coreml.package import Package, ValueType, read_blob, unpack_bits
from targets.apple.interpreter.interpreter import Interpreter
from targets.apple.interpreter.ops import OPS, Arguments
from tests.support.files.coreml_cases import save

ct = import_coremltools()

WRITERS = {
    "fp16": (np.float16, "fp16"), "fp32": (np.float32, "float"), "int8": (np.int8, "int8"),
    "uint8": (np.uint8, "uint8"), "int16": (np.int16, "int16"), "uint16": (np.uint16, "uint16"),
    "int32": (np.int32, "int32"), "uint32": (np.uint32, "uint32"), "int4": (np.int8, "int4"),
    "uint1": (np.uint8, "uint1"), "uint2": (np.uint8, "uint2"), "uint3": (np.uint8, "uint3"),
    "uint4": (np.uint8, "uint4"), "uint6": (np.uint8, "uint6"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", WRITERS)
def test_every_storage_type_of_apples_writer_reads_back(tmp_path: Path, dtype: str) -> None:
    from coremltools.converters.mil.mil.types import type_int
    from coremltools.libmilstoragepython import _BlobStorageWriter  # type: ignore[import-not-found]

    numpy_type, writer_name = WRITERS[dtype]
    bits = ValueType(dtype, (1,)).bits
    rng = np.random.default_rng(bits)
    if dtype in ("fp16", "fp32"):
        data = rng.standard_normal((3, 7)).astype(numpy_type)
    else:
        low = -(2 ** (bits - 1)) if dtype.startswith("int") else 0
        high = 2 ** (bits - 1) if dtype.startswith("int") else 2**bits
        data = rng.integers(low, high, (3, 7)).astype(numpy_type)
    flat = data.flatten().view(np.uint16) if dtype == "fp16" else data.flatten()
    if hasattr(type_int, f"np_{dtype}_dtype"):
        flat = flat.astype(getattr(type_int, f"np_{dtype}_dtype"))
    writer = _BlobStorageWriter(str(tmp_path / "weight.bin"))
    offsets = [getattr(writer, f"write_{writer_name}_data")(flat) for _ in range(2)]
    del writer
    file = np.fromfile(tmp_path / "weight.bin", np.uint8)
    for offset in offsets:
        got = read_blob(file, offset, ValueType(dtype, (3, 7)), tmp_path)
        np.testing.assert_array_equal(got, data)
        assert got.dtype == numpy_type


@given(st.sampled_from([1, 2, 3, 4, 6]), st.lists(st.integers(0, 63), min_size=1, max_size=40))
def test_packed_bits_are_little_endian(bits: int, values: list[int]) -> None:
    values = [v % 2**bits for v in values]
    whole = sum(v << (bits * i) for i, v in enumerate(values))  # the definition, in one big integer
    raw = np.frombuffer(whole.to_bytes((len(values) * bits + 7) // 8, "little"), np.uint8)
    assert unpack_bits(raw, f"uint{bits}", len(values)).tolist() == values


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Interpreter, dict[str, Any]]:
    """A program of every constexpr op, and what coremltools itself decompresses each to."""
    from coremltools.converters.mil.mil import Builder, types
    from coremltools.converters.mil.mil.types.type_int import np_int4_dtype, np_uint1_dtype, np_uint4_dtype

    mb: Any = Builder
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16)
    int4 = rng.integers(-8, 8, (8, 64)).astype(np_int4_dtype)
    uint4 = rng.integers(0, 16, (8, 64)).astype(np_uint4_dtype)
    zeros = rng.integers(0, 16, (8, 2)).astype(np_uint4_dtype)
    mask = rng.integers(0, 2, (8, 64)).astype(np_uint1_dtype)
    lut = rng.standard_normal((2, 1, 16, 1)).astype(np.float16)
    vectors = rng.standard_normal((1, 2, 16, 3)).astype(np.float32)
    nonzero = rng.standard_normal(int(mask.sum())).astype(np.float32)
    expected: dict[str, Any] = {}

    @mb.program(input_specs=[mb.TensorSpec((1,), types.fp32)], opset_version=ct.target.iOS18)
    def built(x):  # type: ignore[no-untyped-def]
        results = {
            "int4": mb.constexpr_blockwise_shift_scale(data=int4, scale=scale),
            "uint4": mb.constexpr_blockwise_shift_scale(data=uint4, scale=scale, offset=zeros),
            "int8": mb.constexpr_blockwise_shift_scale(
                data=int4.astype(np.int8) * np.int8(9), scale=scale[:, :1].astype(np.float32)
            ),
            "lut": mb.constexpr_lut_to_dense(indices=uint4, lut=lut),
            "vectors": mb.constexpr_lut_to_dense(indices=uint4, lut=vectors, vector_axis=np.int32(0)),
            "sparse": mb.constexpr_sparse_to_dense(nonzero_data=nonzero, mask=mask),
            "cast": mb.constexpr_cast(source_val=lut.reshape(2, 16), output_dtype="fp32"),
        }
        for name, result in results.items():
            expected[name] = result.op.materialized_val_inference()
        return tuple(
            mb.cast(x=mb.identity(x=result), dtype="fp32", name=f"{name}_out") for name, result in results.items()
        )

    return Interpreter(save(built, tmp_path_factory.mktemp("c") / "c.mlpackage")), expected


def test_compressed_weights_are_what_coremltools_decompresses(compressed) -> None:
    interpreter, expected = compressed
    found = interpreter.run({"x": np.zeros(1, np.float32)})
    for name, want in expected.items():
        np.testing.assert_array_equal(found[f"{name}_out"], want.astype(np.float32), err_msg=name)


def test_ios16_forms_follow_their_formulas() -> None:
    rng = np.random.default_rng(5)
    data, axis = rng.integers(-128, 128, (4, 6)).astype(np.int8), np.int32(1)
    scale, zero = rng.uniform(0.1, 1, 6).astype(np.float32), rng.integers(-9, 9, 6).astype(np.int8)
    affine = Arguments(quantized_data=data, scale=scale, zero_point=zero, axis=axis)
    want = torch.from_numpy(scale) * (torch.from_numpy(data).float() - torch.from_numpy(zero).float())
    np.testing.assert_allclose(OPS["constexpr_affine_dequantize"](affine), want.numpy(), rtol=1e-6)
    codes, lut = rng.integers(0, 4, (3, 5)), rng.standard_normal(4).astype(np.float32)
    packed = np.packbits(
        np.unpackbits(codes.astype(np.uint8).reshape(-1, 1), axis=1, bitorder="little")[:, :2].reshape(-1),
        bitorder="little",
    )
    dense = OPS["constexpr_lut_to_dense"](Arguments(indices=packed, lut=lut, shape=np.array([3, 5])))
    np.testing.assert_array_equal(dense, lut[codes])


def test_without_rounding_a_float16_program_keeps_float32(compressed) -> None:
    interpreter, expected = compressed
    exact = Interpreter(interpreter.package, rounding=False).run({"x": np.zeros(1, np.float32)})["int4_out"]
    rounded = expected["int4"].astype(np.float32)
    assert 0 < np.abs(exact - rounded).max() < 1e-3
    np.testing.assert_array_equal(exact.astype(np.float16).astype(np.float32), rounded)


def test_weights_beyond_the_cache_are_decompressed_again(compressed) -> None:
    interpreter, _ = compressed
    small = Interpreter(interpreter.package, cache_bytes=0)
    x = {"x": np.zeros(1, np.float32)}
    first, second, kept = small.run(x), small.run(x), interpreter.run(x)
    for name in kept:
        np.testing.assert_array_equal(first[name], kept[name])
        np.testing.assert_array_equal(second[name], kept[name])


# coremltools' own conversion of a stateful decoder

CONTEXT, HEADS, KV, SIZE, WIDTH, VOCAB, LAYERS = 32, 4, 2, 16, 64, 96, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, KV * SIZE), nn.Linear(WIDTH, KV * SIZE)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)


class Stateful(nn.Module):
    """A decoder as people convert it: caches as buffers, written at past:end."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(LAYERS, 1, KV, CONTEXT, SIZE))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, tokens, end = self.embed(ids), ids.shape[1], mask.shape[-1]
        for i, layer in enumerate(cast("list[Layer]", list(self.layers))):
            y = layer.norm(x)
            q, k, v = (f(y).view(1, tokens, -1, SIZE).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
            self.k_cache[i, :, :, end - tokens : end, :] = k
            self.v_cache[i, :, :, end - tokens : end, :] = v
            keys = self.k_cache[i, :, :, :end, :].repeat_interleave(HEADS // KV, dim=1)
            values = self.v_cache[i, :, :, :end, :].repeat_interleave(HEADS // KV, dim=1)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + layer.o(y.transpose(1, 2).reshape(1, tokens, WIDTH))
            y = layer.mlp_norm(x)
            x = x + layer.down(F.silu(layer.gate(y)) * layer.up(y))
        return self.head(x)


def causal_mask(tokens: int, end: int) -> np.ndarray:
    """Additive [1, 1, tokens, end]: row t sees the slots up to its own."""
    seen = np.arange(end)[None] <= np.arange(end - tokens, end)[:, None]
    return np.where(seen, 0.0, -1e4).astype(np.float32)[None, None]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stateful]:
    """coremltools' package with int4 blocks of 32, and the torch module holding the same weights."""
    torch.manual_seed(0)
    module = Stateful().eval()
    traced = torch.jit.trace(module, (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 5)))
    tokens, end = ct.RangeDim(1, CONTEXT, default=1), ct.RangeDim(1, CONTEXT, default=1)
    state = (LAYERS, 1, KV, CONTEXT, SIZE)
    model = ct.convert(
        traced,
        inputs=[
            ct.TensorType("ids", (1, tokens), np.int32),
            ct.TensorType("mask", (1, 1, tokens, end), np.float16),
        ],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=[ct.StateType(ct.TensorType(shape=state, dtype=np.float16), name) for name in ("k_cache", "v_cache")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    optimize = ct.optimize.coreml
    config = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32, weight_threshold=0
    )
    model = optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=config))
    path = tmp_path_factory.mktemp("decoder") / "decoder.mlpackage"
    model.save(str(path))
    _take_weights(module, Interpreter(path, rounding=False))
    return path, module


def _take_weights(module: Stateful, interpreter: Interpreter) -> None:
    """The package's own int4 weights into torch: found as what lies nearest to each float weight."""
    plan = interpreter.function(None)
    dense = [interpreter._constant(plan, n) for n, c in plan.constants.items() if c.type != "const"]
    for parameter in module.parameters():
        fits = [torch.from_numpy(d) for d in dense if d.shape == tuple(parameter.shape)]
        if parameter.ndim == 2 and fits:
            best = min(fits, key=lambda d: float((d - parameter.detach()).norm()))
            assert float((best - parameter.detach()).norm() / parameter.detach().norm()) < 0.2
            parameter.data = best.clone()


def test_coremltools_own_stateful_decoder_runs_and_equals_torch(converted) -> None:
    path, module = converted
    tokens = np.random.default_rng(1).integers(0, VOCAB, 12).astype(np.int32)
    with torch.no_grad():
        want = module(torch.from_numpy(tokens)[None], torch.from_numpy(causal_mask(12, 12)))[0].numpy()
    for rounding, tolerance in ((False, 2e-3), (True, 2e-2)):
        interpreter = Interpreter(path, rounding=rounding)
        state = interpreter.make_state()
        rows = []
        for start, stop in ((0, 5), (5, 6), (6, 11), (11, 12)):  # the cache carries over between calls
            inputs = {"ids": tokens[None, start:stop], "mask": causal_mask(stop - start, stop)}
            rows.append(interpreter.run(inputs, state)["logits"][0])
        np.testing.assert_allclose(np.concatenate(rows), want, atol=tolerance, rtol=0)


def test_a_state_is_needed_and_kept_apart(converted) -> None:
    interpreter = Interpreter(converted[0])
    inputs = {"ids": np.array([[5]], np.int32), "mask": causal_mask(1, 1)}
    with pytest.raises(InputError, match=r"needs the states \['k_cache', 'v_cache'\]"):
        interpreter.run(inputs)
    one, other = interpreter.make_state(), interpreter.make_state()
    interpreter.run(inputs, one)
    assert np.abs(one["k_cache"]).max() > 0
    assert np.abs(other["k_cache"]).max() == 0


def test_an_op_that_is_not_known_is_named(converted, tmp_path: Path) -> None:
    broken = _copy(converted[0], tmp_path)
    model = broken / "Data/com.apple.CoreML/model.mlmodel"
    package = Package.open(broken)
    next(op for op in package.operations("main") if op.type == "silu").type = "lstm"
    model.write_bytes(package.spec.SerializeToString())
    with pytest.raises(TargetError, match=r"does not know the op 'lstm'"):
        Interpreter(broken)


def test_damage_is_found_where_it_is(converted, tmp_path: Path) -> None:
    broken = _copy(converted[0], tmp_path)
    weights = broken / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(weights.read_bytes())
    content[64:68] = struct.pack("<I", 1)
    weights.write_bytes(content)
    inputs = {"ids": np.array([[5]], np.int32), "mask": causal_mask(1, 1)}
    with pytest.raises(InputError, match="no weight record at offset 64"):
        interpreter = Interpreter(broken)
        interpreter.run(inputs, interpreter.make_state())
    weights.unlink()
    with pytest.raises(InputError, match="a weight file that is not there"):
        interpreter = Interpreter(broken)
        interpreter.run(inputs, interpreter.make_state())
    (broken / "Manifest.json").write_text("{}")
    with pytest.raises(InputError, match="manifest cannot be read"):
        Package.open(broken)


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=25)
def test_a_damaged_specification_never_ends_in_a_foreign_error(converted, at: int, byte: int) -> None:
    path, _ = converted
    package = Package.open(path)
    content = bytearray((path / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    content[at % len(content)] = byte
    broken = path.parent / "fuzzed.mlpackage"
    if not broken.exists():
        shutil.copytree(package.path, broken)
    (broken / "Data/com.apple.CoreML/model.mlmodel").write_bytes(content)
    with contextlib.suppress(InputError, TargetError):
        Interpreter(broken)


def _copy(path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / path.name))
