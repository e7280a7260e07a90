"""The gate on purpose-made damage, on every runtime, and on honest runs; the time that judging takes.

    python -m benchmarks.gate damage OUT [--only FORMAT ...] [--blocks N] [--damages NAME ...] [--tokens N] [--again]
                                                                every damage (tests/support/damages) must fail
    python -m benchmarks.gate time OUT [--only FORMAT ...]      seconds for 20,000 tokens
    python -m benchmarks.gate size OUT [--only FORMAT ...] [--blocks N]
                                                                bytes of the files against the plan
    python -m benchmarks.gate arithmetic OUT [--only FORMAT ...]
                                                                KL to their own weights, sound and hurt

OUT keeps quantized checkpoints, artifacts and results (a JSON Lines file each), so that a run that was broken off goes
on; `python -m benchmarks.gate.page` writes the page from those files. The demo checkpoint, or its first blocks with
`--blocks`, where limits on accuracy are left out; the default recipe, rounded to nearest.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gate.bench import CONTEXT, Bench, Results, timed, told
from bluelm.errors import ExportError
from eval.files import size_plan
from export.artifacts.artifact import Artifact, Format
from targets import runtime as runtimes
from targets.host.torch_runtime import TorchRuntime
from targets.runtime import Place, Runtime, natural
from tests.support import damage
from tests.support.damages import ALL, DAMAGES, Damage, damaged, judged_as, sound

NAMES = tuple(dict.fromkeys(["none", *(row.name for row in DAMAGES)]))


def run_damage(bench: Bench, kinds: Sequence[Format], names: Sequence[str], tokens: int | None, again: bool) -> None:
    """Judge each artifact; a row a damage and format."""
    results = Results(bench.out / "damages.jsonl", ("format", "damage", "blocks"))
    blocks = bench.checkpoint.config.num_layers
    for kind in kinds:
        rows: list[Damage | None] = [None, *(row for row in DAMAGES if kind in row.formats)]
        for row in rows:
            name = "none" if row is None else row.name
            key = {"format": kind, "damage": name, "blocks": blocks}
            if name in names and (again or key not in results):
                with timed() as seconds:
                    found = judge_damage(bench, kind, row, tokens)
                results.add({**key, **found, "right": (found["verdict"] == "passed") == (row is None), "s": seconds()})
                if row is not None and row.run is None:
                    shutil.rmtree(bench.place(name.replace(" ", "-")), ignore_errors=True)


def judge_damage(bench: Bench, kind: Format, row: Damage | None, tokens: int | None) -> dict[str, object]:
    """The verdict, and what failed; a runtime or a compiler that will not take the artifact refuses it."""
    try:
        artifact = sound(bench, kind) if row is None else damaged(bench, kind, row)
        with judged_as(row):
            verdict, _ = bench.judge(artifact, tokens)
    except ExportError as error:
        return {"verdict": "refused", "failed": [], "why": error.problem}
    word = "passed" if verdict.passed else "failed"
    return {"verdict": word, "failed": [told(check) for check in verdict.failures]}


def run_time(bench: Bench, kinds: Sequence[Format]) -> None:
    results = Results(bench.out / "time.jsonl", ("format",))
    for kind in kinds:
        artifact = sound(bench, kind)
        verdict, seconds = bench.judge(artifact, 20_000)
        results.add({"format": kind, "tokens": 20_000, "s": round(seconds), "passed": verdict.passed})


def run_size(bench: Bench, kinds: Sequence[Format]) -> None:
    results = Results(bench.out / "size.jsonl", ("format", "blocks"))
    for kind in kinds:
        artifact = sound(bench, kind)
        held, parts = size_plan.held_bytes(artifact), size_plan.planned_parts(bench.quantized, artifact) or {}
        planned, layers = sum(parts.values()), artifact.model.num_layers
        sizes = {"held": held, "planned": planned, "beyond_a_block": round((held - planned) / (layers + 1))}
        results.add({"format": kind, "blocks": layers, **sizes, "outside": size_plan.deviation(planned, artifact)})


def run_arithmetic(bench: Bench, kinds: Sequence[Format]) -> None:
    """What a format's arithmetic costs, beside damage in torch: the worst eighth of the context, and one answer."""
    results = Results(bench.out / "arithmetic.jsonl", ("what", "blocks"))
    artifacts: list[tuple[Artifact, Place]] = [(sound(bench, kind), natural(kind)) for kind in kinds]
    bench.inspector.expect(artifacts)

    def add(what: str, artifact: Artifact, place: Place, runtime: Runtime) -> None:
        figures = {m.name: m for m in bench.inspector.positions(artifact, place, runtime, "")}
        most = bench.inspector.allowance(artifact, place)
        found = {name: figures[name].value for name in ("runtime_kl", "prefill_decode_kl", "position_kl_excess")}
        results.add({"what": what, "blocks": artifact.model.num_layers, "limit": most.range, **found})

    for artifact, place in artifacts:
        with runtimes.open_runtime(artifact.folder, place) as runtime:
            add(artifact.format, artifact, place, runtime)
    artifact, place = artifacts[0]
    hurt = {f"scales of block {n} times 1.05": damage.scales(bench.quantized, n) for n in (0, 1)}
    hurt["rope base times 1.05"] = damage.rope(bench.quantized, 1.05)
    for name, weights in hurt.items():
        add(f"{name}, in torch", artifact, place, TorchRuntime(weights, CONTEXT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["damage", "time", "size", "arithmetic"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--blocks", type=int, help="of the demo model: its first ones; default: all")
    parser.add_argument("--damages", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--tokens", type=int, help="of held-out text that `damage` judges on; default: by runtime")
    parser.add_argument("--again", action="store_true", help="also what the results hold already")
    options = parser.parse_args()
    bench = Bench.open(options.out, "rtn", options.blocks, method="rtn", samples=1, length=16)
    if options.what == "damage":
        run_damage(bench, options.only, options.damages, options.tokens, options.again)
        return
    {"time": run_time, "size": run_size, "arithmetic": run_arithmetic}[options.what](bench, options.only)


if __name__ == "__main__":
    main()
