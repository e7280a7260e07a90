"""One case for each MIL op: how coremltools builds it, and what torch computes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.coreml.importing import import_coremltools

T = dict[str, Tensor]
RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal((6, 5)).astype(np.float32)
BIAS = RNG.standard_normal(6).astype(np.float32)
GAMMA, BETA = RNG.standard_normal((2, 5)).astype(np.float32)
KERNEL = RNG.standard_normal((4, 2, 2, 3)).astype(np.float32)
# float inputs: x, y, p (positive) [2, 4, 6, 5]; q, k, v of attention; integers: i in [0, 4), j [2, 4, 6, 1]
SHAPES = {"x": (2, 4, 6, 5), "y": (2, 4, 6, 5), "p": (2, 4, 6, 5), "q": (2, 3, 4, 8), "k": (2, 3, 6, 8)}
SHAPES |= {"v": (2, 3, 6, 7), "mask": (4, 6)}
INTS = {"i": (3, 2), "j": (2, 4, 6, 1), "n": (2, 3), "at": (4,)}


@dataclass(frozen=True)
class Case:
    """`mil(mb, values)` builds the op from the program's inputs; `torch(values)` is what it must give."""

    op: str
    mil: Callable[[Any, Any], Any]
    torch: Callable[[T], Any]


def _unary(op: str, function: Callable[[Tensor], Any], source: str = "x", **parameters: Any) -> Case:
    return Case(op, lambda mb, v: getattr(mb, op)(x=v[source], **parameters), lambda t: function(t[source]))


def _binary(op: str, function: Callable[[Tensor, Tensor], Tensor], second: str = "y") -> Case:
    return Case(op, lambda mb, v: getattr(mb, op)(x=v["x"], y=v[second]), lambda t: function(t["x"], t[second]))


def _reduce(op: str, function: Callable[[Tensor], Tensor], keep: bool, source: str = "x") -> Case:
    return _unary(op, function, source, axes=[1, 3], keep_dims=keep)


