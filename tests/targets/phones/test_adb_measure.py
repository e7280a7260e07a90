"""Measuring on a phone: from push to clean-up, over the wire, with everything that goes wrong there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bluelm.errors import InputError, TargetError, UnavailableError
from eval.budget.budget import judge
from eval.budget.limits import Budget
from eval.speed.device_speed import Call, Protocol, check_chip, cool, measure
from targets.phones.phone import AndroidBench, Phone, ask
from targets.phones.programs import DeviceProgram, load_program, read_figures
from tests.support.phones.phone import FakePhone

# Takes its latency from the next line of `latencies` in its folder, so that repeats differ as told.
RUNNER = r"""#!/bin/sh
model=$(eval echo \${$#})
[ -f "$model" ] || { echo "no model $model" >&2; exit 3; }
[ "$LD_LIBRARY_PATH" = "$PWD" ] || exit 4
seconds=$(head -n 1 latencies); sed -i 1d latencies
echo "Average inference time cost: 99 ms"
echo "Peak working set size: 2000000 bytes"
echo "P50 Latency: $seconds s"
"""
CRASH = "#!/bin/sh\necho loading >&2\nkill -SEGV $$\n"
GARBAGE = "#!/bin/sh\nhead -c 5000 /dev/urandom\n"
SILENT = "#!/bin/sh\n"
LATENCIES = ("0.5", "0.020", "0.021", "0.022", "0.023", "0.024")  # the first is the warm-up


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "test_data_set_0").mkdir(parents=True)
    (folder / "decode.onnx").write_bytes(b"graph" * 1000)
    (folder / "test_data_set_0" / "input_0.pb").write_bytes(b"x")
    return folder


def make_runner(tmp_path: Path, script: str, latencies: tuple[str, ...] = LATENCIES) -> DeviceProgram:
    binary, library = tmp_path / "perf_test", tmp_path / "latencies"
    binary.write_text(script)
    library.write_text("".join(f"{x}\n" for x in latencies))
    config = tmp_path / "runners.yaml"
    own = {"onnx-cpu": {"binary": str(binary), "libraries": [str(library)]}}
    config.write_text(yaml.safe_dump(own))
    return load_program("onnx-cpu", config)


def decode_call(model: Path, depth: int = 0) -> Call:
    return Call("decode", depth, 1, model, "decode.onnx", {"decode_tokens": "32"})


def bench(phone: FakePhone) -> AndroidBench:
    return AndroidBench(phone.server.device(phone.serial))


def test_median_interval_heat_logs_and_nothing_left_behind(phone, model, tmp_path):
    phone.heat(0, 0, 0, 0, 0, 0, 1)
    figures = measure(bench(phone), make_runner(tmp_path, RUNNER), [decode_call(model)], tmp_path / "logs")
    decode, memory = figures
    assert (decode.name, decode.how, decode.subject, decode.n) == (
        "decode_tokens_per_s",
        "measured",
        "soc",
        5,
    )
    assert decode.value == pytest.approx(1 / 0.022)
    assert decode.low == pytest.approx(1 / 0.024) and decode.high == pytest.approx(1 / 0.020)
    assert "a noisy machine" in decode.note
    assert "thermal before: none" in decode.note and "after: light" in decode.note
    assert (memory.name, memory.value) == ("decode_peak_memory_bytes", 2_000_000)
    assert len(list((tmp_path / "logs").iterdir())) == 6
    assert phone.files() == []


def test_parts_run_in_turn_and_their_times_add_up(phone, model, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    (second / "decode-2.onnx").write_bytes(b"graph")
    call = replace(decode_call(model), further=((second, "decode-2.onnx"),))
    runner = make_runner(tmp_path, RUNNER, ("9", "9", *["0.020", "0.030"] * 5))
    (decode,) = measure(bench(phone), runner, [call], tmp_path / "logs")  # no memory: each part was there alone
    assert decode.value == pytest.approx(1 / 0.050) and "2 parts" in decode.note
    assert "decode-2.onnx" in (tmp_path / "logs" / "decode-0-1-part2.log").read_text()


def test_the_gate_takes_the_lower_end(phone, model, tmp_path):
    figures = measure(bench(phone), make_runner(tmp_path, RUNNER), [decode_call(model)], tmp_path / "logs")

    def passed(limit: float) -> bool:
        budget = Budget.model_validate({"min_decode_tokens_per_s": {"at_least": limit}})
        return judge(budget, figures, ()).passed

    assert passed(41) and not passed(43)  # the median is 45.5, the interval's lower end 41.7


def test_several_depths_are_named(phone, model, tmp_path):
    calls = [decode_call(model), decode_call(model, depth=512)]
    figures = measure(bench(phone), make_runner(tmp_path, RUNNER, LATENCIES * 2), calls, tmp_path / "logs")
    assert [f.name for f in figures if "tokens_per_s" in f.name] == [
        "decode_tokens_per_s",
        "decode_tokens_per_s@512",
    ]


@pytest.mark.parametrize(
    ("script", "told"),
    [(CRASH, "killed by signal 11.*loading"), (GARBAGE, "gave no speed"), (SILENT, "it said: nothing")],
)
def test_a_runner_that_crashes_or_babbles_gives_no_figure(phone, model, tmp_path, script, told):
    with pytest.raises(UnavailableError, match=told) as raised:
        measure(bench(phone), make_runner(tmp_path, script), [decode_call(model)], tmp_path / "logs")
    assert raised.value.exit_code == 5
    assert phone.files() == []


def test_a_full_disk_and_a_disconnect_give_no_figure(phone, model, tmp_path):
    runner = make_runner(tmp_path, RUNNER)
    phone.fault(disk_bytes=2000)
    with pytest.raises(UnavailableError, match="No space left"):
        measure(bench(phone), runner, [decode_call(model)], tmp_path / "logs")
    phone.fault(disconnect_push_after=2000)
    with pytest.raises(UnavailableError, match="connection"):
        measure(bench(phone), runner, [decode_call(model)], tmp_path / "logs")
    phone.fault(disconnect_shell="perf_test")
    with pytest.raises(UnavailableError, match="closed in the middle"):
        measure(bench(phone), runner, [decode_call(model)], tmp_path / "logs")


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_cooling_waits_until_the_status_allows(phone):
    phone.heat(3, 2, 1, 0)
    clock = Clock()
    protocol = Protocol(sleep=clock.sleep, clock=lambda: clock.now)
    state, waited = cool(bench(phone), protocol)
    assert (state.status, waited) == (0, 30)


def test_cooling_ends_at_its_limit_without_a_figure(phone):
    phone.heat(4)
    clock = Clock()
    protocol = Protocol(sleep=clock.sleep, clock=lambda: clock.now, cooling_limit_s=60)
    with pytest.raises(UnavailableError, match="still too hot after 60 s: critical"):
        cool(bench(phone), protocol)


def test_another_chip_is_refused_unless_asked_for_and_then_told(phone):
    found = ask(bench(phone).device)
    assert check_chip(found, ["Dimensity 9300", "mt6989"], allow_other=False) == ""
    with pytest.raises(TargetError, match=r"MT6989.*Snapdragon 8 Gen 3") as raised:
        check_chip(found, ["Snapdragon 8 Gen 3", "SM8650"], allow_other=False)
    assert raised.value.exit_code == 4
    assert "ANOTHER CHIP" in check_chip(found, ["Snapdragon 8 Gen 3", "SM8650"], allow_other=True)
    with pytest.raises(TargetError, match="not told"):
        check_chip(Phone("x", "device"), ["Snapdragon 8 Gen 3"], allow_other=False)


def test_the_chips_note_reaches_the_figures(phone, model, tmp_path):
    runner = make_runner(tmp_path, RUNNER)
    figures = measure(bench(phone), runner, [decode_call(model)], tmp_path / "logs", note="ANOTHER CHIP: x")
    assert all("ANOTHER CHIP" in f.note for f in figures)


def test_no_runner_configured_says_where_to_get_it(phone, model, tmp_path):
    with pytest.raises(UnavailableError, match=r"(?s)no arm64 build.*build\.sh"):
        measure(bench(phone), load_program("onnx-cpu"), [decode_call(model)], tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("onnx-cpu: {binry: x}", "binry"),
        ("[1]", "not a table"),
        ("a: [", "not YAML"),
        ("onnx-cpu: 3", "wrong"),
    ],
)
def test_a_bad_runner_configuration(tmp_path, text, told):
    path = tmp_path / "runners.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        load_program("onnx-cpu", path)
    with pytest.raises(InputError, match="onnx-cpu"):
        load_program("abacus")


def test_a_command_line_that_names_an_unknown_thing(phone, model, tmp_path):
    runner = make_runner(tmp_path, RUNNER).model_copy(update={"decode": "{binary} {modle}"})
    with pytest.raises(UnavailableError, match="modle"):
        measure(bench(phone), runner, [decode_call(model)], tmp_path / "logs")


def test_what_executorchs_llama_runner_says():
    told = {
        "prompt_tokens": 64,
        "generated_tokens": 63,
        "inference_start_ms": 1000,
        "prompt_eval_end_ms": 1250,
        "first_token_ms": 1260,
        "inference_end_ms": 2510,
        "SCALING_FACTOR_UNITS_PER_SECOND": 1000,
    }
    rss = "RSS after finishing text generation: 1921.5 MiB (0 if unsupported)"
    text = f"I 00:00:03 stats.h:110] hello\nPyTorchObserver {json.dumps(told)}\n{rss}"
    figures = read_figures(load_program("executorch-xnnpack"), "decode", text, 1)
    assert figures.prefill_tokens_s == pytest.approx(256)
    assert figures.decode_tokens_s == pytest.approx(50)
    assert figures.first_token_s == pytest.approx(0.26)
    assert figures.peak_bytes == 1921.5 * 2**20
    told["inference_end_ms"] = 1
    with pytest.raises(UnavailableError):
        read_figures(load_program("executorch-xnnpack"), "decode", f"PyTorchObserver {json.dumps(told)}", 1)


def test_what_litert_benchmark_model_says():
    text = (
        "INFO: Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14462.3, "
        "Inference (avg): 14575.2\nINFO: Overall peak memory footprint (MB) via periodic monitoring: 24.5\n"
    )
    figures = read_figures(load_program("litert"), "prefill", text, 128)
    assert figures.prefill_tokens_s == pytest.approx(128 / 0.0145752)
    assert figures.first_token_s == pytest.approx(0.0145752)
    assert figures.peak_bytes == pytest.approx(24.5 * 2**20)


@pytest.mark.parametrize("text", ["P50 Latency: 0 s", "P50 Latency: nan", "P50 Latency: 1.2.3 s", "P50 Latency: 1e-30"])
def test_impossible_latencies_are_no_figures(text):
    with pytest.raises(UnavailableError, match="gave no speed"):
        read_figures(load_program("onnx-cpu"), "decode", text, 1)
