"""What Qualcomm's compiler makes of an onnx-npu artifact for onnxruntime."""

from __future__ import annotations

from dataclasses import replace

from export.formats import Lowering, Record, Run, Sizes, Speed, StandardRunner, Without
from export.formats.onnx import MADE_FOR_GENAI, READS_AS_GENAI, SIMULATOR
from export.formats.reasons import NO_LEVELS, NOT_EXECUTORCH, TOKENIZER_AS_IT_IS

QNN_CONTEXT = Record(
    name="qnn-context",
    targets=("snapdragon",),
    tools=("onnx", "onnxruntime", "onnxruntime-qnn", "libatomic.so.1"),
    optional_tools=("adb",),
    package="onnxruntime-qnn",
    backend="targets.qualcomm.backend:HtpBackend",
    compiled_from="onnx-npu",
    cache_widths=(16, 8),
    ranges="always",
    runs={"htp": Run("targets.qualcomm.runtime:open_htp", "onnxruntime-qnn", SIMULATOR)},
    runs_as_shipped=Without("Qualcomm's x86 simulator cannot load two graphs with shared weights"),
    one_chip=True,
    runner=Without("no program of users loads two graphs of context binaries with a cache outside"),
    reader="export.qnn.readback:findings",
    ends=Without("the binary holds no tokens"),
    made=TOKENIZER_AS_IT_IS,
    arithmetic="16-bit activations",
    levels=NO_LEVELS,
    encodings=True,
    block_error=0.005,
    sizes=Sizes(scale=2, row_scale=4, vector=2, rope=2, structure=200_000),
    lowering=Lowering(1.0, 0.6, memory=13.1, part=1.07e9),
    speed=Speed("npu", "QNN"),
    blocks="source",
    blocks_in_runs=True,
    inside=True,
    host_cache=True,
    reorders=Without("its graph has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="onnxruntime-qnn",
    device_program="qnn-context",
    untold=(
        "what the shipped binary computes: it holds both graphs with shared weights, which Qualcomm's x86 simulator "
        "cannot load, so the shipped binary itself cannot run here; what ran are the same graphs, compiled one by one "
        "by the same compiler with the same settings but for the sharing",
    ),
)

QNN_GENAI = replace(  # the same compiler's contexts, as stages that onnxruntime-genai runs
    QNN_CONTEXT,
    name="qnn-genai",
    optional_tools=("onnxruntime-genai",),
    backend="targets.qualcomm.genai:PipelineBackend",
    compiled_from="onnx-npu-genai",
    runs={"htp": Run("targets.qualcomm.runtime:open_sliding", "onnxruntime-qnn", SIMULATOR)},
    runner=StandardRunner(
        "onnxruntime-genai",
        "targets.qualcomm.genai:open_simulated",
        "onnxruntime-genai",
        **READS_AS_GENAI,
        prompts=2,
        fills_up=True,
        stands_in=f"onnxruntime-genai on a phone: it runs the stages, compiled one by one, on {SIMULATOR}",
    ),
    reader="export.npu_genai.readback:compiled_findings",
    ends="export.readback.ends:genai",
    made=MADE_FOR_GENAI,
    app=Without("no app of ours registers Qualcomm's plug-in with onnxruntime-genai"),
    device_program=Without("nobody publishes a benchmark program of onnxruntime-genai for the NPU"),
)

RECORDS = (QNN_CONTEXT, QNN_GENAI)
