"""ExecuTorch programs: for CPUs through XNNPACK; delegated as a whole to Core ML, Qualcomm's or MediaTek's NPU."""

from __future__ import annotations

from export.formats import Lowering, Place, Record, Run, Sizes, Speed, StandardRunner, Without
from export.formats.coreml import INTERPRETER, UNIT
from export.formats.onnx import SIMULATOR
from export.formats.reasons import ANY_CHIP, FLOATS, NO_LEVELS, NOTHING_MORE, ROUNDED_AT_RUN_TIME, TOKENIZER_AS_IT_IS

_ON_MACS: tuple[Place, ...] = ("cpu", "gpu", "ane")
_NO_ORDER = Without("its programs have no order of inputs")
_STATES = Without("the program keeps the cache")

XNNPACK = Record(
    name="executorch-xnnpack",
    targets=("snapdragon", "dimensity", "generic-arm64", "apple"),
    tools=("torch", "executorch"),
    optional_tools=("transformers", "adb"),
    package="executorch",
    backend="targets.arm64.xnnpack_backend:XnnpackBackend",
    cache_widths=(32, 16, 8),
    ranges="never",
    runs={"cpu": Run("targets.arm64.xnnpack:open_xnnpack", "executorch")},
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=StandardRunner(
        "TextLLMRunner",
        "targets.runners.text_llm_runner.program:open_text_llm_runner",
        "executorch",
        needs=("transformers",),
        probabilities=Without("it gives text alone"),
        ends_at_once=Without("it looks for an end token from the second token of an answer on"),
    ),
    reader="export.executorch.readback_xnnpack:findings",
    ends="export.readback.ends:xnnpack",
    made=("tokenizer.json", "tokenizer_config.json"),
    arithmetic="8-bit activations",
    levels=NO_LEVELS,
    encodings=ROUNDED_AT_RUN_TIME,
    block_error=0.04,
    sizes=Sizes(row_scale=4, structure=30_000),
    lowering=Lowering(10, 6),
    speed=Speed("cpu", "ExecuTorch"),
    blocks="built again",
    rebuild="targets.block_outputs:xnnpack_debug",
    blocks_in_runs=Without("building the program again takes as long as exporting it"),
    inside=True,
    host_cache=_STATES,
    reorders=_NO_ORDER,
    delegate=Without("what XNNPACK does not take runs in operators of ExecuTorch's own"),
    app="executorch",
    device_program="executorch-xnnpack",
    untold=NOTHING_MORE,
)

COREML = Record(
    name="executorch-coreml",
    targets=("apple",),
    tools=("executorch", "coremltools"),
    optional_tools=("xcrun",),
    package="executorch",
    backend="targets.apple.executorch:ExecutorchCoreMLBackend",
    cache_widths=(32,),
    float_widths=(16, 32),
    ranges="never",
    runs={
        "interpreter": Run("targets.apple.executorch:open_executorch_coreml", "bluelm-export", INTERPRETER),
        **{
            unit: Run("targets.apple.executorch:open_executorch_coreml", "executorch", options=(unit,))
            for unit in _ON_MACS
        },
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=Without("iOS apps load it through ExecuTorch, which runs it on Apple devices alone"),
    reader="export.executorch.readback_coreml:findings",
    ends=Without("the program's methods name no tokens"),
    made=TOKENIZER_AS_IT_IS,
    arithmetic="float16",
    levels=NO_LEVELS,
    encodings=FLOATS,
    block_error=0.005,
    sizes=Sizes(vector=2, rope=2, structure=60_000),  # two functions of one package in the program
    lowering=Lowering(10, 18),
    speed=Speed("ane"),
    blocks="runtime",
    blocks_in_runs=True,
    inside=True,
    host_cache=True,
    reorders=_NO_ORDER,
    delegate="CoreMLBackend",
    app="executorch-coreml",
    device_program=Without("ExecuTorch's program on iPhones is not known to take it"),
    untold=(UNIT,),
)

QNN = Record(
    name="executorch-qnn",
    targets=("snapdragon",),
    tools=("onnxruntime-qnn", "libatomic.so.1", "executorch", "py-cpuinfo"),
    package="executorch",
    backend="targets.qualcomm.executorch:ExecutorchQnnBackend",
    compiled_from="onnx-npu",
    cache_widths=(16, 8),
    ranges="always",
    runs={"htp": Run("targets.qualcomm.executorch:open_executorch_qnn", "executorch", SIMULATOR)},
    runs_as_shipped=True,
    one_chip=True,
    runner=Without("qnn_llama_runner takes programs of other methods"),
    reader="export.qnn.readback:findings",
    ends=Without("the program's methods name no tokens"),
    made=TOKENIZER_AS_IT_IS,
    arithmetic="16-bit activations",
    levels=NO_LEVELS,
    encodings=True,
    block_error=0.005,
    # a method's graph holds its own weights
    sizes=Sizes(copies=2, scale=2, row_scale=4, vector=2, rope=2, structure=250_000),
    lowering=Lowering(5.0, 1.0, memory=7.4, part=1.07e9, process=3.3e8),
    speed=Speed("npu", "ExecuTorch"),
    blocks="source",
    blocks_in_runs=True,
    inside=True,
    host_cache=True,
    reorders=_NO_ORDER,
    delegate="QnnBackend",
    app="executorch-qnn",
    device_program=Without("ExecuTorch's programs for Snapdragons take other caches"),
    untold=NOTHING_MORE,
)

NEUROPILOT = Record(
    name="executorch-neuropilot",
    targets=("dimensity",),
    tools=("executorch", "mtk_converter", "mtk_neuron"),
    package="executorch",
    backend="targets.mediatek.backend:NeuropilotBackend",
    cache_widths=(32,),
    ranges="never",
    runs={},
    runs_as_shipped=True,
    one_chip=True,
    runner=Without("only a MediaTek phone loads it"),
    reader=Without("nobody but its runtime reads it: that it answers as its own weights do speaks for them alone"),
    ends=Without("the program's methods name no tokens"),
    made=TOKENIZER_AS_IT_IS,
    arithmetic="8-bit activations",
    levels=NO_LEVELS,
    encodings=True,
    block_error=0.04,
    sizes=Without("how MediaTek's compiler stores weights is not known"),
    lowering=Lowering(5, 2),  # guessed: the compiler could not be had
    speed=Speed("npu"),
    blocks=Without("nothing here runs it"),
    blocks_in_runs=Without("nothing here runs it"),
    inside=Without("nothing here runs it"),
    host_cache=Without("nothing here runs it"),
    reorders=_NO_ORDER,
    delegate=Without("its delegate is not looked for: no such program could be made here"),
    app="executorch-neuropilot",
    device_program=Without("MediaTek's program comes with its SDK alone"),
    untold=Without("nothing beside what it says of its reader"),
)

RECORDS = (XNNPACK, COREML, QNN, NEUROPILOT)
