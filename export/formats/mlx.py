"""MLX's folders."""

from __future__ import annotations

from export.formats import Lowering, Record, Run, Sizes, Speed, StandardRunner, Without
from export.formats.reasons import ANY_CHIP, FLOATS, NO_LEVELS, NOT_EXECUTORCH, NOTHING_MORE

MLX = Record(
    name="mlx",
    targets=("apple",),
    tools=("mlx", "mlx-lm"),
    package="mlx-lm",
    backend="targets.apple.mlx:MlxBackend",
    cache_widths=(16,),
    ranges="never",
    runs={
        "cpu": Run("targets.apple.mlx:open_mlx", "mlx-lm", "MLX's CPU kernels in place of Metal's"),
        "gpu": Run("targets.apple.mlx:open_mlx", "mlx-lm", options=("gpu",)),
    },
    runs_as_shipped=True,
    one_chip=ANY_CHIP,
    runner=StandardRunner("mlx-lm", "targets.runners.mlx:open_mlx_lm", "mlx-lm", needs=("mlx",)),
    reader="export.mlx.readback:findings",
    ends="export.readback.ends:mlx",
    made=Without("the tokenizer in its folder is read back with it; those beside that are the checkpoint's own"),
    arithmetic="float16",
    levels=NO_LEVELS,
    encodings=FLOATS,
    block_error=0.01,
    sizes=Sizes(scale=4, row_scale=4, block=128, vector=2, rope=0, structure=20_000, tied=True),
    lowering=Lowering(0.5, 0.05),
    speed=Speed("gpu", "MLX"),
    blocks="runtime",
    blocks_in_runs=True,
    inside=Without("it holds weights and no graph, so it is looked at as a whole"),
    host_cache=Without("mlx-lm's cache is as long as what it has seen"),
    reorders=Without("MLX has no order of inputs"),
    delegate=NOT_EXECUTORCH,
    app="mlx",
    device_program=Without("mlx-lm measures on Macs alone"),
    untold=NOTHING_MORE,
)

RECORDS = (MLX,)