def _elementwise() -> list[Case]:
    unit = lambda x: torch.tanh(x) * 0.9  # noqa: E731
    inside = [
        Case(op, lambda mb, v, op=op: getattr(mb, op)(x=mb.mul(x=mb.tanh(x=v["x"]), y=np.float32(0.9))), f)
        for op, f in {
            "acos": lambda t: torch.acos(unit(t["x"])),
            "asin": lambda t: torch.asin(unit(t["x"])),
            "atanh": lambda t: torch.atanh(unit(t["x"])),
        }.items()
    ]
    plain = {
        "abs": torch.abs, "atan": torch.atan, "ceil": torch.ceil, "cos": torch.cos, "cosh": torch.cosh,
        "erf": torch.erf, "exp": torch.exp, "exp2": torch.exp2, "floor": torch.floor,
        "identity": lambda x: x, "relu": torch.relu, "relu6": F.relu6, "round": torch.round,
        "sigmoid": torch.sigmoid, "sign": torch.sign, "silu": F.silu, "sin": torch.sin, "sinh": torch.sinh,
        "softplus": F.softplus, "softsign": F.softsign, "square": torch.square, "tanh": torch.tanh,
    }  # fmt: skip
    two = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum,
        "minimum": torch.minimum, "equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt,
        "greater_equal": torch.ge, "less": torch.lt, "less_equal": torch.le,
    }  # fmt: skip
    flags = {
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "logical_xor": torch.logical_xor,
    }
    return [
        *inside,
        *(_unary(op, f) for op, f in plain.items()),
        *(_binary(op, f) for op, f in two.items()),
        *(
            Case(
                op,
                lambda mb, v, op=op: getattr(mb, op)(
                    x=mb.greater(x=v["x"], y=np.float32(0)), y=mb.greater(x=v["y"], y=np.float32(0))
                ),
                lambda t, f=f: f(t["x"] > 0, t["y"] > 0),
            )
            for op, f in flags.items()
        ),
        Case(
            "logical_not",
            lambda mb, v: mb.logical_not(x=mb.greater(x=v["x"], y=v["y"])),
            lambda t: ~(t["x"] > t["y"]),
        ),
        _unary("tan", torch.tan, "p"),
        _unary("sqrt", torch.sqrt, "p"),
        _unary("log", lambda x: torch.log(x + 0.5), "p", epsilon=0.5),
        _unary("rsqrt", lambda x: torch.rsqrt(x + 1e-5), "p", epsilon=1e-5),
        _unary("inverse", lambda x: 1 / (x + 1e-4), "p"),
        _binary("real_div", torch.div, "p"),
        _binary("floor_div", torch.floor_divide, "p"),
        _binary("mod", torch.remainder, "p"),
        Case("pow", lambda mb, v: mb.pow(x=v["p"], y=v["y"]), lambda t: torch.pow(t["p"], t["y"])),
        _unary("clip", lambda x: torch.clamp(x, -0.5, 0.7), alpha=-0.5, beta=0.7),
        _unary("threshold", lambda x: x.clamp(min=0.25), alpha=0.25),
        _unary("leaky_relu", lambda x: F.leaky_relu(x, 0.2), alpha=0.2),
        _unary("gelu", F.gelu, mode="EXACT"),
        _unary("gelu", lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
        _unary("gelu", lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
        _unary("softmax", lambda x: torch.softmax(x, 1), axis=1),
        _unary("cast", lambda x: x.to(torch.int32), dtype="int32"),
        _unary("cast", lambda x: x.to(torch.float16), dtype="fp16"),
        Case(
            "select",
            lambda mb, v: mb.select(cond=mb.greater(x=v["x"], y=v["y"]), a=v["x"], b=v["p"]),
            lambda t: torch.where(t["x"] > t["y"], t["x"], t["p"]),
        ),
    ]


def _reductions() -> list[Case]:
    sums = {
        "reduce_sum": lambda x, k: x.sum((1, 3), keepdim=k),
        "reduce_mean": lambda x, k: x.mean((1, 3), keepdim=k),
        "reduce_max": lambda x, k: x.amax((1, 3), keepdim=k),
        "reduce_min": lambda x, k: x.amin((1, 3), keepdim=k),
        "reduce_prod": lambda x, k: x.prod(3, keepdim=True).prod(1, keepdim=True) if k
        else x.prod(3).prod(1),
        "reduce_l1_norm": lambda x, k: x.abs().sum((1, 3), keepdim=k),
        "reduce_l2_norm": lambda x, k: x.square().sum((1, 3), keepdim=k).sqrt(),
        "reduce_sum_square": lambda x, k: x.square().sum((1, 3), keepdim=k),
        "reduce_log_sum": lambda x, k: x.sum((1, 3), keepdim=k).log(),
        "reduce_log_sum_exp": lambda x, k: torch.logsumexp(x, (1, 3), keepdim=k),
    }  # fmt: skip
    cases = [
        _reduce(op, lambda x, f=f, k=k: f(x, k), k, "p" if op == "reduce_log_sum" else "x")
        for op, f in sums.items()
        for k in (False, True)
    ]
    return [
        *cases,
        _unary("reduce_sum", lambda x: x.sum()),
        _unary("reduce_argmax", lambda x: x.argmax(2), axis=2),
        _unary("reduce_argmin", lambda x: x.argmin(2, keepdim=True), axis=2, keep_dims=True),
        _unary("cumsum", lambda x: x.cumsum(2), axis=2),
        _unary("cumsum", lambda x: x.flip(2).cumsum(2).flip(2) - x, axis=2, exclusive=True, reverse=True),
        _unary(
            "layer_norm",
            lambda x: F.layer_norm(x, (5,), torch.from_numpy(GAMMA), torch.from_numpy(BETA), 1e-3),
            axes=[-1], gamma=GAMMA, beta=BETA, epsilon=1e-3,
        ),
        _unary(
            "l2_norm",
            lambda x: x / torch.sqrt(x.square().sum((1, 2, 3), keepdim=True) + 1e-3),
            epsilon=1e-3,
        ),
        _unary("topk", lambda x: list(x.topk(3, 2)), k=3, axis=2),
        _unary("argsort", lambda x: x.argsort(3, descending=False), axis=3, ascending=True),
    ]  # fmt: skip


def _products() -> list[Case]:
    weight, bias, kernel = (torch.from_numpy(a) for a in (WEIGHT, BIAS, KERNEL))
    return [
        _unary("linear", lambda x: F.linear(x, weight, bias), weight=WEIGHT, bias=BIAS),
        _unary("linear", lambda x: F.linear(x, weight), weight=WEIGHT),
        Case(
            "matmul",
            lambda mb, v: mb.matmul(x=v["x"], y=v["y"], transpose_y=True),
            lambda t: t["x"] @ t["y"].mT,
        ),
        Case(
            "matmul",
            lambda mb, v: mb.matmul(x=v["x"], y=v["y"], transpose_x=True),
            lambda t: t["x"].mT @ t["y"],
        ),
        Case(
            "einsum",
            lambda mb, v: mb.einsum(
                values=(v["x"], mb.transpose(x=v["y"], perm=[0, 3, 2, 1])), equation="abcd,adce->abce"
            ),
            lambda t: torch.einsum("abcd,aecd->abce", t["x"], t["y"]),
        ),
        Case(
            "scaled_dot_product_attention",
            lambda mb, v: mb.scaled_dot_product_attention(query=v["q"], key=v["k"], value=v["v"]),
            lambda t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"]),
        ),
        Case(
            "scaled_dot_product_attention",
            lambda mb, v: mb.scaled_dot_product_attention(
                query=v["q"], key=v["k"], value=v["v"], attn_mask=v["mask"]
            ),
            lambda t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], t["mask"]),
        ),
        Case(
            "scaled_dot_product_attention",
            lambda mb, v: mb.scaled_dot_product_attention(
                query=v["q"], key=v["k"], value=v["v"],
                attn_mask=np.tril(np.ones((4, 6), bool)),
            ),
            lambda t: F.scaled_dot_product_attention(
                t["q"], t["k"], t["v"], torch.ones(4, 6, dtype=torch.bool).tril()
            ),
        ),
        _unary(
            "conv",
            lambda x: F.conv2d(x, kernel, torch.from_numpy(BIAS[:4]), (2, 1), (1, 2), (2, 1), 2),
            weight=KERNEL, bias=BIAS[:4], strides=[2, 1], pad_type="custom", pad=[1, 1, 2, 2],
            dilations=[2, 1], groups=2,
        ),
        _unary(
            "conv",
            lambda x: F.conv2d(x, kernel, padding="same", groups=2),
            weight=KERNEL, pad_type="same", groups=2,
        ),
        Case("quantize", lambda mb, v: _quantize(mb, v["x"]), _quantized),
        Case("dequantize", lambda mb, v: _dequantize(mb, v["x"]), _dequantized),
    ]  # fmt: skip


