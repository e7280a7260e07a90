"""ONNX graphs: for CPUs, for onnxruntime-genai, and what Qualcomm's compiler is given."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

from export.formats import Lowering, Record, Run, Sizes, Speed, StandardRunner, Without
from export.formats.reasons import ANY_CHIP, FLOATS, NO_LEVELS, NOT_EXECUTORCH, NOTHING_MORE, TOKENIZER_AS_IT_IS


class GenaiReads(TypedDict):
    """How onnxruntime-genai reads texts and chats, of every format that it opens."""

    begins: Without
    continues: Without
    leaves_out: str
    misreads: str


QEMU = "qemu-aarch64 on this machine"
SIMULATOR = "Qualcomm's HTP simulator on x86"
GRAPHS = ("prefill", "decode")
_TOOLS = ("onnx", "onnxruntime")
_PHONE_TOOLS = ("qemu-aarch64", "cc", "adb")
MADE_FOR_GENAI = ("tokenizer.json", "tokenizer_config.json")
READS_AS_GENAI = GenaiReads(
    begins=Without("its encode puts nothing in front of a text: the template does, or the app"),
    continues=Without("its template cannot leave an answer open"),
    leaves_out="eval.runner.limits:for_genai",
    misreads="by the patterns of Llama 3 and Qwen it cuts lines that hold blanks alone otherwise",
)
_NO_ENDS = Without("the graph alone holds no tokens")

CPU = Record(
    name="onnx-cpu",
    targets=("snapdragon", "generic-arm64", "apple"),
    tools=_TOOLS,
    optional_tools=_PHONE_TOOLS,
    package="onnxruntime",
    backend="targets.arm64.backends:CpuBackend",
    cache_widths=(32, 16, 8),
    ranges="for an 8-bit cache",
    runs={
        "cpu": Run("targets.arm64.onnx:open_cpu", "onnxruntime"),
        "arm64": Run("targets.emulator.guest:open_emulated", "onnxruntime", QEMU, ("onnx", GRAPHS)),
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=Without("plain onnxruntime loads its graphs, and no program of users knows them"),
    reader="export.onnx.readback:findings",
    ends=_NO_ENDS,
    made=TOKENIZER_AS_IT_IS,
    arithmetic="float32",
    levels=True,
    encodings=FLOATS,
    block_error=1e-5,
    sizes=Sizes(structure=4000),
    lowering=Lowering(0.3, 0.05),
    speed=Without("nothing is published of float32 arithmetic on quantized weights"),
    blocks="rewritten",
    graphs=GRAPHS,
    open_up="export.onnx.debug:open_up",
    blocks_in_runs=True,
    inside=True,
    host_cache=True,
    reorders=True,
    delegate=NOT_EXECUTORCH,
    app="onnxruntime",
    device_program="onnx-cpu",
    untold=NOTHING_MORE,
)

NPU = Record(
    name="onnx-npu",
    targets=(),
    tools=_TOOLS,
    package="onnxruntime",
    backend=Without("the runtimes that are compiled of it lower to it"),
    cache_widths=(16, 8),
    ranges="always",
    runs={
        "cpu": Run("targets.arm64.onnx:open_cpu", "onnxruntime", "CPU kernels in place of the NPU's"),
        "htp": Run("targets.qualcomm.runtime:open_htp", "onnxruntime-qnn", SIMULATOR),
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=Without("it is compiled, and no user opens it"),
    reader="export.onnx.readback:findings",
    ends=_NO_ENDS,
    made=TOKENIZER_AS_IT_IS,
    arithmetic="16-bit activations",
    levels=NO_LEVELS,
    encodings=True,
    block_error=0.005,
    sizes=Sizes(scale=4, row_scale=4, vector=2, rope=2, structure=4000),
    lowering=Lowering(1.0, 0.1),
    speed=Speed("npu", "QNN"),
    blocks="rewritten",
    graphs=GRAPHS,
    open_up="export.onnx.debug:open_up",
    blocks_in_runs=True,
    inside=True,
    host_cache=True,
    reorders=Without("its graph has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="onnxruntime-qnn",
    device_program=Without("what is compiled of it is measured"),
    untold=NOTHING_MORE,
)

NPU_GENAI = replace(  # its graphs but for the cache, which slides inside them, and the stage in front
    NPU,
    name="onnx-npu-genai",
    optional_tools=("onnxruntime-genai",),
    runs={
        "cpu": Run("targets.arm64.onnx:open_sliding", "onnxruntime", "CPU kernels in place of the NPU's"),
        "htp": Run("targets.qualcomm.runtime:open_sliding", "onnxruntime-qnn", SIMULATOR),
    },
    runner=StandardRunner(
        "onnxruntime-genai",
        "targets.runners.genai:open_genai",
        "onnxruntime-genai",
        **READS_AS_GENAI,
        fills_up=True,
        stands_in="what is compiled for the NPU: CPU kernels run its stages",
    ),
    reader="export.npu_genai.readback:findings",
    ends="export.readback.ends:genai",
    made=MADE_FOR_GENAI,
    app=Without("what is compiled of it ships"),
)

GENAI = Record(
    name="onnx-genai",
    targets=("generic-arm64",),
    tools=_TOOLS,
    optional_tools=("onnxruntime-genai", *_PHONE_TOOLS),
    package="onnxruntime",
    backend="targets.arm64.backends:GenaiBackend",
    cache_widths=(32, 16, 8),
    ranges="for an 8-bit cache",
    runs={
        "cpu": Run("targets.arm64.genai:open_genai", "onnxruntime"),
        "arm64": Run("targets.emulator.guest:open_emulated", "onnxruntime", QEMU, ("onnx", ("model", "model"))),
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=StandardRunner(
        "onnxruntime-genai",
        "targets.runners.genai:open_genai",
        "onnxruntime-genai",
        **READS_AS_GENAI,
    ),
    reader="export.onnx.readback_genai:findings",
    ends="export.readback.ends:genai",
    made=MADE_FOR_GENAI,
    arithmetic="float32",
    levels=True,
    encodings=FLOATS,
    block_error=0.02,
    sizes=Sizes(rope=2, structure=4000),
    lowering=Lowering(0.5, 0.05),
    speed=Speed("cpu"),
    blocks="rewritten",
    graphs=("model",),
    open_up="export.onnx.debug:open_up",
    blocks_in_runs=True,
    inside=Without("its operators are fused, so it is looked at as a whole"),
    host_cache=Without("its cache is as long as what it has seen"),
    reorders=Without("its graph has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="onnxruntime-genai",
    device_program="onnx-genai",
    untold=NOTHING_MORE,
)

RECORDS = (CPU, NPU, NPU_GENAI, GENAI)
