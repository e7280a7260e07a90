"""From a finished run to a bundle that is verified, answers and is installed: the commands and their exit
codes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console

from bluelm.errors import InputError
from bluelm.text.templates import BLUELM
from bluelm.trust import signature
from bluelm.trust.manifest import FolderManifest
from compress.checkpoint.store import QuantizedCheckpoint
from export.bundle import build, keys
from export.bundle.manifest import BundleManifest
from export.gguf import export as gguf_file
from pipeline.bundles import bundle_check
from pipeline.commands.bundle import bundle_passed
from tests.support import bundles
from tests.support.checkpoints.shapes import tiny_checkpoint
from tests.support.command_line import call
from tests.support.phones.phone import FakePhone, running_phone

SMALL = ["--method", "rtn", "--samples", "4", "--length", "32", "--eval-tokens", "256", "--context", "64"]
LENIENT = "max_artifact_bytes: 100 MB\n"
STRICT = "max_artifact_bytes: 1 kB\n"
PM = """#!/bin/sh
echo "$@" >> bin/pm.log
case "$1" in
  install-create) echo "Success: created install session [77]" ;;
  install-write) [ "$(stat -c %s "$6")" = "$3" ] || { echo "size mismatch" >&2; exit 1; } ;;
  install-commit) echo Success ;;
esac
"""


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The development key of the tests, and no bundles of runs by default settings."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """Two runs of a tiny model: `good` and `failed`, which is over its budget."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_checkpoint(folder / "model")
    for name, budget, code in (("good", LENIENT, 0), ("failed", STRICT, 3)):
        (folder / f"{name}.yaml").write_text(budget)
        words = ["--target", "generic-arm64", "--runtime", "onnx-cpu", "--model", model]
        assert call(*words, "--out", folder, "--name", name, *SMALL, "--budget", folder / f"{name}.yaml") == code
    return folder


