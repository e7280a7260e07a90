"""How far blocks that Qualcomm's compiler made lie from their twins in torch, on the simulator.

    python -m benchmarks.npu.htp_twins OUT [random] [demo] [FOLDER ...] [--blocks 4]

The twins are those of `eval/accuracy/twin_blocks.py`. "random" is a model of two blocks, 64 wide; "demo" the demo
checkpoint; a FOLDER holds any checkpoint, of which the first blocks are taken. Each is rounded to 4 bits in groups of
32, lowered and compiled for SM8650, and compiled once more with block outputs. Writes the part "twins" of
results/npu/htp_trials.json and the page; models that are not named keep their rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from benchmarks import pages
from calibration.samples import load_samples
from compress.checkpoint.store import QuantizedCheckpoint
from eval.accuracy import twin_blocks
from eval.accuracy.twin_blocks import Apart
from eval.files.compiled import Graphs
from export.lowering.ranges import Ranges, calibrate
from targets.block_outputs import open_blocks
from targets.host.cached_runtime import Feeds
from targets.registry import find
from targets.runtime import open_runtime
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.rounded import rounded

COLUMNS = (
    "model", "blocks", "width", "context", "blocks apart", "keys, values", "head",
    "keys and values of the first block, relative L2", "with block outputs and without", "decode and prefill",
)  # fmt: skip
SAMPLES, LENGTH = 8, 64


def prepared(model: str, out: Path, blocks: int) -> tuple[QuantizedCheckpoint, Ranges, int, int]:
    """A model's codes, activation ranges, and context and chunk of its graphs."""
    if model == "random":
        return lowering.quantized(), lowering.ranges(), lowering.CONTEXT, lowering.CHUNK
    chosen = {} if model == "demo" else {"source": Path(model), "layers": blocks}
    place = out / "quantized"
    quantized = QuantizedCheckpoint.open(place) if place.exists() else rounded(place, **chosen)
    samples = load_samples(None, quantized.tokenizer(), SAMPLES, LENGTH, 0)
    return quantized, calibrate(quantized, samples.tokens), 128, 32


def row(model: str, out: Path, blocks: int) -> list[str]:
    """Compile a model, run it and hold every block against its twin."""
    quantized, ranges, context, chunk = prepared(model, out, blocks)
    target = find("snapdragon")
    lowered = target.lower(quantized, ranges, out / "lowered", context=context, chunk=chunk)
    artifact = target.compile(lowered, out / "compiled")
    probes = twin_blocks.probes(artifact, ranges)
    with open_runtime(artifact.folder, "htp") as runtime:
        own = _answers(cast(Graphs, runtime), probes)
        chunks = zip(probes["prefill"], own["prefill"], strict=True)
        steps = [step for feeds, outputs in chunks for step in twin_blocks.again(artifact, feeds, outputs)]
        decode = twin_blocks.unlike((wanted, cast(Graphs, runtime).run(feeds)) for feeds, wanted in steps)
    with open_blocks(artifact, "htp", out / "debug") as shown:
        outputs = _answers(cast(Graphs, shown), probes)
    runs = {graph: list(zip(feeds, outputs[graph], strict=True)) for graph, feeds in probes.items()}
    found = twin_blocks.apart(quantized, ranges, artifact.context, runs)
    first = [one.error for one in found if one.value in ("keys 0", "values 0")]
    builds = twin_blocks.unlike(pair for graph in own for pair in zip(own[graph], outputs[graph], strict=True))
    config = quantized.config
    cells = [Path(model).name, str(config.num_layers), str(config.hidden_size), str(context)]
    cells += [f"{_largest(found, *kinds):.1f}" for kinds in (("block",), ("keys", "values"), ("head",))]
    return [*cells, f"{min(first):.1e} to {max(first):.1e}", _bits(builds), _bits(decode)]


def _bits(differing: float) -> str:
    return f"**{differing:.2g} differ**" if differing else "the same bits"


def _answers(runtime: Graphs, probes: Mapping[str, Sequence[Feeds]]) -> dict[str, list[Mapping[str, np.ndarray]]]:
    return {graph: [runtime.run(feeds) for feeds in inputs] for graph, inputs in probes.items()}


def _largest(found: Sequence[Apart], *kinds: str) -> float:
    return max(one.ratio for one in found if one.value.split()[0] in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="*", default=["random", "demo"])
    parser.add_argument("--blocks", type=int, default=4)
    given = parser.parse_intermixed_args()
    rows: list[list[str]] = []
    for model in given.models:
        rows.append(row(model, given.out / Path(model).name, given.blocks))
        print(rows[-1], flush=True)
        pages.save_rows("htp_trials", "twins", COLUMNS, rows, noise=twin_blocks.NOISE)


if __name__ == "__main__":
    main()
