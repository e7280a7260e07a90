"""A run against an earlier one: worse beyond its error fails, in pairs where both read the same text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bluelm.errors import InputError
from eval import baseline
from eval.accuracy.judge import DocumentSums, TokenScores, document_sums
from eval.accuracy.metrics import mean
from eval.baseline import regressions
from eval.budget.budget import Check
from eval.measurement import Measurement
from eval.report import Report
from pipeline.cli import app
from tests.support.reports import example

DOCUMENTS, LENGTH = 30, 40


def scores(seed: int, more_kl: float = 0.0) -> TokenScores:
    """Documents of very different difficulty, the same for every seed; a little noise of each run's own."""
    hard = np.repeat(np.random.default_rng(0).exponential(3, DOCUMENTS), LENGTH)
    generator = np.random.default_rng(seed)
    noise = [generator.normal(0, 0.01, DOCUMENTS * LENGTH) for _ in range(2)]
    agreement = (generator.random(DOCUMENTS * LENGTH) < 0.97).astype(float)
    cluster = np.repeat(np.arange(DOCUMENTS), LENGTH)
    return TokenScores(
        hard + noise[0] + more_kl, hard, 0.01 * hard + abs(noise[1]) + more_kl, agreement, agreement, cluster
    )


def sums(scores: TokenScores) -> DocumentSums:
    return document_sums(scores, dict.fromkeys(range(DOCUMENTS), "en"))


def report(documents: DocumentSums | None = None, *more: Measurement, text: str = "a") -> Report:
    made = example(passed=True)
    held = {} if documents is None else {"npu": documents}
    names = {(m.name, m.subject) for m in more}
    kept = tuple(m for m in made.measurements if (m.name, m.subject) not in names)
    return made.model_copy(update={"documents": held, "measurements": (*kept, *more), "inputs": {"evaluation": text}})


def failed(now: Report, before: Report) -> dict[tuple[str, str], Check]:
    return {(c.name, c.subject): c for c in regressions(now, before, 0.95) if not c.passed}


def test_a_run_against_itself_passes() -> None:
    same = report(sums(scores(1)))
    assert not failed(same, same)
    assert {c.name for c in regressions(same, same, 0.95)} >= {"not_worse_mean_kl", "not_worse_artifact_bytes"}


def test_a_regression_that_only_pairs_show() -> None:
    """0.002 nats: far below the error of either run's mean, many errors of the paired difference."""
    before, now = scores(1), scores(2, more_kl=0.002)
    alone = mean(before.kl, before.cluster)
    assert alone.error is not None
    assert alone.error > 0.002
    found = failed(report(sums(now)), report(sums(before)))
    assert set(found) == {("not_worse_log_perplexity", "npu"), ("not_worse_mean_kl", "npu")}
    assert "worse beyond its error; paired on 1,200 tokens of 30 documents" in str(found["not_worse_mean_kl", "npu"])
    assert not failed(report(sums(before)), report(sums(now)))  # better is no regression


def test_the_paired_error_is_the_clustered_one_of_the_differences() -> None:
    a, b = scores(1), scores(2)
    expected = mean(a.kl - b.kl, a.cluster)
    about = next(p for p in baseline.PAIRED if p.figure == "mean_kl")
    found = baseline.paired(about, sums(a), sums(b), "npu", 0.95)
    assert found.value == pytest.approx(expected.value)
    assert found.error == pytest.approx(expected.error)


def test_honest_reruns_pass_as_often_as_the_confidence_says() -> None:
    runs = [sums(scores(seed)) for seed in range(40)]
    about = next(p for p in baseline.PAIRED if p.figure == "mean_kl")
    wrong = sum(not baseline.paired(about, a, b, "npu", 0.95).passed for a in runs for b in runs if a is not b)
    assert wrong / (40 * 39) == pytest.approx(0.05, abs=0.03)


