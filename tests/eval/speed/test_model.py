"""The speed estimate: its arithmetic, its fit, its honesty on rows left out."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluelm.errors import InputError, UnavailableError
from eval.speed import speed_fit
from eval.speed.speed_model import (
    DATA,
    ChipSpeed,
    TokenCost,
    as_measurement,
    default_work,
    estimate,
    find_shape,
    find_soc,
    shapes,
    socs,
    unknown,
    work,
)


@pytest.fixture(scope="module")
def decode_rows() -> list[speed_fit.Published]:
    return speed_fit.published("decode")


@pytest.fixture(scope="module")
def decode_errors(decode_rows: list[speed_fit.Published]) -> dict[int, float]:
    return speed_fit.left_out("decode", decode_rows, speed_fit.twin)


def test_bluelm_7b_bytes_per_token_are_the_published_ones():
    """Facts: 7.30 B parameters; 4 bit g128 with an 8-bit head reads 3.75 GB a token; cache 262,144 B int8."""
    shape = find_shape("bluelm-7b")
    assert shape.body_weights + 2 * shape.head_weights == pytest.approx(7_296_266_240, rel=1e-3)
    load = work(shape, 4, context=1, cache_element_bytes=1, group_size=128)
    assert load.weight_bytes == pytest.approx(3.75e9, rel=0.01)
    assert load.cache_bytes == 262_144
    assert load.operations == pytest.approx(2 * 6.886e9, rel=0.01)


def test_every_shape_has_about_the_parameters_its_name_says():
    named = {"Llama-3.2-1B": 1.236e9, "Llama-3.2-3B": 3.213e9, "Qwen3-0.6B": 0.596e9, "Qwen3-4B": 4.02e9}
    for name, count in named.items():  # all four tie the embedding to the head
        shape = shapes()[name]
        assert shape.body_weights + shape.head_weights == pytest.approx(count, rel=0.01)
    for name, billions in (("BlueLM-1B", 1.0), ("BlueLM-3B", 3.0), ("BlueLM-13B", 13.0)):
        shape = shapes()[name]
        assert shape.body_weights + 2 * shape.head_weights == pytest.approx(billions * 1e9, rel=0.07)


def test_goal_median_error_and_coverage_on_rows_left_out(decode_rows, decode_errors):
    asked = [r for r in decode_rows if r.bits == 4 and 0.5 <= r.parameters_b <= 8]
    assert len(asked) == 134
    off = [abs(math.expm1(decode_errors[r.number])) for r in asked]
    assert np.median(off) <= 0.15
    held = speed_fit.inside(decode_rows, decode_errors, speed_fit.twin)
    assert np.mean([held[r.number] for r in asked]) >= 0.80


def test_a_cpu_s_interval_holds_what_it_claims_of_sources_never_seen(decode_rows):
    """Leave a source out with its runtimes and the row's model; the other sources' errors make the interval."""
    cpu = [r for r in decode_rows if r.runtime_class == "cpu"]
    unseen = speed_fit.left_out(
        "decode", cpu, lambda row, other: row.source == other.source or row.model == other.model
    )
    inside = []
    for row in cpu:
        width = speed_fit.half_width([unseen[r.number] for r in cpu if r.source != row.source])
        inside.append(abs(unseen[row.number]) <= width)
    assert len(inside) == 82
    assert np.mean(inside) >= 0.8


def test_a_runtime_of_one_source_does_not_narrow_an_interval(decode_rows):
    load = default_work(find_shape("BlueLM-3B"), 4, "cpu", 512)
    chip = find_soc("Snapdragon 8 Gen 3")

    def width(runtime: str) -> float:
        found = estimate("decode", load, chip, "cpu", runtime=runtime)
        return math.log(found.high / found.low)

    names = {r.runtime for r in decode_rows if r.runtime_class == "cpu"}
    assert len(names) == 9
    assert all(width(name) == pytest.approx(width("never heard of")) for name in names)
    npu = {r.runtime: set() for r in decode_rows if r.runtime_class == "npu"}
    for row in decode_rows:
        if row.runtime_class == "npu":
            npu[row.runtime].add(row.source)
    wanted = sorted(name for name, sources in npu.items() if len(sources) > 1)
    assert speed_fit.fit_all()["decode"]["npu"]["confirmed"] == wanted == ["QNN"]


def test_no_row_of_the_question_is_dropped():
    """Every row that the goal speaks of is judged: none is missing for want of a shape or a bandwidth."""
    with (DATA / "published_speed.csv").open(encoding="utf-8", newline="") as file:
        wanted = {
            number
            for number, row in enumerate(csv.DictReader(file))
            if row["note"].startswith(("[vendor-measured]", "[project-measured]"))
            and row["decode_tok_s"]
            and row["weight_bits"] == "4.0"
            and 0.5 <= float(row["params_b"] or 0) <= 8
        }
    judged = {r.number for r in speed_fit.published("decode") if r.bits == 4 and 0.5 <= r.parameters_b <= 8}
    assert judged == wanted


def test_a_row_left_out_does_not_touch_its_own_estimate(decode_rows, decode_errors):
    """Its published figure falsified by ten times moves its error by that and not its estimate."""
    row = next(r for r in decode_rows if r.runtime_class == "ane")
    falsified = [replace(r, tokens_s=r.tokens_s * 10) if r is row else r for r in decode_rows]
    again = speed_fit.left_out("decode", [r for r in falsified if r.runtime_class == "ane"], speed_fit.twin)
    assert again[row.number] == pytest.approx(decode_errors[row.number] - math.log(10), abs=1e-9)


def test_fit_finds_the_coefficients_it_was_made_from():
    """Synthetic phones of a known formula: both coefficients and the chips' effects come back."""
    generator = np.random.default_rng(7)
    names = [n for n in shapes() if n != "SmallThinker-4B"]
    effects = {"A": math.log(1.3), "B": -math.log(1.3)}
    rows = []
    for number in range(80):
        soc = ChipSpeed("AB"[number % 2], 60.0, None, "")
        load = default_work(shapes()[names[number % len(names)]], 4, "cpu", 128)
        seconds = (1.5 * (load.weight_bytes + load.cache_bytes) / 60e9 + 3e-4 * load.layers) * math.exp(
            effects[soc.name] + generator.normal(0, 0.03)
        )
        rows.append(speed_fit.Published(number, "cpu", soc, "r", "m" + str(number), 4, 1, load, 1 / seconds))
    fit = speed_fit.fit_class("decode", rows)
    assert fit["rate"] == pytest.approx(1.5, rel=0.15)
    assert fit["block"] == pytest.approx(3e-4, rel=0.25)
    spread = fit["effects"]["soc"]["A"] - fit["effects"]["soc"]["B"]
    assert spread == pytest.approx(2 * math.log(1.3), rel=0.15)