@pytest.fixture(scope="module")
def apk(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    apk = tmp_path_factory.mktemp("apk") / "good.apk"
    assert call("bundle", runs / "good", "--out", apk.with_suffix(""), "--package", "com.example.pack") == 0
    return apk


def test_a_bundle_is_verified_and_its_artifact_answers(apk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", apk) == 0
    said = capsys.readouterr().out
    assert f"the artifact loads and answers, in onnxruntime {version('onnxruntime')} on this machine" in said
    assert "development key" in said


def test_an_answer_of_a_stand_in_is_called_one(
    apk: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GGUF file is opened by llama.cpp, and torch answers in its place."""
    made = gguf_file.export(QuantizedCheckpoint.open(runs / "good" / "quantized"), tmp_path / "a", context=64)
    files = {f"artifact/{path.name}": path.read_bytes() for path in made.folder.iterdir()}
    draft = build.verify(apk).manifest.model_copy(update={"files": {}, "container": {}})
    build.make(draft, bundles.inputs(files), bundles.development_keys(tmp_path), tmp_path / "x")
    assert call("verify", tmp_path / "x.apk") == 0
    told = capsys.readouterr().out
    assert "the artifact loads and answers, emulated by torch on the weights that gguf-py reads, in place of" in told


def test_a_run_that_passes_makes_a_bundle_and_records_where_it_came_from(runs: Path) -> None:
    assert call("verify", runs / "good" / "bundle" / "good.apk") == 0
    assert not (runs / "failed" / "bundle").exists()
    provenance = json.loads((runs / "good" / "report.json").read_text())["details"]["provenance"]
    weights = (runs / "model" / "model.safetensors").read_bytes()
    assert provenance["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert provenance["signature"] == "not signed"


def test_a_run_does_not_pass_beside_a_damaged_bundle(runs: Path, tmp_path: Path) -> None:
    """It is not replaced, as it may be somebody's; and it is not taken for this run's."""
    good = tmp_path / "good"
    shutil.copytree(runs / "good", good)
    made = good / "bundle" / "good.apk"
    data = bytearray(made.read_bytes())
    data[len(data) // 2] ^= 1
    made.write_bytes(data)
    with pytest.raises(InputError, match="not replaced"):
        bundle_passed(good, True, Console(), Console())
    assert made.read_bytes() == bytes(data)
    made.unlink()
    bundle_passed(good, True, Console(), Console())
    assert call("verify", "--no-load", made) == 0


def test_a_checkpoint_that_is_not_signed_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(runs / "model", model)
    words = ["--target", "generic-arm64", "--model", model, "--out", tmp_path / "out", "--dry-run", *SMALL]
    key = keys.development_key(tmp_path / "key.pem")
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public = tmp_path / "key.pub"
    public.write_bytes(key.private.public_key().public_bytes(*form))
    assert call(*words, "--require-signature", "--public-key", public) == 2
    assert "is not signed" in capsys.readouterr().err
    assert isinstance(key.private, ec.EllipticCurvePrivateKey)
    signed = signature.sign("model", FolderManifest.of(model).digests(), key.private)
    (model / "model.sig").write_bytes(signed)
    assert call(*words, "--require-signature", "--public-key", public) == 0
    (model / "README.md").write_text("new")
    assert call(*words, "--require-signature", "--public-key", public) == 2
    assert "added: README.md" in capsys.readouterr().err


def test_the_manifest_says_where_everything_comes_from(apk: Path, runs: Path) -> None:
    with zipfile.ZipFile(apk) as archive:
        manifest = BundleManifest.decode(archive.read("assets/manifest.json"), apk)
        artifact = json.loads(archive.read("assets/artifact/artifact.json"))
    report = json.loads((runs / "good" / "report.json").read_text())
    assert manifest.model.checkpoint_digest == report["inputs"]["checkpoint"]
    assert manifest.quantized_digest == artifact["quantized_digest"]
    assert manifest.application.id == "com.example.pack"
    assert manifest.recipe["method"] == "rtn"
    assert manifest.runtime.name == "onnxruntime"
    assert manifest.runtime.pinned == {"onnxruntime": report["versions"]["onnxruntime"]}
    assert (manifest.context, manifest.tokenizer.bos_token_id, manifest.tokenizer.front) == (64, 1, (1,))
    assert manifest.tokenizer.template == BLUELM and manifest.tokenizer.template_note == ""
    assert {f.name for f in manifest.measurements} >= {"mean_kl", "artifact_bytes", "memory_bytes"}
    assert {f.how for f in manifest.measurements} >= {"measured", "estimated"}
    assert manifest.judgement.passed and manifest.judgement.checks
    assert manifest.requirements.min_ram_bytes > 10**9 and "estimated" in manifest.requirements.ram_basis
    assert manifest.tokenizer.chat is not None and manifest.tokenizer.chat.next == "</s>[|Human|]:"
    assert manifest.licences.weights == "not known" and "--weights-licence" in manifest.licences.note


@pytest.mark.parametrize("kind", ["folder", "gradle"])
def test_other_formats_answer_too(kind: str, runs: Path, tmp_path: Path) -> None:
    assert call("bundle", runs / "good", "--format", kind, "--out", tmp_path / "x") == 0
    assert call("verify", tmp_path / f"x-{kind}") == 0
    weights = next((tmp_path / f"x-{kind}").rglob("weights.bin"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert call("verify", tmp_path / f"x-{kind}") == 2


def test_formats_that_the_runtime_does_not_have(runs: Path, tmp_path: Path) -> None:
    assert call("bundle", runs / "good", "--format", "xcode", "--out", tmp_path / "x") == 4
    assert not list(tmp_path.iterdir())


def test_a_failed_run_makes_none_unless_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bundle", runs / "failed", "--out", tmp_path / "x") == 3
    assert not list(tmp_path.iterdir())
    assert call("bundle", runs / "failed", "--out", tmp_path / "x", "--allow-failed") == 0
    assert call("verify", tmp_path / "x.apk", "--no-load") == 0
    assert "failed its budget" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "x.apk") as archive:
        judgement = json.loads(archive.read("assets/manifest.json"))["judgement"]
    assert judgement["made_although_failed"] is True


def test_the_same_run_gives_the_same_bytes(runs: Path, apk: Path, tmp_path: Path) -> None:
    assert call("bundle", runs / "good", "--out", tmp_path / "again", "--package", "com.example.pack") == 0
    assert (tmp_path / "again.apk").read_bytes() == apk.read_bytes()


def test_bad_options_and_bundles(runs: Path, apk: Path, tmp_path: Path) -> None:
    good, empty = runs / "good", tmp_path / "empty"
    empty.mkdir()
    for words in (
        ["bundle", tmp_path],
        ["bundle", good, "--package", "no id"],
        ["bundle", good, "--version-name", "beta"],
        ["bundle", good, "--key", tmp_path / "absent.p12"],
        ["bundle", good, "--key", good / "report.json"],
        ["verify", tmp_path / "absent.apk"],
        ["verify", good / "report.json"],
        ["verify", good],
        ["verify", apk, "--certificate", "00"],
        ["verify", apk, "--manifest", good / "report.json"],
        ["manifest", tmp_path / "absent"],
        ["manifest", empty],
        ["manifest", runs / "model", "--out", empty],  # a folder is in the way
        ["bundle", good, "--out", good / "report.json" / "x"],
        ["verify", runs / "model", "--signature", good / "report.json", "--public-key", good / "report.json"],
        ["fetch", "../x"],
        ["fetch", "a/b", "--mirror", "ftp://a"],
    ):
        assert call(*words) == 2, words


def rebundle(run: Path, out: Path, change: Callable[[bytes], bytes]) -> int:
    """Change the prefill graph, put its new digest into artifact.json and into the report, and bundle."""
    graph, about, report = run / "onnx-cpu" / "prefill.onnx", run / "onnx-cpu" / "artifact.json", run / "report.json"
    old = hashlib.sha256(graph.read_bytes()).hexdigest()
    graph.write_bytes(change(graph.read_bytes()))
    new = hashlib.sha256(graph.read_bytes()).hexdigest()
    about.write_text(about.read_text().replace(old, new))
    assert call("bundle", run, "--out", out) == 2  # another artifact than the one that was judged
    report.write_text(report.read_text().replace(old, new))
    (run / ".stages" / "report").unlink()
    return call("bundle", run, "--out", out)


def test_an_artifact_that_changed_or_does_not_load_is_found(runs: Path, tmp_path: Path) -> None:
    """A changed file is not packed; a bundle whose model cannot be loaded is found by loading it."""
    run = tmp_path / "run"
    shutil.copytree(runs / "good", run)
    assert rebundle(run, tmp_path / "x", lambda raw: bytes(len(raw))) == 0
    assert call("verify", tmp_path / "x.apk", "--no-load") == 0
    assert call("verify", tmp_path / "x.apk") == 2
    graph = run / "onnx-cpu" / "prefill.onnx"
    graph.write_bytes(b"?" * graph.stat().st_size)
    assert call("bundle", run, "--out", tmp_path / "y") == 2
    assert not (tmp_path / "y.apk").exists()


def endless(raw: bytes) -> bytes:
    """The graph, with a loop without an end in front of its first output."""
    model = onnx.load_from_string(raw)
    scalar = onnx.helper.make_tensor_value_info
    number, truth = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["again"], ["again_out"]),
            onnx.helper.make_node("Add", ["value", "value"], ["value_out"]),
        ],
        "body",
        [scalar("i", onnx.TensorProto.INT64, []), scalar("again", truth, []), scalar("value", number, [])],
        [scalar("again_out", truth, []), scalar("value_out", number, [])],
    )
    output = model.graph.output[0].name
    maker = next(node for node in model.graph.node if output in node.output)
    maker.output[list(maker.output).index(output)] = "before_loop"
    model.graph.initializer.append(onnx.helper.make_tensor("endless_true", truth, [], [True]))
    model.graph.initializer.append(onnx.helper.make_tensor("endless_zero", number, [], [0.0]))
    model.graph.node.append(onnx.helper.make_node("Loop", ["", "endless_true", "endless_zero"], ["endless"], body=body))
    model.graph.node.append(onnx.helper.make_node("Add", ["before_loop", "endless"], [output]))
    return model.SerializeToString()


def test_an_artifact_without_an_end_is_ended(
    apk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build.verify(apk)
    files = {path: b"".join(found.sources[path].pieces()) for path in found.manifest.files}
    graph = endless(files["artifact/prefill.onnx"])
    about = json.loads(files["artifact/artifact.json"])
    entry = next(file for file in about["files"] if file["path"] == "prefill.onnx")
    entry |= {"bytes": len(graph), "sha256": hashlib.sha256(graph).hexdigest()}
    files |= {"artifact/prefill.onnx": graph, "artifact/artifact.json": json.dumps(about).encode()}
    draft = found.manifest.model_copy(update={"files": {}, "container": {}})
    build.make(draft, bundles.inputs(files), bundles.development_keys(tmp_path), tmp_path / "x")
    assert call("verify", tmp_path / "x.apk", "--certificate", "0" * 64) == 2  # not loaded before that is judged
    assert "signed by" in capsys.readouterr().err
    assert call("verify", tmp_path / "x.apk", "--load-limit", "10") == 2
    assert "does not answer within 10 s" in " ".join(capsys.readouterr().err.split())
    assert call("verify", tmp_path / "x.apk", "--load-limit", "10", "--no-load") == 2  # the limit would change nothing
    monkeypatch.setattr(bundle_check, "MEMORY", 64 << 20)
    assert call("verify", apk) == 2  # the limit of memory reaches the process


def test_what_only_a_phone_can_run_is_not_called_verified(
    apk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = build.verify(apk)
    files = {path: b"".join(found.sources[path].pieces()) for path in found.manifest.files}
    about = json.loads(files["artifact/artifact.json"]) | {"format": "executorch-neuropilot"}
    files["artifact/artifact.json"] = json.dumps(about).encode()
    draft = found.manifest.model_copy(update={"files": {}, "container": {}})
    build.make(draft, bundles.inputs(files), bundles.development_keys(tmp_path), tmp_path / "x")
    assert call("verify", tmp_path / "x.apk") == 5
    told = " ".join(capsys.readouterr().err.split())
    assert "was not run, so it is not verified" in told and "--no-load" in told
    assert call("verify", tmp_path / "x.apk", "--no-load") == 0


def test_manifest_and_verify_of_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(runs / "model", model)
    assert call("manifest", model, "--out", tmp_path / "m.json") == 0
    assert call("verify", model, "--manifest", tmp_path / "m.json") == 0
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" ")
    assert call("verify", model, "--manifest", tmp_path / "m.json") == 2


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePhone]:
    with running_phone(tmp_path / "phone") as running:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(running.server.port))
        pm = running.root / "bin" / "pm"
        pm.write_text(PM)
        pm.chmod(0o755)
        cat = running.root / "bin" / "cat"
        cat.write_text('#!/bin/sh\n[ "$1" = /proc/meminfo ] && exec /bin/cat bin/meminfo\nexec /bin/cat "$@"\n')
        cat.chmod(0o755)
        (running.root / "bin" / "meminfo").write_text("MemTotal:       16000000 kB\n")
        yield running


def test_install(apk: Path, phone: FakePhone) -> None:
    assert call("install", apk, "--serial", phone.serial) == 0
    log = (phone.root / "bin" / "pm.log").read_text()
    assert f"install-create -r -S {apk.stat().st_size}" in log and "install-commit 77" in log
    assert phone.files() == []


def test_names_reach_the_phones_shell_as_they_are(apk: Path, phone: FakePhone, tmp_path: Path) -> None:
    """A name that a shell would run, blanks, and Chinese."""
    for name in ("x; touch owned .apk", "$(touch owned) `touch owned`'\".apk", "蓝 心.apk"):
        shutil.copyfile(apk, tmp_path / name)
        assert call("install", tmp_path / name, "--serial", phone.serial) == 0
    assert not list(tmp_path.rglob("owned"))
    assert "install-commit 77" in (phone.root / "bin" / "pm.log").read_text()
    assert phone.files() == []


def test_phones_that_do_not_fit_are_refused(apk: Path, phone: FakePhone, capsys: pytest.CaptureFixture[str]) -> None:
    (phone.root / "bin" / "meminfo").write_text("MemTotal:       1000000 kB\n")
    properties = phone.root / "bin" / "properties"
    properties.write_text(properties.read_text().replace("[34]", "[21]"))
    assert call("install", apk) == 4
    said = capsys.readouterr().err
    assert "GiB of memory" in said and "Android API 24" in said
    assert not (phone.root / "bin" / "pm.log").exists()


def test_a_chat_app_of_another_runtime_version_is_refused(
    apk: Path, phone: FakePhone, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(apk) as archive:
        needed = json.loads(archive.read("assets/manifest.json"))["runtime"]["pinned"]["onnxruntime"]
    phone.app("org.example.other", "2.0+executorch=1.4.1")  # carries a model of its own
    assert call("install", apk) == 0
    phone.app("org.bluelm.chat", "1.0+onnxruntime=1.2.3")
    assert call("install", apk) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert f"needs onnxruntime {needed}, its chat app org.bluelm.chat has onnxruntime 1.2.3" in said
    phone.app("com.example.silent", "1.0")
    assert call("install", apk) == 4
    assert "com.example.silent has no word of its runtime" in " ".join(capsys.readouterr().err.split())
    phone.app("com.example.right", f"1.0+onnxruntime={needed}")
    assert call("install", apk) == 0


def test_a_tampered_bundle_is_not_installed(apk: Path, phone: FakePhone, tmp_path: Path) -> None:
    bad = tmp_path / "bad.apk"
    raw = bytearray(apk.read_bytes())
    raw[len(raw) // 2] ^= 1
    bad.write_bytes(raw)
    assert call("install", bad) == 2
    assert not (phone.root / "bin" / "pm.log").exists()


def test_a_refusing_package_manager(apk: Path, phone: FakePhone) -> None:
    pm = phone.root / "bin" / "pm"
    pm.write_text(PM.replace("install-commit) echo Success", "install-commit) echo Failure; exit 1"))
    assert call("install", apk) == 5
    assert "install-abandon 77" in (phone.root / "bin" / "pm.log").read_text()
    assert phone.files() == []


def test_no_phone(apk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "1")
    assert call("install", apk) == 5
