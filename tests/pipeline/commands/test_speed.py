"""The commands about speed, as a user types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bluelm.errors import UnavailableError
from eval.speed.speed_model import find_soc, socs
from targets.phones import devicectl
from targets.phones.programs import load_program
from targets.socs import table
from tests.support.phones.phone import running_phone

ROOT = Path(__file__).parents[3]


def ask(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=ROOT
    )


def test_estimate_prints_every_chip_model_and_width():
    done = ask("estimate")
    lines = done.stdout.splitlines()
    chips = [soc.name for soc in socs().values() if soc.in_device_table]
    assert done.returncode == 0 and len(chips) == 17
    for chip in chips:
        for model in ("1B", "3B", "7B", "13B"):
            for bits in (4, 8):
                wanted = (f"{chip} ", f" BlueLM-{model} ", f" {bits} ")
                assert sum(all(word in f"{line} " for word in wanted) for line in lines) >= 1
    assert len([line for line in lines if "BlueLM-" in line]) == 17 * 4 * 2


def test_estimate_loads_nothing_heavy_and_does_little():
    """A million calls of functions take about half a second; their number is the same on a busy machine."""
    code = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
from pipeline.cli import main
try:
    main(["estimate"])
except SystemExit:
    sys.setprofile(None)
    print(sorted({"torch", "numpy", "onnx", "yaml"} & set(sys.modules)), calls < 1_000_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] True"


def test_estimate_of_one_chip_by_its_other_name():
    named = [ask("estimate", "--soc", name, "--bits", "4").stdout for name in ("SM8650", "snapdragon-8-gen-3")]
    assert named[0] == named[1] and "BlueLM-7B" in named[0]


def test_no_tokens_per_second_of_models_below_half_a_billion():
    done = ask("estimate", "--soc", "SM8650", "--model", "Qwen1.5-0.5B", "--model", "Qwen3-0.6B", "--bits", "4")
    small, large = (line for line in done.stdout.splitlines() if " Qwen" in line)
    assert re.search(r"npu +[\d.]+ +not known +- +- +-$", small)
    assert "not known" not in large
    assert "nothing is published of models below 0.5 B parameters" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--soc", "Snapdragon 1"), "Snapdragon 8 Gen 3"),
        (("--model", "BlueLM-70B"), "BlueLM-13B"),
        (("--bits", "99"), "not a supported weight width"),
    ],
)
def test_estimate_of_what_is_not_known(arguments, told):
    done = ask("estimate", *arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_the_speed_table_and_the_target_table_agree():
    for soc in table().socs:
        if soc.dram_gb_s is not None:
            assert find_soc(soc.name).dram_gb_s == soc.dram_gb_s
            assert find_soc(soc.id).name == find_soc(soc.name).name


def test_devices_lists_a_phone(tmp_path):
    with running_phone(tmp_path) as phone:
        done = ask("devices", ANDROID_ADB_SERVER_PORT=str(phone.server.port))
        assert done.returncode == 0
        line = done.stdout.splitlines()[2]
        for word in (phone.serial, "V2309A", "MT6989", "GiB", "Android 14 (API 34)", "NeuroPilot", "none"):
            assert word in line
        assert "devicectl is not installed" in done.stdout
        other = ask("devices", "nobody", ANDROID_ADB_SERVER_PORT=str(phone.server.port))
        assert other.returncode == 5 and "nobody" in other.stderr


def test_devices_without_any_says_what_to_do():
    done = ask("devices", ANDROID_ADB_SERVER_PORT="1")
    assert done.returncode == 5
    assert "start-server" in done.stderr and "Xcode" in done.stderr


LISTED = {
    "result": {
        "devices": [
            {
                "identifier": "C0FFEE",
                "connectionProperties": {"pairingState": "paired", "tunnelState": "connected"},
                "deviceProperties": {"name": "phone", "osVersionNumber": "18.1"},
                "hardwareProperties": {
                    "udid": "00008130-0011",
                    "marketingName": "iPhone 15 Pro",
                    "productType": "iPhone16,1",
                    "platform": "iOS",
                },
            },
            {
                "identifier": "DECAF",
                "connectionProperties": {"pairingState": "unsupported", "tunnelState": "unavailable"},
                "deviceProperties": {},
                "hardwareProperties": {"productType": "iPhone99,9"},
            },
        ]
    }
}
# Answers as Xcode 16 does, and keeps what was asked of it.
XCRUN = r"""#!/bin/sh
echo "$@" >> "$HERE/asked"
for word; do [ "$before" = --json-output ] && out=$word; before=$word; done
case "$*" in
  *"list devices"*) cat "$HERE/listed.json" > "$out" ;;
  *"copy to"*) [ -f "$HERE/full" ] && { echo "ERROR: no space" >&2; exit 1; }; echo '{}' > "$out" ;;
  *--thermal-state*) echo "thermal state: serious" ;;
  *launch*) echo 'PyTorchObserver {"prompt_tokens": 9}' ;;
esac
"""


@pytest.fixture
def xcrun(tmp_path, monkeypatch) -> Path:
    (tmp_path / "listed.json").write_text(json.dumps(LISTED))
    script = tmp_path / "bin" / "xcrun"
    script.parent.mkdir()
    script.write_text(XCRUN)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    return tmp_path


def test_apple_devices_are_listed_with_chip_and_memory(xcrun):
    first, second = devicectl.phones()
    assert (first.serial, first.state, first.soc) == ("00008130-0011", "device", "A17 Pro")
    assert (first.model, first.memory, first.system) == ("iPhone 15 Pro", 8 * 2**30, "iOS 18.1")
    assert (second.serial, second.state, second.soc, second.memory) == ("DECAF", "unpaired", "", None)
    done = ask("devices", ANDROID_ADB_SERVER_PORT="1")
    assert done.returncode == 0 and "A17 Pro" in done.stdout


def test_an_apple_bench_copies_launches_and_asks_for_the_heat(xcrun, tmp_path):
    bench = devicectl.AppleBench("00008130-0011", "org.example.runner")
    local = tmp_path / "model"
    local.write_bytes(b"123")
    sent: list[int] = []
    bench.push(local, "Documents/x/model", 0o644, sent.append)
    result = bench.run(["org.example.runner", "--model", "Documents/x/model"], "", {"A": "b"}, 10)
    assert sent == [3] and "PyTorchObserver" in result.stdout
    assert bench.thermal().status == 3
    asked = (xcrun / "asked").read_text()
    assert "--domain-identifier org.example.runner" in asked and '{"A": "b"}' in asked
    (xcrun / "full").touch()
    with pytest.raises(UnavailableError, match="no space"):
        bench.push(local, "Documents/x/model", 0o644, sent.append)


def test_no_xcode(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="Xcode") as raised:
        devicectl.phones()
    assert raised.value.exit_code == 5


def test_an_apple_runner_is_an_app(tmp_path):
    config = tmp_path / "runners.yaml"
    config.write_text("coreml: {bundle: org.example.runner}")
    assert load_program("coreml", config).files() == []
    with pytest.raises(UnavailableError, match="build an app"):
        load_program("coreml").files()
