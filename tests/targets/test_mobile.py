"""Targets as data: names, runtimes, widths of the cache; memory refused with numbers; tools found or named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bluelm.errors import InputError, TargetError, UnavailableError
from compress.recipe import Recipe
from export.formats import function, record, records
from pipeline.cli import app
from targets.memory import APP_SHARE, GIB, check_memory, footprint
from targets.phones.programs import load_program
from targets.registry import find, runtimes_of
from targets.socs import table
from targets.tools import Tool, examine, tools
from tests.support.checkpoints.shapes import DEMO, SEVEN

RECIPE = Recipe.load("w4-g32")


def test_every_chip_and_alias_finds_its_target_and_every_runtime_has_a_backend():
    for soc in table().socs:
        for name in (soc.id, soc.id.lower(), *soc.aliases):
            if soc.id != table().targets[find(name).name].soc:
                assert find(name).soc == soc
    for name, row in table().targets.items():
        assert runtimes_of(name)[0] == row.runtime
        for runtime in runtimes_of(name):
            path = str(record(runtime).backend)
            assert type(find(name, runtime=runtime).backend) is function(path)


@pytest.mark.parametrize(
    ("alias", "soc"), [("snapdragon-8-elite", "SM8750"), ("dimensity-9300", "MT6989"), ("a17-pro", "A17-Pro")]
)
def test_known_aliases(alias, soc):
    assert find(alias).soc.id == soc


def test_a_width_that_the_runtime_lacks_is_bad_input():
    assert find("dimensity", kv_bits=8).kv_bits == 8
    with pytest.raises(InputError, match="gguf does not support --kv-bits 8"):
        find("generic-arm64", runtime="gguf", kv_bits=8)


def test_what_the_kernels_lack_is_refused_before_work():
    target = find("dimensity")
    target.check(DEMO, RECIPE)
    with pytest.raises(TargetError, match="zero points"):
        target.check(DEMO, Recipe.load("w4-g32", symmetric=False))
    with pytest.raises(TargetError, match="8 bits in groups"):
        target.check(DEMO, Recipe.load("w4-g32", bits=8))


def test_the_footprint_of_a_7b_is_what_paper_and_pencil_say():
    need = footprint(SEVEN, RECIPE, 2048, 128, 16)
    assert need.cache == 2 * 32 * 32 * 128 * 2048 * 2  # facts: 524,288 B a token in float16
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    tables = 2 * 100096 * 4096
    assert need.weights == pytest.approx(linears * (0.5 + 4 / 32) + tables, rel=1e-3)


def test_a_7b_on_a_phone_with_4_gb_is_refused_with_what_would_fit():
    with pytest.raises(TargetError, match=r"needs \d+\.\d\d GiB .*KV cache") as refused:
        find("dimensity", device_ram_gb=4).check(SEVEN, RECIPE, context=2048)
    assert refused.value.exit_code == 4
    assert "phone with" in (refused.value.fix or "")
    find("dimensity", device_ram_gb=16).check(SEVEN, RECIPE, context=2048)


@given(ram=st.floats(0.5, 32), context=st.sampled_from([512, 2048]), bits=st.sampled_from([8, 16, 32]))
def test_the_refusals_advice_would_have_fitted(ram: float, context: int, bits: int):
    try:
        need = check_memory(SEVEN, RECIPE, context, 128, bits, ram)
    except TargetError as refused:
        advice = (refused.fix or "").split()
        if advice[0] == "use" and advice[1] == "--kv-bits":
            check_memory(SEVEN, RECIPE, context, 128, int(advice[2]), ram)
        elif advice[0] == "use" and advice[1] == "--context":
            check_memory(SEVEN, RECIPE, int(advice[2]), min(128, int(advice[2])), bits, ram)
        else:
            least = footprint(SEVEN, RECIPE, context, 128, bits).total / APP_SHARE / GIB
            assert least > ram
    else:
        assert need.total <= APP_SHARE * ram * GIB


def test_tools_are_found_or_named():
    here = {tool.name: examine(tool).state for tool in tools()}
    assert here["onnx"] == "ok"
    absent = Tool(name="no-such-package", kind="package", purpose="", fix="")
    assert examine(absent).state == "missing"
    library = Tool(name="libnone.so.9", kind="library", purpose="", fix="")
    assert examine(library).state == "missing"
    other = Tool(name="onnx", kind="package", version="0.1", purpose="", fix="")
    assert examine(other).state == "other version"


def test_doctor_lists_tools_and_ends_with_5_where_the_named_runtime_lacks_one():
    every = CliRunner().invoke(app, ["doctor"])
    assert every.exit_code == 0
    assert "mtk_converter" in every.output
    lacking = CliRunner().invoke(app, ["doctor", "--runtime", "executorch-neuropilot"])
    assert lacking.exit_code == 5


def test_what_lowering_needs_is_asked_for_before_any_work(tmp_path, monkeypatch):
    """onnxruntime-qnn registers without libatomic, and then refuses every graph behind minutes of quantizing."""
    monkeypatch.setattr("targets.tools.loads", lambda library: False)
    refused = CliRunner().invoke(app, ["--target", "snapdragon", "--out", str(tmp_path / "out")])
    assert refused.exit_code == 5
    assert "apt-get install libatomic1" in refused.output
    assert not (tmp_path / "out").exists()


def test_the_npu_of_a_dimensity_says_that_its_sdk_is_missing():
    target = find("dimensity-9400", runtime="executorch-neuropilot")
    with pytest.raises(UnavailableError, match="mtk_converter") as refused:
        target.check(DEMO, RECIPE)
    assert refused.value.exit_code == 5
    with pytest.raises(TargetError, match="Dimensity 9200"):
        find("dimensity-9200", runtime="executorch-neuropilot").check(DEMO, RECIPE)


def test_every_runtime_that_is_measured_over_adb_has_a_runner_of_its_name():
    for kind in records().values():
        if "adb" in kind.optional_tools:
            assert load_program(str(kind.device_program)).decode
