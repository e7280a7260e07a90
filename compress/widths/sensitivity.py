"""Sensitivity of each linear: the KL divergence from rounding it alone, measured on calibration text.

One walk through the float model. Every linear begins a stream of its own where it is rounded and all before it is
float; the streams go on through the float blocks to the logits, and are held against the float model's there. One
block's weights are in memory at a time, and for every linear a stream [n, T, hidden].

Only one width is measured. For others the KL is scaled by tr(E H Eᵀ), the squared error of the linear's output: small
errors of one linear change the KL by a quadratic form in them (the first order vanishes where KL has its minimum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bluelm.errors import InputError
from bluelm.model import DecoderBlock
from bluelm.rope import rope_table
from bluelm.system.progress import Progress, Silent
from bluelm.weights import Weights
from calibration.walk import Streams, collect_hessians
from compress.methods.loss import objective
from compress.methods.rtn import round_to_nearest
from compress.recipe import HEAD, Widths

ROWS = 256  # logits computed at a time, tokens


@dataclass(frozen=True)
class Sensitivity:
    """What one linear loses.

    Attributes:
        shape: [out, in].
        kl: nats a token by width: at `measured` what rounding this linear alone makes, else scaled from it.
        measured: the width that was measured.
    """

    shape: tuple[int, int]
    kl: Mapping[Widths, float]
    measured: Widths


@torch.inference_mode()
def measure(
    weights: Weights,
    tokens: Tensor,
    options: Sequence[Widths],
    head_options: Sequence[Widths],
    progress: Progress | None = None,
) -> dict[str, Sensitivity]:
    """The sensitivity of every linear, lm_head too where it is a table of its own, by full name.

    Args:
        tokens: int64 [n, T], calibration windows.
        options: widths to tell the KL of, with one that fits everywhere; the first that fits is the one measured.
        head_options: the same for lm_head.
    """
    config = weights.config
    exact = Streams(config, weights.embedding()[tokens])
    cos, sin = rope_table(config, tokens.shape[1])
    streams: dict[str, Tensor] = {}
    losses: dict[str, dict[Widths, float]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    with (progress or Silent()).task("sensitivities", config.num_layers + 1) as task:
        for index in range(config.num_layers):
            tensors = weights.block(index)
            block = DecoderBlock.from_weights(config, tensors)
            for stream in streams.values():
                for batch in exact.batches():
                    stream[batch] = block(stream[batch], cos, sin)
            hessians = collect_hessians(exact, block)
            for stage in exact.block.stages:
                for local in stage.linears:
                    name, weight = f"model.layers.{index}.{local}", tensors[f"{local}.weight"]
                    shapes[name] = (weight.shape[0], weight.shape[1])
                    losses[name], rounded = _losses(weight, hessians[stage.name], options)
                    streams[name] = _run_with(block, local, rounded, exact)
            for batch in exact.batches():
                exact.hidden[batch] = block(exact.hidden[batch], cos, sin)
            task.advance(note=f"block {index}")
        norm, head = weights.final_norm(), weights.embedding() if config.shares_table else weights.head()
        found = dict.fromkeys(streams, head)
        states = {name: F.rms_norm(x, norm.shape, norm, config.rms_norm_eps) for name, x in streams.items()}
        reference = F.rms_norm(exact.hidden, norm.shape, norm, config.rms_norm_eps)
        if not config.shares_table:
            x = reference.flatten(0, 1)  # [tokens, hidden]
            shapes[HEAD] = (head.shape[0], head.shape[1])
            losses[HEAD], found[HEAD] = _losses(head, x.T @ x / len(x), head_options)
            states[HEAD] = reference
        kl = _divergences(reference, head, states, found)
        task.advance(note="head")
    return {name: _scaled(shapes[name], losses[name], kl[name]) for name in losses}


def _losses(weight: Tensor, hessian: Tensor, options: Sequence[Widths]) -> tuple[dict[Widths, float], Tensor]:
    """tr(E H Eᵀ) by width that fits, and the weight rounded to the first of them."""
    losses: dict[Widths, float] = {}
    first: Tensor | None = None
    for width in options:
        if width.group_size == -1 or weight.shape[1] % width.group_size == 0:
            rounded = round_to_nearest(weight, width.bits, width.group_size, width.symmetric).dequantize()
            losses[width] = objective(weight - rounded, hessian).sum().item()
            first = rounded if first is None else first
    if first is None:
        raise InputError(
            f"no group size that the target holds divides the {weight.shape[1]} columns of a linear",
            fix="choose another target or runtime",
        )
    return losses, first


def _run_with(block: DecoderBlock, local: str, weight: Tensor, exact: Streams) -> Tensor:
    """The float stream through the block with one linear replaced, [n, T, hidden]."""
    linear = block.get_submodule(local)
    assert isinstance(linear, nn.Linear)
    kept, linear.weight = linear.weight, nn.Parameter(weight, requires_grad=False)
    out = torch.empty_like(exact.hidden)
    for batch in exact.batches():
        out[batch] = block(exact.hidden[batch], exact.cos, exact.sin)
    linear.weight = kept
    return out


def _divergences(
    reference: Tensor, head: Tensor, states: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> dict[str, float]:
    """Mean KL(reference || state) in nats a token; states float32 [n, T, hidden] behind the last norm."""
    total = dict.fromkeys(states, 0.0)
    flat = reference.flatten(0, 1)
    for start in range(0, len(flat), ROWS):
        part = slice(start, start + ROWS)
        log_p = (flat[part] @ head.T).double().log_softmax(-1)  # [rows, vocab]
        p = log_p.exp()
        for name, state in states.items():
            log_q = (state.flatten(0, 1)[part] @ heads[name].T).double().log_softmax(-1)
            total[name] += (p * (log_p - log_q)).sum().item()
    return {name: value / len(flat) for name, value in total.items()}


def _scaled(shape: tuple[int, int], losses: Mapping[Widths, float], kl: float) -> Sensitivity:
    """KL of every width, from that of the first."""
    measured, least = next(iter(losses)), 1e-30
    base = max(losses[measured], least)
    return Sensitivity(shape, {width: max(kl, 0.0) * loss / base for width, loss in losses.items()}, measured)