def test_coefficients_in_the_package_are_those_of_a_new_fit():
    stored = json.loads((DATA / "speed_coefficients.json").read_text(encoding="utf-8"))

    def same(left, right):
        if isinstance(left, dict):
            assert left.keys() == right.keys()
            for key in left:
                same(left[key], right[key])
        elif isinstance(left, list):
            assert left == right
        else:
            assert left == pytest.approx(right, rel=1e-3, abs=1e-5)

    same(speed_fit.fit_all(), stored)


@given(
    bandwidth=st.floats(20, 500),
    weight_bytes=st.floats(1e8, 1e10),
    factor=st.floats(1.01, 10),
    kind=st.sampled_from(["npu", "cpu", "gpu", "ane"]),
)
def test_more_bandwidth_is_never_slower_and_more_bytes_never_faster(bandwidth, weight_bytes, factor, kind):
    def speed(gb_s: float, size: float) -> float:
        found = estimate("decode", TokenCost(size, 1e7, 2e9, 24), ChipSpeed("new", gb_s, None, ""), kind)
        assert 0 < found.low < found.value < found.high
        return found.value

    assert speed(bandwidth * factor, weight_bytes) >= speed(bandwidth, weight_bytes)
    assert speed(bandwidth, weight_bytes * factor) <= speed(bandwidth, weight_bytes)


def test_knowing_less_never_narrows_the_interval():
    load = default_work(find_shape("BlueLM-3B"), 4, "npu", 2048)
    seen = find_soc("snapdragon 8 elite")
    unseen = find_soc("Dimensity 9400")

    def width(soc: ChipSpeed, runtime: str) -> float:
        found = estimate("decode", load, soc, "npu", runtime=runtime)
        return math.log(found.high / found.low)

    assert width(seen, "QNN") < width(unseen, "QNN") <= width(unseen, "NeuroPilot")
    assert unknown(True, True) == "model"
    assert unknown(False, False) == "model+soc+runtime"


def test_bluelm_v_3b_as_its_paper_measured_it_lies_in_the_interval():
    """arXiv 2411.10640: 24.4 tokens/s on a Dimensity 9300. The row took no part in the fit."""
    found = estimate("decode", default_work(find_shape("BlueLM-3B"), 4, "npu", 2048), find_soc("Dimensity 9300"), "npu")
    assert found.low < 24.4 < found.high


def test_half_width_holds_its_share():
    errors = [(-1) ** i * i / 100 for i in range(1, 100)]
    assert speed_fit.half_width(errors) == pytest.approx(0.80)
    assert speed_fit.half_width([0.1, -0.2]) == pytest.approx(0.2)


def test_measurement_says_that_it_is_an_estimate():
    load = default_work(find_shape("BlueLM-7B"), 4, "npu", 512)
    found = estimate("decode", load, find_soc("Snapdragon 8 Gen 3"), "npu", runtime="QNN")
    figure = as_measurement("decode", found)
    assert figure.how == "estimated"
    assert figure.name == "decode_tokens_per_s"
    assert figure.value == found.value
    assert figure.error is not None
    assert "80 % interval" in figure.note


@pytest.mark.parametrize("kind", ["ane", "tpu"])
def test_no_figure_where_nothing_is_published(kind):
    load = default_work(find_shape("BlueLM-1B"), 4, "cpu", 512)
    with pytest.raises(UnavailableError, match="nothing is published") as raised:
        estimate("prefill", load, find_soc("A17 Pro"), kind)
    assert raised.value.exit_code == 5


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match="Snapdragon 8 Gen 3"):
        find_soc("Snapdragon 9")
    with pytest.raises(InputError, match="BlueLM-7B"):
        find_shape("BlueLM-70B")
    assert len(socs()) > 25