def _movement() -> list[Case]:
    return [
        _unary("reshape", lambda x: x.reshape(2, 8, 3, 5), shape=[0, 8, -1, 5]),
        Case(
            "reshape_like",
            lambda mb, v: mb.reshape_like(
                x=v["x"], ref_tensors=(v["i"], v["x"]), begins=[0, 0], ends=[0, 0],
                end_masks=[False, True],
            ),
            lambda t: t["x"],
        ),
        _unary("transpose", lambda x: x.permute(2, 0, 3, 1), perm=[2, 0, 3, 1]),
        _unary("expand_dims", lambda x: x[:, None, ..., None], "i", axes=[1, -1]),
        _unary("squeeze", lambda x: x.squeeze(3), "j", axes=[3]),
        _unary("flatten2d", lambda x: x.reshape(8, 30), axis=2),
        _unary("tile", lambda x: x.repeat(1, 2, 1, 3), reps=[1, 2, 1, 3]),
        _unary("reverse", lambda x: x.flip(1, 3), axes=[1, 3]),
        _unary("pad", lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), pad=[0, 3, 1, 2], constant_val=0.5),
        _unary("pad", lambda x: F.pad(x, (1, 2, 2, 1), "reflect"), pad=[2, 1, 1, 2], mode="reflect"),
        _unary("pad", lambda x: F.pad(x, (1, 2, 2, 1), "replicate"), pad=[2, 1, 1, 2], mode="replicate"),
        _unary("band_part", lambda x: x.tril(1).triu(-2), lower=2, upper=1),
        _unary("shape", lambda x: torch.tensor(x.shape), "x"),
        _unary("split", lambda x: list(x.split([1, 3], 1)), axis=1, split_sizes=[1, 3]),
        _unary("split", lambda x: list(x.chunk(3, 2)), axis=2, num_splits=3),
        _unary("non_zero", lambda x: x.nonzero(), "i"),
        _unary("slice_by_size", lambda x: x[:, 1:3, 2:], begin=[0, 1, 2, 0], size=[-1, 2, -1, 5]),
        Case(
            "concat", lambda mb, v: mb.concat(values=(v["x"], v["y"]), axis=-2),
            lambda t: torch.cat([t["x"], t["y"]], -2),
        ),
        Case(
            "concat", lambda mb, v: mb.concat(values=(v["x"], v["y"]), axis=1, interleave=True),
            lambda t: torch.stack([t["x"], t["y"]], 2).reshape(2, 8, 6, 5),
        ),
        Case(
            "stack", lambda mb, v: mb.stack(values=(v["x"], v["y"]), axis=1),
            lambda t: torch.stack([t["x"], t["y"]], 1),
        ),
        Case(
            "fill", lambda mb, v: mb.fill(shape=mb.shape(x=v["i"]), value=1.5),
            lambda t: torch.full((3, 2), 1.5),
        ),
        Case(
            "fill_like", lambda mb, v: mb.fill_like(ref_tensor=v["i"], value=2.5),
            lambda t: torch.full((3, 2), 2.5),
        ),
        Case(
            "range_1d",
            lambda mb, v: mb.range_1d(
                start=mb.squeeze(x=mb.slice_by_size(x=v["at"], begin=[0], size=[1])), end=9, step=2
            ),
            lambda t: torch.arange(int(t["at"][0]), 9, 2),
        ),
        Case(
            "one_hot", lambda mb, v: mb.one_hot(indices=v["i"], one_hot_vector_size=4, axis=1),
            lambda t: F.one_hot(t["i"].long(), 4).movedim(-1, 1),
        ),
        *_indexing(),
    ]  # fmt: skip


