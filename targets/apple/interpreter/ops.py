"""MIL operations in numpy: what each op type of a Core ML program computes (coremltools' "MIL Ops").

Floating values arrive and leave as float32; the interpreter rounds results to the declared type. Each
function takes the op's arguments by parameter name and returns an array, or a list for several outputs.
This file holds arithmetic; `shape_ops` moves elements, `constants` decompresses weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Result = Array | list[Array]


class Arguments(dict[str, Any]):
    """Arguments of one op by parameter: arrays, or lists of arrays where the parameter takes several.

    Attributes:
        opset: version of the program's op set ("CoreML8" is 8); some meanings changed between versions.
    """

    opset: int = 8

    def scalar(self, name: str, default: Any = None) -> Any:
        """A Python scalar; `default` where the argument is absent."""
        return self[name].item() if name in self else default

    def ints(self, name: str, default: Any = None) -> Any:
        """A list of Python integers or booleans; `default` where absent."""
        return np.atleast_1d(self[name]).tolist() if name in self else default

    def axes(self) -> tuple[int, ...] | None:
        """The parameter `axes`; None for all."""
        axes = self.ints("axes")
        return None if axes is None else tuple(axes)


OpFunction = Callable[[Arguments], Result]
OPS: dict[str, OpFunction] = {}


def op(*names: str) -> Callable[[OpFunction], OpFunction]:
    """Enter a function in the table under each name."""

    def enter(function: OpFunction) -> OpFunction:
        OPS.update(dict.fromkeys(names, function))
        return function

    return enter


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softmax(x: Array, axis: int) -> Array:
    """Softmax along `axis`."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def erf(x: Array) -> Array:
    """The error function, element by element."""
    return np.vectorize(math.erf, otypes=[np.float32])(x)


def _log_sum_exp(x: Array, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    top = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return total if keepdims else np.squeeze(total, axis=axis)


UNARY: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs, "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "atanh": np.arctanh,
    "ceil": np.ceil, "cos": np.cos, "cosh": np.cosh, "erf": erf, "exp": np.exp, "exp2": np.exp2,
    "floor": np.floor, "identity": lambda x: x, "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, 0), "relu6": lambda x: np.clip(x, 0, 6), "round": np.round,
    "sigmoid": sigmoid, "sign": np.sign, "silu": lambda x: x * sigmoid(x), "sin": np.sin, "sinh": np.sinh,
    "softplus": lambda x: np.logaddexp(x, 0), "softsign": lambda x: x / (1 + np.abs(x)), "sqrt": np.sqrt,
    "square": np.square, "tan": np.tan, "tanh": np.tanh,
    "cast": lambda x: x,  # the declared type of the output does it
}  # fmt: skip
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.true_divide,
    "floor_div": np.floor_divide, "mod": np.mod, "pow": np.power, "maximum": np.maximum,
    "minimum": np.minimum, "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater,
    "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal,
    "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip
REDUCTIONS: dict[str, Callable[..., Array]] = {
    "reduce_sum": np.sum, "reduce_mean": np.mean, "reduce_max": np.max, "reduce_min": np.min,
    "reduce_prod": np.prod, "reduce_log_sum_exp": _log_sum_exp,
    "reduce_l1_norm": lambda x, **k: np.abs(x).sum(**k),
    "reduce_l2_norm": lambda x, **k: np.sqrt(np.square(x).sum(**k)),
    "reduce_sum_square": lambda x, **k: np.square(x).sum(**k),
    "reduce_log_sum": lambda x, **k: np.log(x.sum(**k)),
}  # fmt: skip
OPS.update({name: lambda a, f=f: f(a["x"]) for name, f in UNARY.items()})
OPS.update({name: lambda a, f=f: f(a["x"], a["y"]) for name, f in BINARY.items()})
OPS.update({
    name: lambda a, f=f: f(a["x"], axis=a.axes(), keepdims=a.scalar("keep_dims", False))
    for name, f in REDUCTIONS.items()
})  # fmt: skip


