"""Core AI's folders: of programs for lengths of any kind, which GPUs run, and of fixed ones, for the Neural Engine."""

from __future__ import annotations

from dataclasses import replace

from export.formats import Lowering, Record, Run, Sizes, Speed, StandardRunner, Without
from export.formats.reasons import ANY_CHIP, FLOATS, NO_LEVELS, NOT_EXECUTORCH

COREAI = Record(
    name="coreai",
    targets=("apple",),
    tools=("coreai-core",),
    optional_tools=("transformers",),
    package="coreai-core",
    backend="targets.apple.coreai:CoreaiBackend",
    cache_widths=(16,),
    ranges="never",
    runs={
        "cpu": Run(
            "targets.apple.coreai:open_coreai",
            "coreai-core",
            "Apple's CPU kernels, products in float32, in place of those of GPUs",
            weight_bytes=2,
        ),
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=StandardRunner(
        "transformers and Core AI",
        "targets.runners.coreai:open_folder",
        "coreai-core",
        needs=("transformers",),
        stands_in="CoreAILanguageModel and swift-transformers, which run on Apple devices alone; answers end by the "
        "rules that Apple published",
    ),
    reader="export.coreai.readback:findings",
    ends="export.readback.ends:coreai",
    made=Without("the tokenizer in its folder is read back with it; those beside that are the checkpoint's own"),
    arithmetic="float16",
    levels=NO_LEVELS,
    encodings=FLOATS,
    block_error=0.005,
    sizes=Sizes(vector=2, rope=2, structure=9_000, tied=True),
    lowering=Lowering(0.5, 0.05),
    speed=Speed("gpu"),
    blocks="runtime",
    blocks_in_runs=True,
    inside=Without("its operators are fused, so it is looked at as a whole"),
    host_cache=Without("the program keeps the cache in states"),
    reorders=Without("the program has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="coreai",
    device_program=Without("Apple's llm-benchmark runs on Macs alone"),
    untold=(
        "what CoreAILanguageModel and swift-transformers make of the folder: they run on Apple devices alone",
        "what a GPU or the Neural Engine computes: Apple's runtime has neither off a Mac",
    ),
)

COREAI_ANE = replace(
    COREAI,
    name="coreai-ane",
    backend="targets.apple.coreai:CoreaiAneBackend",
    runs={
        "cpu": Run(
            "targets.apple.coreai:open_coreai",
            "coreai-core",
            "Apple's CPU kernels, sums in float32, in place of the Neural Engine's",
            weight_bytes=2,
        ),
    },
    reader="export.coreai.static.readback:findings",
    sizes=Sizes(vector=2, rope=2, structure=40_000, tied=True),
    lowering=Lowering(0.5, 0.2),
    speed=Speed("ane"),
    untold=(
        "what CoreAILanguageModel and swift-transformers make of the folder: they run on Apple devices alone",
        "whether a Neural Engine takes the program, and what it computes: nothing ran on one, Apple's CPU runtime ran "
        "all of it",
    ),
)

RECORDS = (COREAI, COREAI_ANE)
