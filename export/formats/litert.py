"""LiteRT's flatbuffers."""

from __future__ import annotations

from export.formats import Lowering, Record, Run, Sizes, Speed, Without
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
    runner=Without("LiteRT-LM does not open it: it is for apps with a loop of their own"),
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

RECORDS = (LITERT,)