@op("inverse")
def inverse(a: Arguments) -> Result:
    """1 / (x + epsilon)."""
    return 1 / (a["x"] + np.float32(a.scalar("epsilon", 1e-4)))


@op("log")
def log(a: Arguments) -> Result:
    """log(x + epsilon)."""
    return np.log(a["x"] + np.float32(a.scalar("epsilon", 1e-45)))


@op("rsqrt")
def rsqrt(a: Arguments) -> Result:
    """1 / sqrt(x + epsilon)."""
    return 1 / np.sqrt(a["x"] + np.float32(a.scalar("epsilon", 1e-12)))


@op("clip")
def clip(a: Arguments) -> Result:
    """Between alpha and beta."""
    return np.clip(a["x"], a.scalar("alpha", -np.inf), a.scalar("beta", np.inf))


@op("threshold")
def threshold(a: Arguments) -> Result:
    """max(x, alpha)."""
    return np.maximum(a["x"], np.float32(a.scalar("alpha")))


@op("leaky_relu")
def leaky_relu(a: Arguments) -> Result:
    """x where positive, else alpha * x."""
    return np.where(a["x"] >= 0, a["x"], a["x"] * np.float32(a.scalar("alpha", 0.01)))


@op("gelu")
def gelu(a: Arguments) -> Result:
    """Gaussian error linear unit, exact or by one of two approximations."""
    x, mode = a["x"], a.scalar("mode", "EXACT")
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


@op("softmax")
def softmax_op(a: Arguments) -> Result:
    """Softmax along `axis`, the last by default."""
    return softmax(a["x"], a.scalar("axis", -1))


@op("select")
def select(a: Arguments) -> Result:
    """`a` where `cond`, else `b`."""
    return np.where(a["cond"], a["a"], a["b"])


@op("reduce_argmax")
def reduce_argmax(a: Arguments) -> Result:
    """Index of the largest element along `axis`."""
    return _expand(a, np.argmax(a["x"], axis=a.scalar("axis", -1)))


@op("reduce_argmin")
def reduce_argmin(a: Arguments) -> Result:
    """Index of the smallest element along `axis`."""
    return _expand(a, np.argmin(a["x"], axis=a.scalar("axis", -1)))


def _expand(a: Arguments, index: Any) -> Array:
    return np.expand_dims(index, a.scalar("axis", -1)) if a.scalar("keep_dims", False) else index


@op("cumsum")
def cumsum(a: Arguments) -> Result:
    """Cumulative sum; `exclusive` leaves the element itself out, `reverse` runs from the end."""
    axis = a.scalar("axis", 0)
    x = np.flip(a["x"], axis) if a.scalar("reverse", False) else a["x"]
    total = np.cumsum(x, axis=axis, dtype=x.dtype)
    total = total - x if a.scalar("exclusive", False) else total
    return np.flip(total, axis) if a.scalar("reverse", False) else total


