"""Layouts of other tools' folders by known answers: shapes that a linear must have, settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bluelm.errors import InputError
from bluelm.text.patterns import MOST_PATTERNS
from compress.checkpoint.pieces import LinearInfo
from compress.checkpoint.quantized import OrderedWeight, QuantizedTensor
from compress.formats.awq import Awq, awq_layout, describe_awq, pack_awq
from compress.formats.claims import Claim, read_claims
from compress.formats.compressed import CompressedTensors, compressed_layout, describe_compressed, pack_compressed
from compress.formats.gptq import Gptq, describe_gptq, gptq_layout, pack_gptq
from compress.formats.layout import Layout, MatrixShape
from tests.support.checkpoints.packed import AWQ, V1, V2, Drawn, awq, compressed, draw, gptq, scheme

SHAPE = MatrixShape(16, 48)
FOUND = {"qweight": (6, 16), "scales": (3, 16), "weight_packed": (16, 6), "weight_scale": (16, 3)}
SHAPES: dict[str, tuple[Layout, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "gptq": (Gptq(""), FOUND, {"qweight": (6, 16), "qzeros": (3, 2), "scales": (3, 16)}),
    "gptq, g_idx": (
        Gptq(""), FOUND | {"g_idx": (9,)}, {"qweight": (6, 16), "qzeros": (3, 2), "scales": (3, 16), "g_idx": (48,)},
    ),
    "gptq, 8 bits": (
        Gptq(""), FOUND | {"qweight": (12, 16)}, {"qweight": (12, 16), "qzeros": (3, 4), "scales": (3, 16)},
    ),
    "gptq, scales missing": (
        Gptq(""), {"qweight": (6, 16)}, {"qweight": (6, 16), "qzeros": (1, 2), "scales": (1, 16)},
    ),
    "awq": (Awq(), FOUND, {"qweight": (48, 2), "qzeros": (3, 2), "scales": (3, 16)}),
    "awq, scales without a shape": (
        Awq(), FOUND | {"scales": ()}, {"qweight": (48, 2), "qzeros": (1, 2), "scales": (1, 16)},
    ),
    "awq, scales missing": (Awq(), {}, {"qweight": (48, 2), "qzeros": (1, 2), "scales": (1, 16)}),
    "compressed-tensors": (
        CompressedTensors(), FOUND, {"weight_packed": (16, 6), "weight_scale": (16, 3), "weight_shape": (2,)},
    ),
    "compressed-tensors, all": (
        CompressedTensors(),
        FOUND | {"weight_zero_point": (), "weight_g_idx": ()},
        {"weight_packed": (16, 6), "weight_scale": (16, 3), "weight_shape": (2,), "weight_zero_point": (2, 3),
         "weight_g_idx": (48,)},
    ),
    "compressed-tensors, scales missing": (
        CompressedTensors(), {"weight_packed": (16, 6)},
        {"weight_packed": (16, 6), "weight_scale": (16, 1), "weight_shape": (2,)},
    ),
    "compressed-tensors, scales without a shape": (
        CompressedTensors(), FOUND | {"weight_scale": ()},
        {"weight_packed": (16, 6), "weight_scale": (16, 1), "weight_shape": (2,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_a_linear_must_have(name: str) -> None:
    layout, found, wanted = SHAPES[name]
    assert layout.shapes(SHAPE, found) == wanted


@pytest.mark.parametrize("layout", [Gptq(""), Awq(), CompressedTensors()])
def test_groups_that_do_not_fill_a_row_are_refused(layout: Layout) -> None:
    with pytest.raises(InputError, match="groups"):
        layout.shapes(SHAPE, FOUND | {"scales": (5, 16), "weight_scale": (16, 5)})


@pytest.mark.parametrize(("layout", "name"), [(Gptq(""), "qweight"), (CompressedTensors(), "weight_packed")])
def test_codes_of_another_width_are_refused(layout: Layout, name: str) -> None:
    for found, bits in (((), 0), ((9, 9), 6)):
        with pytest.raises(InputError, match=f"codes have {bits} bits; 4 and 8 can be read"):
            layout.shapes(SHAPE, FOUND | {name: found})


def of_groups(**more: Any) -> dict[str, Any]:
    return scheme() | {"config_groups": {"a": scheme()["config_groups"]["group_0"] | more}}


@pytest.mark.parametrize(
    ("layout", "settings", "said"),
    [
        (gptq_layout, V1 | {"checkpoint_format": "marlin"}, "'marlin' cannot be read"),
        (gptq_layout, V1 | {"is_marlin_format": True}, "'marlin' cannot be read"),
        (gptq_layout, V1 | {"pack_dtype": "int8"}, "packed in int8"),
        (awq_layout, AWQ | {"version": "gemv"}, "'gemv' cannot be read"),
        (awq_layout, AWQ | {"bits": 8}, "4 bits, not 8"),
        (awq_layout, {"quant_method": "awq", "w_bit": 3}, "4 bits, not 3"),
        (compressed_layout, scheme() | {"format": "float-quantized"}, "float-quantized"),
        (compressed_layout, {"format": "float-quantized"}, "float-quantized"),
        (compressed_layout, of_groups(input_activations={"num_bits": 8}), "activations are quantized"),
        (compressed_layout, of_groups(output_activations={"num_bits": 8}), "activations are quantized"),
        (compressed_layout, scheme(type="float"), "not 4- or 8-bit integers"),
        (compressed_layout, scheme(num_bits=3), "not 4- or 8-bit integers"),
        (compressed_layout, of_groups(weights=None), "not 4- or 8-bit integers"),
        (compressed_layout, scheme() | {"kv_cache_scheme": {"num_bits": 8}}, "KV cache is quantized"),
        (compressed_layout, scheme() | {"config_groups": ["a"]}, "must be an object of schemes"),
        (read_claims, V1 | {"dynamic": {f"a{i}": {} for i in range(MOST_PATTERNS + 1)}}, "patterns"),
        (read_claims, V1 | {"dynamic": ["a"]}, "dynamic must be an object"),
        (read_claims, of_groups(targets=["a"] * (MOST_PATTERNS + 1)), "patterns"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_read_are_refused(layout: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        layout(settings, "config.json")
    assert caught.value.where == "config.json"


def test_settings_that_can_be_read() -> None:
    assert gptq_layout(V1, "") == Gptq("GPTQ (gptq)", 1, borrows=False)
    assert gptq_layout(V2 | {"meta": {"quantizer": ["GPTQModel:5.0"]}}, "") == Gptq("GPTQ (gptq_v2)", 2, borrows=True)
    assert gptq_layout({"quant_method": "gptq", "pack_dtype": "int32"}, "").version == 1
    assert awq_layout({"quant_method": "awq"}, "") == Awq()
    assert compressed_layout(scheme(), "") == CompressedTensors()


def test_a_name_counts_before_an_expression_and_this_before_a_class() -> None:
    def weights(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": [*targets], "weights": {"num_bits": bits, "group_size": 32}}

    groups = {"a": weights(8, "Linear"), "b": weights(4, "re:.*up"), "c": weights(2, "a.up")}
    for order in (("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")):
        settings = {"quant_method": "compressed-tensors", "config_groups": {name: groups[name] for name in order}}
        claims = read_claims(settings, "")
        assert [claims.of(name).bits for name in ("a.up", "b.up", "b.down")] == [2, 4, 8]
    assert read_claims(None, "").of("a.up") == Claim()


def drawn(**how: Any) -> tuple[Drawn, QuantizedTensor]:
    linear = draw(16, 48, **how)
    codes, zeros = (torch.from_numpy(part).to(torch.uint8) for part in (linear.codes, linear.zeros))
    return linear, QuantizedTensor(codes, linear.scales, zeros, linear.bits, 16)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_packed_is_what_the_formats_define(bits: int, symmetric: bool) -> None:
    """Fields packed one by one with Python's integers (`tests/support/checkpoints/packed.py`)."""
    linear, weight = drawn(bits=bits, symmetric=symmetric)
    for version in (1, 2):
        same(pack_gptq(OrderedWeight(weight), version), gptq(linear, version=version))
    same(pack_compressed(weight), compressed(linear, symmetric=symmetric))
    if bits == 4:
        same(pack_awq(weight), awq(linear))


