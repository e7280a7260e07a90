"""LiteRT's flatbuffers."""

from __future__ import annotations

from export.formats import Lowering, Record, Run, Sizes, Speed, StandardRunner, Without
from export.formats.onnx import QEMU
from export.formats.reasons import (
    ANY_CHIP,
    NO_LEVELS,
    NOT_EXECUTORCH,
    NOTHING_MORE,
    ROUNDED_AT_RUN_TIME,
    TOKENIZER_AS_IT_IS,
)

LITERT = Record(
    name="litert",
    targets=("dimensity", "generic-arm64"),
    tools=("ai-edge-litert",),
    optional_tools=("qemu-aarch64", "adb"),
    package="ai-edge-litert",
    backend="targets.arm64.litert_backend:LitertBackend",
    cache_widths=(32, 16, 8),
    ranges="for an 8-bit cache",
    runs={
        "cpu": Run("targets.arm64.litert:open_litert", "ai-edge-litert"),
        "arm64": Run("targets.emulator.guest:open_emulated", "ai-edge-litert", QEMU, ("litert", ("model",))),
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=Without("it is for apps with a loop of their own: LiteRT-LM opens what --runtime litert-lm makes"),
    reader="export.litert.readback:findings",
    ends=Without("the graph alone holds no tokens"),
    made=TOKENIZER_AS_IT_IS,
    arithmetic="8-bit activations",
    levels=NO_LEVELS,
    encodings=ROUNDED_AT_RUN_TIME,
    block_error=0.04,
    sizes=Sizes(row_scale=4, structure=50_000),
    lowering=Lowering(0.5, 0.1),
    speed=Speed("cpu", "LiteRT / MediaPipe"),
    blocks="rewritten",
    graphs=("model",),
    open_up="export.litert.debug:open_up",
    blocks_in_runs=True,
    inside=True,
    host_cache=True,
    reorders=Without("LiteRT's graph has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="litert",
    device_program="litert",
    untold=NOTHING_MORE,
)

LITERT_LM = Record(
    name="litert-lm",
    targets=("generic-arm64", "dimensity"),
    tools=("ai-edge-litert", "litert-lm-builder"),
    optional_tools=("litert-lm-api",),
    package="ai-edge-litert",
    backend="targets.arm64.litert_lm_backend:LitertLmBackend",
    cache_widths=(32,),
    ranges="never",
    runs={"cpu": Run("targets.arm64.litert_lm:open_litert_lm", "ai-edge-litert")},
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=StandardRunner(
        "LiteRT-LM",
        "targets.runners.litert_lm.program:open_litert_lm",
        "litert-lm-api",
        continues=Without("it asks for an answer behind every message"),
        asks_always=True,
        probabilities=Without("it scores tokens of a text, and tells no whole distribution"),
        scores=True,
    ),
    reader="export.litert_lm.readback:findings",
    ends="export.readback.ends:litert_lm",
    made=Without("the tokenizer in its file is read back with it; those beside that are the checkpoint's own"),
    arithmetic="8-bit activations",
    levels=NO_LEVELS,
    encodings=ROUNDED_AT_RUN_TIME,
    block_error=0.04,
    sizes=Sizes(row_scale=12, structure=65_000, tied=True),
    lowering=Lowering(0.5, 0.1),
    speed=Speed("cpu", "LiteRT / MediaPipe"),
    blocks="rewritten",
    graphs=("model",),
    open_up="export.litert_lm.judged:open_up",
    blocks_in_runs=True,
    inside=True,
    host_cache=True,
    reorders=Without("LiteRT's graph has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="litert-lm",
    device_program=Without("LiteRT-LM's benchmark on phones is not called yet"),
    untold=(
        "the prefill graph as it ships computes no logits: what ran has the shipped head behind it, and LiteRT-LM, "
        "which runs what ships, was held to that",
    ),
)

RECORDS = (LITERT, LITERT_LM)