@op("layer_norm")
def layer_norm(a: Arguments) -> Result:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over `axes`."""
    x, axes = a["x"], a.axes()
    centred = x - x.mean(axis=axes, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + a.scalar("epsilon", 1e-5))
    return y * a.get("gamma", np.float32(1)) + a.get("beta", np.float32(0))


@op("l2_norm")
def l2_norm(a: Arguments) -> Result:
    """x / sqrt(sum(x^2) + epsilon) over the last three dimensions."""
    x = a["x"]
    return x / np.sqrt(np.square(x).sum(axis=(-3, -2, -1), keepdims=True) + a.scalar("epsilon", 1e-6))


@op("linear")
def linear(a: Arguments) -> Result:
    """x [..., in] @ weight [out, in]^T + bias [out]."""
    y = a["x"] @ a["weight"].T
    return y + a["bias"] if "bias" in a else y


@op("matmul")
def matmul(a: Arguments) -> Result:
    """x @ y, either of them with its last two dimensions exchanged first."""
    x, y = a["x"], a["y"]
    x = np.swapaxes(x, -1, -2) if a.scalar("transpose_x", False) else x
    return x @ (np.swapaxes(y, -1, -2) if a.scalar("transpose_y", False) else y)


@op("einsum")
def einsum(a: Arguments) -> Result:
    """Sum of products by an equation."""
    return np.einsum(a.scalar("equation"), *a["values"])


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(a: Arguments) -> Result:
    """softmax(q k^T / sqrt(E) + mask) v: q [B, ..., L, E], k [B, ..., S, E], v [B, ..., S, EV]."""
    q, k = a["query"], a["key"]
    scores = q @ np.swapaxes(k, -1, -2) / np.float32(math.sqrt(q.shape[-1]))  # [B, ..., L, S]
    if "attn_mask" in a:
        mask = a["attn_mask"]
        scores = scores + (np.where(mask, np.float32(0), -np.inf) if mask.dtype == np.bool_ else mask)
    return softmax(scores, -1) @ a["value"]


@op("quantize")
def quantize(a: Arguments) -> Result:
    """clip(round(input / scale) + zero_point) to the range of `output_dtype`."""
    scale, zero = (_along_axis(a, name) for name in ("scale", "zero_point"))
    limits = np.iinfo(a.scalar("output_dtype"))
    return np.clip(np.round(a["input"] / scale) + zero, limits.min, limits.max)


@op("dequantize")
def dequantize(a: Arguments) -> Result:
    """scale * (input - zero_point)."""
    scale, zero = (_along_axis(a, name) for name in ("scale", "zero_point"))
    return scale * (a["input"].astype(np.float32) - zero)


def _along_axis(a: Arguments, name: str) -> Array:
    """A scalar or vector parameter as float32, shaped to lie along `axis` of the input."""
    value = a.get(name, np.float32(0)).astype(np.float32)
    if value.ndim == 0:
        return value
    shape = [1] * a["input"].ndim
    shape[a.scalar("axis")] = -1
    return value.reshape(shape)


@op("conv")
def conv(a: Arguments) -> Result:
    """Grouped convolution: x [n, C_in, *spatial], weight [C_out, C_in / groups, *kernel]."""
    x, weight = a["x"], a["weight"]
    kernel, spatial = weight.shape[2:], x.ndim - 2
    strides, dilations = a.ints("strides", [1] * spatial), a.ints("dilations", [1] * spatial)
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _conv_pads(a, x.shape[2:], span, strides)
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    windows = np.lib.stride_tricks.sliding_window_view(x, span, axis=tuple(range(2, x.ndim)))
    pick = (slice(None), slice(None), *[slice(None, None, s) for s in strides])
    windows = windows[(*pick, *[slice(None, None, d) for d in dilations])]  # [n, C_in, *out, *kernel]
    groups, out = a.scalar("groups", 1), windows.shape[2 : 2 + spatial]
    parts = []
    for w, g in zip(np.split(windows, groups, axis=1), np.split(weight, groups), strict=True):
        inner = [1, *range(2 + spatial, 2 + 2 * spatial)]
        parts.append(np.tensordot(g, w, axes=(list(range(1, g.ndim)), inner)))  # [C_out/g, n, *out]
    y = np.swapaxes(np.concatenate(parts), 0, 1)
    return y + a["bias"].reshape(1, -1, *[1] * len(out)) if "bias" in a else y


def _conv_pads(a: Arguments, sizes: Any, span: list[int], strides: list[int]) -> list[tuple[int, int]]:
    kind = a.scalar("pad_type", "valid")
    if kind == "valid":
        return [(0, 0)] * len(span)
    if kind == "custom":
        flat = a.ints("pad")
        return list(zip(flat[::2], flat[1::2], strict=True))
    total = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(sizes, strides, span, strict=True)]
    lower = kind == "same_lower"
    return [(t - t // 2, t // 2) if lower else (t // 2, t - t // 2) for t in total]
