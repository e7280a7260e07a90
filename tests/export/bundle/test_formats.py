"""The pieces of bundles held against independent readers: Mach-O signatures, CycloneDX, model-signing,
projects.
"""

from __future__ import annotations

import hashlib
import json
import plistlib
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import tree_sitter
import tree_sitter_swift
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bluelm.errors import InputError, TargetError
from eval.report import TOOLS
from export import formats
from export.bundle import build, manifest, mlbom, project, runner, zip32
from export.bundle.android import apk, axml
from export.bundle.apple import macho
from export.bundle.manifest import BundleManifest
from tests.packages import requires
from tests.support import bundles


def check_code_signature(data: bytes) -> tuple[int, dict[int, bytes]]:
    """Check the page hashes of an ad hoc signature as xnu's cs_blobs.h says.

    Returns:
        flags and special slots.
    """
    command = data.index(struct.pack("<II", 0x1D, 16))
    offset, size = struct.unpack_from("<II", data, command + 8)
    assert offset + size == len(data)
    magic, _, count = struct.unpack_from(">3I", data, offset)
    assert magic == 0xFADE0CC0
    blobs = dict(struct.unpack_from(">2I", data, offset + 12 + 8 * i) for i in range(count))
    at = offset + blobs[0]
    fields = struct.unpack_from(">9I4B", data, at)
    assert fields[0] == 0xFADE0C02
    _, _, _, flags, hashes, _, special, pages, limit, width, kind, _, page = fields
    assert (width, kind, limit) == (32, 2, offset)
    for index in range(pages):
        chunk = data[index << page : min((index + 1) << page, limit)]
        found = data[at + hashes + 32 * index : at + hashes + 32 * index + 32]
        assert hashlib.sha256(chunk).digest() == found, index
    first = at + hashes
    return flags, {slot: data[first - 32 * slot : first - 32 * slot + 32] for slot in range(1, special + 1)}


@requires("clang-19", "lld-19")
def test_the_code_signature_is_what_another_linker_writes(tmp_path: Path) -> None:
    """The same checks hold for ld64.lld's own signature and for ours; ours binds plist and seal as well."""
    linked = runner.build("18.0")
    flags, slots = check_code_signature(linked.code)
    assert flags & 2 and not slots
    prepared = macho.prepare(linked.code, "org.bluelm.demo", "x")
    identity = macho.Identity("org.bluelm.demo", b"plist", b"seal")
    signed = macho.sign(prepared, identity, "x")
    flags, slots = check_code_signature(signed)
    assert flags == 2
    assert slots[1] == hashlib.sha256(b"plist").digest() and slots[3] == hashlib.sha256(b"seal").digest()
    assert macho.sign(macho.prepare(signed, "org.bluelm.demo", "x"), identity, "x") == signed
    assert runner.build("18.0") == linked
    # without a signature a load command is added
    bare = bytearray(macho.parse(linked.code, "x").code)
    at = bare.index(struct.pack("<II", 0x1D, 16))
    bare[at : at + 16] = bytes(16)
    count, size = struct.unpack_from("<II", bare, 16)
    struct.pack_into("<II", bare, 16, count - 1, size - 16)
    again = macho.sign(macho.prepare(bytes(bare), "org.bluelm.demo", "x"), identity, "x")
    assert check_code_signature(again)[1] == slots


