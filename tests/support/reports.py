"""A report as runs make it, without a run: two artifacts, four domains, blocks, an estimate, a failed limit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from compress.recipe import Recipe
from eval.budget.budget import judge
from eval.budget.limits import STRUCTURE, Budget
from eval.measurement import Measurement
from eval.report import Built, Report, ReportStage, tool_versions

PARTS = {"blocks": 2_000_000, "norms and tables": 700_000, "head": 1_600_000, "embedding": 1_600_000}


def figures() -> Iterator[Measurement]:
    for subject, shift in (("npu", 1.0), ("cpu", 1.001)):
        for place in ("", "@zh", "@en", "@code", "@math"):
            tokens = 4096 if not place else 1000 + 10 * len(place)
            yield Measurement(f"tokens_judged{place}", tokens, "tokens", "measured", subject=subject)
            yield Measurement(f"perplexity{place}", 36.7 * shift, "", "measured", 7.3, tokens, "", subject)
            yield Measurement(f"reference_perplexity{place}", 36.6, "", "measured", 7.3, tokens, "", subject)
            yield Measurement(f"perplexity_ratio{place}", 1.0014 * shift, "", "measured", 0.0009, tokens, "", subject)
            yield Measurement(f"mean_kl{place}", 0.00107 * shift, "nats/token", "measured", 5e-5, tokens, "", subject)
        yield Measurement("p99_kl", 0.0073, "nats/token", "measured", math.inf, 4096, "", subject)
        top1 = 0.97 if subject == "npu" else 0.873
        yield Measurement("top1_agreement", top1, "", "measured", 0.002, 4096, "", subject)
        for name in STRUCTURE:
            yield Measurement(name, 0, "", "measured", subject=subject)
        yield Measurement("bits_per_weight", 7.17, "bits", "measured", subject=subject)
        for part, size in PARTS.items():
            yield Measurement(f"part_bytes@{part}", size * shift, "bytes", "measured", subject=subject)
        for block in range(6):
            yield Measurement(f"block_error@{block}", 0.02 + 0.003 * block, "", "measured", subject=subject)
    yield Measurement("decode_tokens_per_s", 830, "tokens/s", "estimated", None, None, "a chip", "soc", 400, 1600)
    yield Measurement("decode_tokens_per_s", 41.5, "tokens/s", "measured", 2, 5, "noisy", "host", 40, 43)
    yield Measurement("artifact_bytes", 7_100_000, "bytes", "measured", subject="files")


def example(*, passed: bool = False, title: str = "a model & <others>, 4-bit") -> Report:
    """A report that failed one limit, or passed."""
    budget = Budget(max_perplexity_ratio=1.02, max_mean_kl=0.01, min_top1_agreement=0.5 if passed else 0.9)
    found = tuple(figures())
    verdict = judge(budget, found, ["npu", "cpu"])
    assert verdict.passed == passed
    files = [("weights", 4_000_000), ("embedding", 1_500_000), ("tokenizer", 78_000), ("simulator-context", 9_999_999)]
    return Report(
        passed=passed,
        title=title,
        target="snapdragon (SM8650)",
        artifacts={"npu": Built(folder="compiled", on="htp"), "cpu": Built(folder="onnx-cpu", on="cpu")},
        configuration={"soc": "SM8650", "context": 512, "recipe": Recipe.make({}).model_dump(mode="json")},
        inputs={"checkpoint": "ab" * 32},
        versions=tool_versions(),
        stages=(
            ReportStage(name="quantized", seconds=1.5, reused=False),
            ReportStage(name="judged", seconds=0, reused=True),
        ),
        measurements=found,
        budget=budget.model_dump(mode="json", exclude_none=True),
        checks=verdict.checks,
        details={
            "artifacts": {
                "npu": {
                    "format": "qnn-context",
                    "parameters": 7_867_648,
                    "bits_per_weight": 7.2,
                    "files": [{"path": role, "role": role, "bytes": size} for role, size in files],
                }
            },
            "not_known": {"npu": ["codes & scales cannot be read back"]},
        },
        warnings=("the model chats | the text\ndoes not, 100%",),
    )