def _indexing() -> list[Case]:
    def scattered(t: T) -> Tensor:
        y = t["x"].clone()
        y.index_put_((t["n"][:, 0].long() % 2, t["n"][:, 1].long()), t["y"][:, 0], accumulate=True)
        return y

    def updated(t: T) -> Tensor:
        y = t["x"].clone()
        y[:, int(t["at"][1]) : int(t["at"][1]) + 1, 1:5:2] = t["y"][:, :1, :2]
        return y

    def begin(mb: Any, v: Any, add: int) -> Any:
        at = mb.slice_by_size(x=v["at"], begin=[1], size=[1])
        return mb.concat(values=([0], mb.add(x=at, y=np.int32(add)), [1 if add == 0 else 5], [0]), axis=0)

    def pairs(mb: Any, v: Any) -> Any:
        return mb.slice_by_size(x=mb.mod(x=v["n"], y=np.array([2, 4, 4], np.int32)), begin=[0, 0], size=[2, 2])

    free = [True, False, False, True]
    return [
        Case(
            "gather", lambda mb, v: mb.gather(x=v["x"], indices=v["i"], axis=1),
            lambda t: t["x"][:, t["i"].long()],
        ),
        Case(
            "gather", lambda mb, v: mb.gather(x=v["x"], indices=v["n"], axis=2, batch_dims=1),
            lambda t: torch.stack([x[:, n.long()] for x, n in zip(t["x"], t["n"], strict=True)]),
        ),
        Case(
            "gather_along_axis", lambda mb, v: mb.gather_along_axis(x=v["x"], indices=v["j"], axis=3),
            lambda t: t["x"].gather(3, t["j"].long()),
        ),
        Case(
            "gather_nd", lambda mb, v: mb.gather_nd(x=v["x"], indices=pairs(mb, v)),
            lambda t: t["x"][t["n"][:, 0].long() % 2, t["n"][:, 1].long()],
        ),
        Case(
            "gather_nd",
            lambda mb, v: mb.gather_nd(x=v["x"], indices=mb.expand_dims(x=v["n"], axes=[2]), batch_dims=1),
            lambda t: torch.stack([x[n.long()] for x, n in zip(t["x"], t["n"], strict=True)]),
        ),
        Case(
            "scatter_nd",
            lambda mb, v: mb.scatter_nd(
                data=v["x"], indices=pairs(mb, v), mode="add",
                updates=mb.squeeze(x=mb.slice_by_size(x=v["y"], begin=[0] * 4, size=[2, 1, 6, 5]), axes=[1]),
            ),
            scattered,
        ),
        Case(
            "slice_by_index",
            lambda mb, v: mb.slice_by_index(
                x=v["x"], begin=[0, 3, -5, 2], end=[0, 0, 6, 0], stride=[1, -1, 2, 1],
                end_mask=[True, True, False, False], squeeze_mask=[False, False, False, True],
            ),
            lambda t: t["x"].flip(1)[:, :, 1:6:2, 2],
        ),
        Case(
            "slice_update",
            lambda mb, v: mb.slice_update(
                x=v["x"], update=mb.slice_by_size(x=v["y"], begin=[0] * 4, size=[2, 1, 2, 5]),
                begin=begin(mb, v, 0), end=begin(mb, v, 1), stride=[1, 1, 2, 1],
                begin_mask=free, end_mask=free,
            ),
            updated,
        ),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Every case."""
    return [*_elementwise(), *_reductions(), *_products(), *_movement()]


SCALES = np.linspace(0.02, 0.08, 4).astype(np.float32)
ZEROS = np.array([-3, 0, 4, 9], np.int8)


def _quantize(mb: Any, x: Any) -> Any:
    return mb.quantize(input=x, scale=SCALES, zero_point=ZEROS, axis=1, output_dtype="int8")


def _dequantize(mb: Any, x: Any) -> Any:
    return mb.dequantize(input=_quantize(mb, x), scale=SCALES, zero_point=ZEROS, axis=1)


def _quantized(t: T) -> Tensor:
    scale, zero = (torch.from_numpy(a).float().view(1, 4, 1, 1) for a in (SCALES, ZEROS))
    return ((t["x"] / scale).round() + zero).clamp(-128, 127).to(torch.int8)


def _dequantized(t: T) -> Tensor:
    scale, zero = (torch.from_numpy(a).float().view(1, 4, 1, 1) for a in (SCALES, ZEROS))
    return (_quantized(t).float() - zero) * scale


def save(program: Any, path: Path) -> Path:
    """A MIL program as a package, with nothing optimized away."""
    ct = import_coremltools()
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )
    model.save(str(path))
    return path