def test_an_ipa_is_sealed(tmp_path: Path) -> None:
    made = bundles.make("ipa", tmp_path / "app", bundles.development_keys(tmp_path))
    with zipfile.ZipFile(made) as archive:
        assert archive.testzip() is None
        files = {name.split(".app/")[1]: archive.read(name) for name in archive.namelist()}
        modes = {n.split(".app/")[1]: archive.getinfo(n).external_attr >> 16 for n in archive.namelist()}
    info = plistlib.loads(files["Info.plist"])
    assert info["CFBundleIdentifier"] == "org.bluelm.demo" and info["CFBundleExecutable"] == "BundleRunner"
    assert modes["BundleRunner"] == 0o100755
    seal = plistlib.loads(files["_CodeSignature/CodeResources"])
    for name, data in files.items():
        if name not in ("BundleRunner", "_CodeSignature/CodeResources"):
            assert seal["files"][name] == hashlib.sha1(data).digest()
            sealed = seal["files2"].get(name)
            assert sealed == {"hash2": hashlib.sha256(data).digest()} or name in ("Info.plist", "PkgInfo")
    _, slots = check_code_signature(files["BundleRunner"])
    assert slots[1] == hashlib.sha256(files["Info.plist"]).digest()
    assert slots[3] == hashlib.sha256(files["_CodeSignature/CodeResources"]).digest()
    assert "sign it again" in " ".join(build.verify(made).notes)


@requires("clang-19", "lld-19")
def test_a_users_runner_app(tmp_path: Path) -> None:
    app = tmp_path / "Mine.app"
    app.mkdir()
    info = {"CFBundleExecutable": "Mine", "CFBundleIdentifier": "com.example.mine"}
    (app / "Info.plist").write_bytes(plistlib.dumps(info))
    (app / "Mine").write_bytes(runner.build("18.0").code)
    (app / "icon.png").write_bytes(b"png")
    signing = bundles.development_keys(tmp_path)
    options = build.Options(runner=app)
    made = build.make(bundles.draft("ipa"), bundles.inputs(), signing, tmp_path / "mine", options)
    build.verify(made)
    with zipfile.ZipFile(made) as archive:
        assert archive.read("Payload/bluelm-demo.app/icon.png") == b"png"
    (app / "Frameworks").mkdir()
    (app / "Frameworks" / "x.dylib").write_bytes(b"\xcf\xfa\xed\xfe")
    with pytest.raises(InputError, match="code of its own"):
        build.make(bundles.draft("ipa"), bundles.inputs(), signing, tmp_path / "no", options)


@pytest.mark.parametrize("kind", get_args(manifest.Format))
def test_every_format_is_repeatable(kind: manifest.Format, tmp_path: Path) -> None:
    signing = bundles.development_keys(tmp_path)
    one, two = (bundles.make(kind, tmp_path / n, signing) for n in ("one", "two"))
    if one.is_file():
        assert one.read_bytes() == two.read_bytes()
        return
    for path in (p for p in one.rglob("*") if p.is_file()):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


