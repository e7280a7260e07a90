"""GGUF, the file of llama.cpp."""

from __future__ import annotations

from export.formats import Lowering, Record, Run, Sizes, Speed, StandardRunner, Without
from export.formats.reasons import ANY_CHIP, FLOATS, NO_LEVELS, NOT_EXECUTORCH, NOTHING_MORE, TOKENIZER_AS_IT_IS

GGUF = Record(
    name="gguf",
    targets=("generic-arm64", "snapdragon"),
    tools=("gguf",),
    optional_tools=("xllamacpp",),
    package="gguf",
    backend="targets.arm64.backends:GgufBackend",
    cache_widths=(32,),
    ranges="never",
    runs={
        "cpu": Run(
            "targets.arm64.gguf:open_gguf",
            "gguf",
            "torch on the weights that gguf-py reads, in place of llama.cpp",
            weight_bytes=4,
        ),
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=StandardRunner(
        "llama.cpp",
        "targets.runners.llama_cpp:open_llama_cpp",
        "xllamacpp",
        "eval.runner.twin:allowance",
        leaves_out="eval.runner.limits:for_llama_cpp",
        misreads="it takes `</s>` for an end token where it is a piece like any other",
    ),
    reader="export.gguf.readback:findings",
    ends="export.readback.ends:gguf",
    made=TOKENIZER_AS_IT_IS,
    arithmetic="float32",
    levels=NO_LEVELS,
    encodings=FLOATS,
    block_error=1e-5,
    sizes=Sizes(block=32, rope=0, structure=20_000),
    lowering=Lowering(0.5, 0.05),
    speed=Speed("cpu"),
    blocks="runtime",
    blocks_in_runs=True,
    inside=Without("it holds weights and no graph, so it is looked at as a whole"),
    host_cache=True,
    reorders=Without("llama.cpp has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="llama.cpp",
    device_program=Without("llama.cpp's llama-bench is not called yet"),
    untold=NOTHING_MORE,
)

RECORDS = (GGUF,)