def test_other_text_is_compared_by_the_errors_of_both() -> None:
    kl = Measurement("mean_kl", 0.00107, "nats/token", "measured", 5e-5, 4096, subject="npu")
    before = report(sums(scores(1)), kl)
    slightly, clearly = replace(kl, value=0.00115), replace(kl, value=0.0014)
    assert not failed(report(sums(scores(1)), slightly, text="b"), before)
    found = failed(report(sums(scores(1)), clearly, text="b"), before)
    assert set(found) == {("not_worse_mean_kl", "npu")}
    assert "not paired" in str(found["not_worse_mean_kl", "npu"])
    assert ("not_worse_mean_kl", "npu") in failed(report(None, replace(kl, value=math.nan)), before)


def test_a_figure_that_is_gone_is_no_pass() -> None:
    before = report()
    gone = before.model_copy(update={"measurements": tuple(m for m in before.measurements if m.name != "p99_kl")})
    assert {note.note for note in failed(gone, before).values()} == {"not measured"}


def test_sizes_and_speeds() -> None:
    before = report()
    bigger = Measurement("artifact_bytes", 7_200_000, "bytes", "measured", subject="files")
    assert set(failed(report(None, bigger), before)) == {("not_worse_artifact_bytes", "files")}
    assert not failed(report(None, replace(bigger, value=7_140_000)), before)  # below 1 %
    slow = Measurement("decode_tokens_per_s", 300, "tokens/s", "estimated", None, None, "", "soc", 250, 390)
    assert set(failed(report(None, slow), before)) == {("not_worse_decode_tokens_per_s", "soc")}
    assert not failed(report(None, replace(slow, high=450)), before)
    assert not failed(report(None, replace(slow, how="measured")), before)  # another kind of figure
    host = Measurement("decode_tokens_per_s", 3, "tokens/s", "measured", 1, 5, "", "host", 2, 4)
    assert not failed(report(None, host), before)  # the baseline's was noisy


def test_the_command_takes_a_run_or_its_report(tmp_path: Path) -> None:
    before, now = report(sums(scores(1))), report(sums(scores(2, more_kl=0.002)))
    for name, one in (("before", before), ("now", now)):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    run = CliRunner().invoke
    for place in (tmp_path / "before", tmp_path / "before" / "report.json"):
        bad = run(app, ["check", str(tmp_path / "now"), "--baseline", str(place)])
        assert bad.exit_code == 3, bad.output
        assert "not_worse_mean_kl (npu): changed by +0.00" in bad.output
        assert run(app, ["check", str(tmp_path / "before"), "--baseline", str(place)]).exit_code == 0
    (tmp_path / "other.json").write_text("{}")
    for place, problem in ((tmp_path / "other.json", "cannot be read"), (tmp_path / "none", "holds no report")):
        wrong = run(app, ["check", str(tmp_path / "now"), "--baseline", str(place)])
        assert wrong.exit_code == 2
        assert problem in wrong.output


def test_a_baseline_of_an_earlier_version_is_read_and_not_paired(tmp_path: Path) -> None:
    """It added scores up by window."""
    whole = json.loads(report(sums(scores(1))).model_dump_json())
    whole["windows"] = whole.pop("documents")
    (tmp_path / "report.json").write_text(json.dumps(whole))
    before = Report.open(tmp_path)
    checks = {c.name: c for c in regressions(report(sums(scores(1))), before, 0.95)}
    assert "not paired" in checks["not_worse_mean_kl"].note


def test_sums_that_do_not_belong_together_are_bad_input(tmp_path) -> None:
    whole = json.loads(report(sums(scores(1))).model_dump_json())
    whole["documents"]["npu"]["kl"].append(0.1)
    (tmp_path / "report.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match="cannot be read"):
        Report.open(tmp_path)


def test_a_difference_of_emulated_figures_is_emulated() -> None:
    kl = Measurement("mean_kl", 0.001, "nats/token", "emulated", 5e-5, 4096, subject="npu", by="a simulator 1.0")
    found = regressions(report(None, kl), report(None, kl), 0.95)
    (about,) = (check for check in found if (check.name, check.subject) == ("not_worse_mean_kl", "npu"))
    assert (about.how, about.by) == ("emulated", "a simulator 1.0")
    assert str(about).endswith("; emulated by a simulator 1.0")