def test_the_bill_of_materials_is_valid(tmp_path: Path) -> None:
    made = bundles.make("folder", tmp_path / "x", bundles.development_keys(tmp_path))
    raw = (made / "mlbom.cdx.json").read_bytes()
    mlbom.check(raw)
    bom = json.loads(raw)
    card = bom["metadata"]["component"]
    assert card["type"] == "machine-learning-model"
    slices = [m["slice"] for m in card["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]]
    assert slices == ["cpu, measured", "soc, estimated"]
    hashes = {c["name"]: c["hashes"][0]["content"] for c in bom["components"] if c["type"] == "file"}
    for name, data in bundles.FILES.items():
        assert hashes[name] == hashlib.sha256(data).hexdigest()
    bom["metadata"]["component"]["surprise"] = 1
    with pytest.raises(InputError):
        mlbom.check(json.dumps(bom).encode())


@requires("openssl")
def test_the_model_signing_command_accepts_the_signature(tmp_path: Path) -> None:
    made = bundles.make("folder", tmp_path / "x", bundles.development_keys(tmp_path))
    openssl = ["openssl", "x509", "-in", str(made / "signer.pem"), "-noout", "-pubkey"]
    (tmp_path / "key.pub").write_bytes(subprocess.run(openssl, capture_output=True, check=True).stdout)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(made)]
    command += ["--signature", str(made / "model.sig"), "--public_key", str(tmp_path / "key.pub")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (made / "artifact" / "weights.bin").write_bytes(b"other")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("name", [name for name in project.runtimes() if project.runtimes()[name].android])
def test_gradle_projects(name: str) -> None:
    """Well-formed, the runtime pinned to the version that judged the artifact, one engine."""
    draft = bundles.draft("gradle")
    versions = {"onnxruntime": "1.31.1", "onnxruntime-qnn": "2.5.0", "qnn": "2.49.0"}
    versions |= {
        "executorch": "1.4.1",
        "ai-edge-litert": "2.3.0",
        "onnxruntime-genai": "0.18.0",
        "litertlm-android": "0.18.0",
    }
    runtime = draft.runtime.model_copy(update={"name": name, "pinned": versions})
    application = draft.application.model_copy(update={"label": "A & 'B' <\"$x\">"})
    files = project.render(draft.model_copy(update={"runtime": runtime, "application": application}))
    for path, data in files.items():
        if path.endswith(".xml"):
            ElementTree.fromstring(data)
    text = files["app/build.gradle.kts"].decode()
    facts = project.runtimes()[name]
    for library in facts.android:
        kind = "@aar" if library.releases else ""
        assert f'implementation("{library.maven}:{versions[library.version_of]}{kind}")' in text
        assert f"+{library.version_of}={versions[library.version_of]}" in text.partition("versionNameSuffix = ")[2]
    home = "app/src/main/kotlin/org/bluelm/chat/"
    kotlin = {path.removeprefix(home) for path in files if path.startswith(home)}
    own = {"Tokenizer.kt", "TokenLoop.kt"}  # where the runtime has none
    assert own <= kotlin if facts.chats == "loop" else not own & kotlin
    assert {"Chat.kt", "Engine.kt", "Marks.kt", "Turns.kt"} <= kotlin and not any("__" in name for name in kotlin)
    opened = f"TokenLoop(pack, {facts.engine}Engine(pack))" if facts.chats == "loop" else f"{facts.engine}Chat(pack)"
    assert files[home + "Engine.kt"].decode().rstrip().endswith(f"fun openChat(pack: ModelPack): Chat = {opened}")
    assert f'("org.jetbrains.kotlin.android") version "{facts.kotlin}"' in files["build.gradle.kts"].decode()
    assert f"gradle-{facts.gradle}-bin.zip" in files["gradle/wrapper/gradle-wrapper.properties"].decode()
    settings = files["settings.gradle.kts"].decode()
    assert ("ivy(" in settings) == (name == "onnxruntime-genai")
    if name == "onnxruntime-genai":
        assert 'ivy("https://github.com/microsoft/onnxruntime-genai/releases/download")' in settings
        assert 'artifact("v[revision]/[artifact]-[revision].[ext]")' in settings
        assert 'includeModule("com.microsoft.onnxruntime", "onnxruntime-genai-android")' in settings
    assert ("useLegacyPackaging = true" in text) == facts.hexagon
    assert "{{" not in "".join(data.decode() for data in files.values())


WITHOUT_APP = ("onnx-npu-genai", "qnn-genai")
SHIPPED = [kind for kind in formats.names() if kind not in WITHOUT_APP]


@pytest.mark.parametrize("kind", WITHOUT_APP)
def test_an_artifact_that_no_app_of_ours_runs_is_refused_with_the_reason(kind: str) -> None:
    app = formats.record(kind).app
    assert isinstance(app, formats.Without)
    with pytest.raises(TargetError, match=f"no runtime on a phone executes '{kind}': {app.reason}"):
        project.runtime_of(kind)


def test_every_artifact_has_a_runtime_on_phones() -> None:
    for kind in SHIPPED:
        name, facts = project.runtime_of(kind)
        assert project.system_of(name, "ipa" if facts.os == "ios" else "apk") in ("android", "ios")
    pinned = project.pinned(project.runtimes()["executorch-qnn"], {"onnxruntime-qnn": "2.5.0", "executorch": "1.4.1"})
    assert pinned == {"executorch": "1.4.1", "onnxruntime-qnn": "2.5.0", "qnn": "2.49.0"}
    assert project.pinned(project.runtimes()["litert-lm"], {"litert-lm-api": "0.18.1"}) == {
        "litertlm-android": "0.18.0"
    }


def test_a_run_tells_the_version_of_every_library_of_an_app() -> None:
    for kind in SHIPPED:
        record, facts = formats.record(kind), project.runtime_of(kind)[1]
        told = {*TOOLS, record.package, *(name for more in facts.implies.values() for name in more)}
        if isinstance(record.runner, formats.StandardRunner):
            told.add(record.runner.package)  # pipeline.run.run adds it
        needed = {library.version_of for library in (*facts.android, *facts.swift_packages)} - {None}
        assert needed <= told, kind


def test_projects_of_runtimes_without_a_version_or_system() -> None:
    draft = bundles.draft("gradle")
    unpinned = draft.runtime.model_copy(update={"pinned": {}})
    with pytest.raises(InputError, match="version of onnxruntime"):
        project.render(draft.model_copy(update={"runtime": unpinned}))
    coreml = draft.runtime.model_copy(update={"name": "coreml"})
    with pytest.raises(TargetError, match="no runtime for android"):
        project.render(draft.model_copy(update={"runtime": coreml}))
    llama = draft.runtime.model_copy(update={"name": "llama.cpp"})
    with pytest.raises(TargetError, match=r"build it with the NDK[^$]*--format apk"):
        project.render(draft.model_copy(update={"runtime": llama}))


@pytest.mark.parametrize("name", [name for name, facts in project.runtimes().items() if project.has_app(facts, "ios")])
def test_xcode_projects(name: str) -> None:
    """Every object of the project file that is named exists, and every Swift file is built."""
    draft = bundles.draft("xcode")
    runtime = draft.runtime.model_copy(update={"name": name, "pinned": {"executorch": "1.4.1"}})
    files = project.render(draft.model_copy(update={"runtime": runtime}))
    text = files["BlueLMChat.xcodeproj/project.pbxproj"].decode()
    objects = yaml.safe_load(_openstep_to_yaml(text))["objects"]
    named = {word.strip('(),;"') for word in text.split() if word.strip('(),;"').startswith("B")}
    ids = {word for word in named if len(word) == 24 and all(c in "0123456789ABCDEF" for c in word)}
    assert ids <= set(objects)
    built = {o["path"] for o in objects.values() if o.get("lastKnownFileType") == "sourcecode.swift"}
    assert built == {p.split("/")[1] for p in files if p.endswith(".swift")}
    facts = project.runtimes()[name]
    wanted = [o for o in objects.values() if o["isa"] == "XCRemoteSwiftPackageReference"]
    assert [o["repositoryURL"] for o in wanted] == [package.url for package in facts.swift_packages]
    assert all(o["requirement"]["kind"] in ("branch", "revision", "exactVersion") for o in wanted)
    dependencies = [o for o in objects.values() if o["isa"] == "XCSwiftPackageProductDependency"]
    assert [(objects[o["package"]]["repositoryURL"], o["productName"]) for o in dependencies] == [
        (package.url, product) for package in facts.swift_packages for product in package.products
    ]
    assert any(o.get("path") == "Model" and o.get("lastKnownFileType") == "folder" for o in objects.values())


def _mistakes(node: tree_sitter.Node) -> list[bytes]:
    """What a grammar cannot place."""
    own = [node.text or b""] if node.is_error or node.is_missing else []
    return own + [text for child in node.children for text in _mistakes(child)]


def test_the_swift_of_the_app_parses() -> None:
    """There is no Swift compiler for this system; types are checked by Xcode alone."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    assert _mistakes(parser.parse(b"func f( { let = }").root_node)
    paths = list((project.TEMPLATES / "xcode").rglob("*.swift"))
    assert len(paths) > 5
    for path in paths:
        assert _mistakes(parser.parse(path.read_bytes()).root_node) == [], path


APIS = yaml.safe_load(Path("tests/support/apple/apis.yaml").read_text())


@pytest.mark.parametrize("engine", APIS)
def test_the_swift_app_calls_what_the_runtimes_declare(engine: str) -> None:
    """Every call of a runtime's API has the labels of its declaration, and no other one is made."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    source = (project.TEMPLATES / "xcode" / "BlueLMChat" / f"__engine_{engine}__Engine.swift").read_bytes()
    made = set(_calls(parser.parse(source).root_node))
    declared = set(APIS[engine]["calls"])
    theirs = {call.partition("(")[0].partition(".")[0] for call in declared}
    assert {call for call in made if call.partition("(")[0].partition(".")[0] in theirs} == declared


def _calls(node: tree_sitter.Node) -> Iterator[str]:
    """Calls as their declarations are written, e.g. `runner.generate(_:_:{})`."""
    if node.type == "call_expression":
        labels = ""
        for suffix in node.children[1].children:
            if suffix.type == "lambda_literal":
                labels += "{}"
            for argument in suffix.children if suffix.type == "value_arguments" else ():
                if argument.type == "value_argument":
                    first = argument.children[0]
                    labels += f"{(first.text or b'').decode()}:" if first.type == "value_argument_label" else "_:"
        yield f"{(node.children[0].text or b'').decode()}({labels})"
    for child in node.children:
        yield from _calls(child)


def _openstep_to_yaml(text: str) -> str:
    """An OpenStep property list as YAML's flow style: `{a = b; }` is `{a: b, }`, `(a, b)` is `[a, b]`."""
    out, quoted = [], False
    for line in text.splitlines()[1:]:
        for char in line:
            quoted ^= char == '"'
            out.append(char if quoted else {"=": ":", ";": ",", "(": "[", ")": "]", "\t": " "}.get(char, char))
        out.append("\n")
    return "".join(out)


names = st.text(st.sampled_from("abc/中é."), min_size=1, max_size=12).filter(
    lambda name: all(part and part[-1] != "." for part in name.split("/"))
)


@settings(max_examples=60)
@given(st.dictionaries(names, st.binary(max_size=3000), min_size=1, max_size=5), st.sampled_from([1, 4, 16384]))
def test_archives_are_read_by_zipfile_and_aligned(files: dict[str, bytes], alignment: int) -> None:
    import tempfile
    import zlib

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.zip"
        entries = [zip32.Entry(n, len(d), zlib.crc32(d), 0o644) for n, d in files.items()]
        zip32.write_zip(path, entries, [zip32.BytesSource(d) for d in files.values()], alignment)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert {name: archive.read(name) for name in archive.namelist()} == files
        found = zip32.read_zip(path, alignment)
        assert found.entries == tuple(entries)
        assert all(offset % alignment == 0 for offset in found.data.values())


@settings(max_examples=200)
@given(st.dictionaries(names, st.integers(0, 10**10), max_size=8), st.integers(apk.RESERVE + 10**6, 2**31))
def test_plans_place_every_byte_once_below_the_cap(sizes: dict[str, int], cap: int) -> None:
    places = apk.plan({name: min(size, 20 * cap) for name, size in sizes.items()}, cap)
    held: dict[str, int] = {}
    for name, placed in places.items():
        assert sum(place.size for place in placed) == min(sizes[name], 20 * cap)
        for place in placed:
            held[place.apk] = held.get(place.apk, 0) + place.size
    assert all(size <= cap for size in held.values())
    assert held.get(apk.BASE, 0) <= cap - apk.RESERVE


def test_manifest_attributes_without_an_id_are_refused() -> None:
    with pytest.raises(InputError):
        axml.encode(axml.Element("manifest", {"android:surprise": 1}))


def test_manifests_are_exact() -> None:
    draft = bundles.draft("apk")
    raw = draft.encode()
    assert BundleManifest.decode(raw, "x") == draft
    for bad in (
        raw + b"\n",
        raw.replace(b'"context": 512', b'"context":  512'),
        b"{}",
        b"[" * 10000,
        b"\xff",
    ):
        with pytest.raises(InputError):
            BundleManifest.decode(bad, "x")