def test_inputs_out_of_order_go_back_to_their_places() -> None:
    _, weight = drawn()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    found = pack_gptq(OrderedWeight(weight, order), 2)
    codes = torch.empty_like(weight.codes)
    codes[:, order] = weight.codes
    assert torch.equal(found["qweight"], pack_gptq(OrderedWeight(QuantizedTensor(
        codes, weight.scales, weight.zeros, 4, 16)), 2)["qweight"])  # fmt: skip
    assert found["g_idx"][order].tolist() == [column // 16 for column in range(48)]


@pytest.mark.parametrize("pack", [lambda weight: pack_gptq(OrderedWeight(weight), 1), pack_awq])
def test_scales_that_the_format_cannot_hold_are_refused(pack: Any) -> None:
    _, weight = drawn(dtype=torch.float32)
    with pytest.raises(InputError, match="scales are float16"):
        pack(weight)


def info(bits: int = 4, group: int = 32, *, symmetric: bool = True, ordered: bool = False) -> LinearInfo:
    return LinearInfo((16, 64), bits, group, symmetric, ordered)


def test_what_is_written_says_what_it_holds() -> None:
    same_width = {"a.up": info(), "b.up": info(), "c.down": info()}
    told = describe_gptq(same_width, 1, 0.01)
    assert "dynamic" not in told
    wanted = {"checkpoint_format": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
              "damp_percent": 0.01}  # fmt: skip
    assert told.items() >= wanted.items()
    mixed = {**same_width, "c.down": info(8, -1, symmetric=False, ordered=True)}
    told = describe_gptq(mixed, 2, 0.01)
    assert told["dynamic"] == {r"+:^c\.down$": {"bits": 8, "group_size": -1}}
    assert (told["checkpoint_format"], told["sym"], told["desc_act"]) == ("gptq_v2", False, True)
    assert describe_awq(same_width).items() >= {"bits": 4, "group_size": 32, "zero_point": True}.items()
    (only,) = describe_compressed(same_width)["config_groups"].values()
    assert (only["targets"], only["weights"]["strategy"], only["weights"]["group_size"]) == (["Linear"], "group", 32)
    usual, other = describe_compressed(mixed)["config_groups"].values()
    assert (usual["targets"], other["targets"]) == (["a.up", "b.up"], ["c.down"])
    assert (other["weights"]["strategy"], other["weights"]["group_size"]) == ("channel", None)
    for layout, described in ((compressed_layout, describe_compressed(mixed)), (gptq_layout, told)):
        claims = read_claims(described, "")
        assert layout(described, "") and [claims.of(name).bits for name in mixed] == [4, 4, 8]


def read(layout: Layout, parts: dict[str, torch.Tensor], linear: Drawn, **claimed: Any) -> OrderedWeight:
    """What the layout makes of the tensors: the drawn values, every code and zero point as it was."""
    found = layout.read(MatrixShape(*linear.codes.shape), parts, Claim(**claimed))
    assert torch.equal(found.dequantize(), linear.values)
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_reads_zero_points_of_either_version(bits: int) -> None:
    linear, symmetric = draw(16, 48, bits=bits), draw(16, 48, bits=bits, symmetric=True)
    for version in (1, 2):
        read(Gptq("", version), gptq(linear, version=version), linear)
        for named in (1, 2):  # some tools wrote one version under the other's name
            read(Gptq("", named), gptq(symmetric, version=version), symmetric, symmetric=True)
    parts = gptq(symmetric) | {"qzeros": torch.zeros((3, 16 * bits // 32), dtype=torch.int32)}
    with pytest.raises(InputError, match="stored as 0: 1 in the format gptq and 0 in gptq_v2"):
        Gptq("", 1).read(SHAPE, parts, Claim(symmetric=True))
    with pytest.raises(InputError, match=f"stored as .* to .*: .* a symmetric grid has {2 ** (bits - 1)}"):
        Gptq("", 1).read(SHAPE, gptq(linear), Claim(symmetric=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_s_borrows_are_given_back(bits: int) -> None:
    """It subtracts 1 from each field of a word at once; fields of 0 borrow from their neighbours."""
    linear = draw(16, 48, bits=bits, lowest_zero=0)
    linear.zeros[:, 0], linear.zeros[0] = 0, 2**bits - 1
    stored = gptq(linear, version=2)
    fields = sum(1 << shift for shift in range(0, 32, bits))
    whole = [[(int(word) - fields) % 2**32 for word in row] for row in stored["qzeros"].tolist()]
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in whole]
    parts = stored | {"qzeros": torch.tensor(signed, dtype=torch.int32)}
    read(Gptq("", 1, borrows=True), parts, linear)
    with pytest.raises(InputError, match=f"stored as -1, which readers of this version take for {2**bits} or for 0"):
        Gptq("", 1).read(SHAPE, parts)


def test_the_order_of_gptq_s_inputs_is_what_is_said() -> None:
    plain, scattered = draw(16, 48), draw(16, 48, scattered=True)
    assert read(Gptq(""), gptq(plain, g_idx=False), plain, ordered=False).order is None
    assert read(Gptq(""), gptq(plain), plain, ordered=True).order is None  # groups in place
    assert read(Gptq(""), gptq(scattered), scattered, ordered=True).order is not None
    assert read(Gptq(""), gptq(scattered), scattered).order is not None  # nothing said
    with pytest.raises(InputError, match="desc_act is false, but g_idx scatters"):
        Gptq("").read(SHAPE, gptq(scattered), Claim(ordered=False))
    with pytest.raises(InputError, match="desc_act is true, but there is no g_idx"):
        Gptq("").read(SHAPE, gptq(plain, g_idx=False), Claim(ordered=True))
    with pytest.raises(InputError, match="desc_act is true, but g_idx is all zeros"):
        Gptq("").read(SHAPE, gptq(plain) | {"g_idx": torch.zeros(48, dtype=torch.int32)}, Claim(ordered=True))
    halves, row = draw(16, 48, group=24), draw(16, 48, group=48)
    with pytest.raises(InputError, match="there is no g_idx"):
        Gptq("").read(SHAPE, gptq(halves, g_idx=False), Claim(ordered=True))
    assert read(Gptq(""), gptq(row, g_idx=False), row, ordered=True).order is None  # one group has no order


def test_awq_reads_its_own_order_of_fields() -> None:
    linear, symmetric = draw(16, 48, lowest_zero=0), draw(16, 48, symmetric=True)
    read(Awq(), awq(linear), linear)
    read(Awq(), awq(symmetric), symmetric, symmetric=True)
    with pytest.raises(InputError, match="the settings say symmetric, but its zero points are"):
        Awq().read(SHAPE, awq(linear), Claim(symmetric=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_are_what_the_settings_say(bits: int) -> None:
    linear, symmetric = draw(16, 48, bits=bits, lowest_zero=0), draw(16, 48, bits=bits, symmetric=True)
    scattered, row = draw(16, 48, bits=bits, scattered=True), draw(16, 48, bits=bits, group=48)
    layout, halves = CompressedTensors(), draw(16, 48, bits=bits, group=24)
    read(layout, compressed(linear), linear, symmetric=False)
    read(layout, compressed(symmetric, symmetric=True), symmetric, symmetric=True)
    read(layout, compressed(symmetric, symmetric=True), symmetric)
    read(layout, compressed(symmetric), symmetric, symmetric=True)
    assert read(layout, compressed(scattered), scattered, ordered=True).order is not None
    read(layout, compressed(row), row, ordered=True)  # one group has no order
    for linear_, parts, claim, said in (
        (linear, compressed(linear), Claim(symmetric=True), "the settings say symmetric"),
        (symmetric, compressed(symmetric, symmetric=True), Claim(symmetric=False), "no weight_zero_point"),
        (linear, compressed(linear), Claim(ordered=True), "no weight_g_idx"),
        (halves, compressed(halves), Claim(ordered=True), "no weight_g_idx"),
        (linear, compressed(linear) | {"weight_shape": torch.tensor([48, 16])}, Claim(), r"says \[48, 16\]"),
    ):
        with pytest.raises(InputError, match=said):
            layout.read(MatrixShape(*linear_.codes.shape), parts, claim)
