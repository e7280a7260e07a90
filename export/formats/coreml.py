"""Core ML packages."""

from __future__ import annotations

from export.formats import Lowering, Place, Record, Run, Sizes, Speed, Without
from export.formats.reasons import ANY_CHIP, FLOATS, NO_LEVELS, NOT_EXECUTORCH, TOKENIZER_AS_IT_IS

INTERPRETER = "our interpreter of Core ML programs in NumPy"
UNIT = "the share of nodes on the Neural Engine: Core ML chooses the unit on the device"
_ON_MACS: tuple[Place, ...] = ("cpu", "gpu", "ane")

COREML = Record(
    name="coreml",
    targets=("apple",),
    tools=("coremltools",),
    optional_tools=("xcrun",),
    package="coremltools",
    backend="targets.apple.backend:CoreMLBackend",
    cache_widths=(16,),
    float_widths=(16, 32),
    ranges="never",
    runs={
        "interpreter": Run("targets.apple.backend:open_interpreter", "bluelm-export", INTERPRETER),
        **{unit: Run("targets.apple.backend:open_mac", "coremltools", options=(unit,)) for unit in _ON_MACS},
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=Without("swift-transformers runs on Apple devices alone"),
    reader="export.coreml.readback:findings",
    ends=Without("the package holds no tokens"),
    made=TOKENIZER_AS_IT_IS,
    arithmetic="float16",
    levels=NO_LEVELS,
    encodings=FLOATS,
    block_error=0.005,
    sizes=Sizes(rope=2, structure=25_000),
    lowering=Lowering(2.0, 1.2),
    speed=Speed("ane", "Core ML (coreml-llm-cli)"),
    blocks="runtime",
    blocks_in_runs=True,
    inside=True,
    host_cache=Without("the package keeps the cache in states"),
    reorders=Without("the package has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="coreml",
    device_program="coreml",
    untold=(UNIT,),
)

RECORDS = (COREML,)
