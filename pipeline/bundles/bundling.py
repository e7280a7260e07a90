"""From the folder of a finished run to a bundle."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bluelm.errors import BudgetError, InputError
from bluelm.system.files import demo_checkpoint
from bluelm.system.progress import Progress
from bluelm.text.tokenizer import Tokenizer
from eval.report import Report
from export.artifacts.artifact import MANIFEST, SIMULATOR, Artifact
from export.bundle import build, keys, manifest, payload, project, runner
from export.bundle.build import Input
from export.bundle.zip32 import BytesSource, FileSource
from pipeline.bundles.chats import check_app, tokenizer_note
from pipeline.bundles.licences import licence_files, licences
from pipeline.run.binding import open_run
from targets.socs import Soc, table

_SYSTEM_BYTES = 1_500_000_000  # what a phone's system and the app itself keep for themselves
_UNSIGNED = manifest.Signing(subject="", certificate_sha256="0" * 64, development_key=False)


@dataclass(frozen=True)
class Choice:
    """What a user may choose of a bundle; None takes the default."""

    format: manifest.Format | None = None
    out: Path | None = None
    allow_failed: bool = False
    key: Path | None = None
    password: str | None = None
    certificate: Path | None = None
    model_key: Path | None = None
    package: str | None = None
    label: str | None = None
    version_code: int = 1
    version_name: str = "1.0"
    weights_licence: str | None = None
    runner: Path | None = None


def bundle(run: Path, choice: Choice, progress: Progress | None = None) -> Path:
    """Pack and sign what a run made.

    Returns:
        The file or folder that was written.

    Raises:
        InputError: no finished run, or a key that cannot be used.
        BudgetError: the run failed its budget and `allow_failed` is not set.
        TargetError, UnavailableError: the format cannot hold the model, or lacks a tool.
    """
    report = open_run(run)
    if not report.passed and not choice.allow_failed:
        fix = "mend the run, or add --allow-failed; the bundle's manifest will say so"
        raise BudgetError("the run failed its budget, so there is no bundle", where=run, fix=fix)
    artifact = find_artifact(run, report)
    format_ = choice.format or default_format(report, artifact)
    if choice.runner is not None and format_ != "ipa":
        fix = "add --format ipa, or omit --runner"
        raise InputError(f"--runner would change nothing: it is for an ipa, and this is a bundle of {format_}", fix=fix)
    if format_ in ("gradle", "xcode"):
        check_app(Tokenizer.from_folder(artifact.folder), project.runtime_of(artifact.format)[1], format_)
    draft = manifest_draft(run, report, artifact, format_, choice)
    out = choice.out or run / "bundle" / draft.name
    options = build.Options(runner=choice.runner)
    return build.make(draft, inputs_of(artifact, draft, report), load_keys(choice), out, options, progress)


def find_artifact(run: Path, report: Report) -> Artifact:
    """What a phone gets: the artifact for its NPU, or the one for CPUs where there is no other.

    Raises:
        InputError: the run's folder lost it.
    """
    built = report.artifacts.get("npu") or report.artifacts.get("cpu")
    if built is None or Path(built.folder).name != built.folder:
        raise InputError("the run's report names no artifact", where=run, fix="run bluelm-export again")
    return Artifact.open(run / built.folder)


def default_format(report: Report, artifact: Artifact) -> manifest.Format:
    """APK for Android; for iOS an IPA where its executable can be built, else an Xcode project or a folder."""
    facts = project.runtime_of(artifact.format)[1]
    if not for_apple(report, facts):
        return "apk"
    if runner.present():
        return "ipa"
    return "xcode" if project.has_app(facts, "ios") else "folder"


def for_apple(report: Report, facts: project.RuntimeFacts) -> bool:
    """Whether the run was made for Apple's chips; some runtimes serve both systems."""
    row = table().targets.get(str(report.configuration.get("target")))
    return facts.os == "ios" or (facts.os == "any" and row is not None and row.vendor == "apple")


def checkpoint_of(report: Report) -> Path:
    """The folder of the checkpoint that the run began with."""
    return Path(str(report.configuration.get("model", "checkpoint")))


def load_keys(choice: Choice) -> payload.Keys:
    """The user's keys; without any, this machine's development key."""
    if choice.key is None:
        package = keys.development_key(keys.development_path())
    else:
        package = keys.load_key(choice.key, choice.password, choice.certificate)
    model = keys.load_key(choice.model_key, choice.password) if choice.model_key else package
    return payload.Keys(package, model)


def inputs_of(artifact: Artifact, draft: manifest.BundleManifest, report: Report) -> list[Input]:
    """The artifact's files but the simulator's, the licences, and the report."""
    shipped = [file for file in artifact.files if not file.role.startswith(SIMULATOR)]
    inputs = [Input(f"artifact/{f.path}", f.role, FileSource(artifact.folder / f.path), f.sha256) for f in shipped]
    about = artifact.model_copy(update={"files": tuple(shipped)})
    raw = about.model_dump_json(indent=1).encode() + b"\n"
    inputs.append(Input(f"artifact/{MANIFEST}", "artifact", BytesSource(raw)))
    inputs.append(Input("LICENSES/NOTICE.txt", "licence", BytesSource(_notice(draft).encode())))
    texts = (
        Input(f"LICENSES/weights-{p.name}", "licence", FileSource(p)) for p in licence_files(checkpoint_of(report))
    )
    return [*inputs, *texts]


def _notice(draft: manifest.BundleManifest) -> str:
    return (
        f"Weights: {draft.licences.weights}\n"
        f"Code of this bundle, made by bluelm-export: {draft.licences.code}, "
        "https://www.apache.org/licenses/LICENSE-2.0\n"
        f"Runtime ({draft.runtime.name}): {draft.runtime.licence}; it is not part of this bundle.\n"
    )


def manifest_draft(
    run: Path, report: Report, artifact: Artifact, format_: manifest.Format, choice: Choice
) -> manifest.BundleManifest:
    """The manifest's draft, from the report and the artifact alone."""
    name = _slug(run.resolve().name)
    runtime, facts = project.runtime_of(artifact.format)
    versions = {**report.versions, **artifact.producers}
    recipe = dict(report.configuration.get("recipe", {}))
    versions.pop("system", None)
    return manifest.BundleManifest(
        name=name,
        format=format_,
        application=_application(name, choice),
        model=_model(report, artifact),
        recipe=recipe,
        recipe_digest=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        quantized_digest=artifact.quantized_digest,
        target=report.target,
        runtime=manifest.RuntimeNote(
            name=runtime,
            artifact_format=artifact.format,
            versions=versions,
            pinned=project.pinned(facts, versions),
            licence=facts.licence,
        ),
        requirements=_requirements(report, artifact, format_, runtime, facts),
        context=artifact.context,
        prefill_chunk=artifact.chunk,
        bits_per_weight=artifact.bits_per_weight,
        tokenizer=tokenizer_note(artifact),
        measurements=tuple(_figure(m) for m in report.measurements),
        judgement=manifest.Judgement(
            passed=report.passed,
            made_although_failed=not report.passed,
            checks=tuple(str(check) for check in report.checks),
        ),
        licences=licences(checkpoint_of(report), choice.weights_licence),
        producers={k: v for k, v in versions.items() if v != "not installed"},
        repeatable=facts.repeatable is None,
        repeatable_note=facts.repeatable or "the same run and key give the same bytes",
        signing=_UNSIGNED,
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9._-]+", "-", text).strip("-.")[:80] or "bluelm"


def _application(name: str, choice: Choice) -> manifest.Application:
    package = choice.package or "org.bluelm." + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not re.fullmatch(r"[a-zA-Z]\w*(\.[a-zA-Z]\w*)+", package, re.ASCII):
        raise InputError(f"{package!r} is not an application id", fix="e.g. --package com.example.chat")
    if not re.fullmatch(r"\d+(\.\d+){0,3}", choice.version_name, re.ASCII):
        raise InputError(f"{choice.version_name!r} is not a version", fix="e.g. --version-name 1.2")
    label = (choice.label or name)[:50]
    return manifest.Application(
        id=package, label=label, version_code=choice.version_code, version_name=choice.version_name
    )


def _model(report: Report, artifact: Artifact) -> manifest.Model:
    provenance: dict[str, Any] = report.details.get("provenance") or {}
    folder = checkpoint_of(report)
    return manifest.Model(
        name="bluelm-demo" if folder == demo_checkpoint() else folder.name or "checkpoint",
        architecture=artifact.model.architecture,
        checkpoint_digest=report.inputs.get("checkpoint", ""),
        parameters=artifact.parameters,
        origin={key: str(value) for key, value in (provenance.get("origin") or {}).items() if value},
        signature=str(provenance.get("signature", "not signed")),
    )


def _requirements(
    report: Report, artifact: Artifact, format_: manifest.Format, name: str, facts: project.RuntimeFacts
) -> manifest.Requirements:
    system = project.system_of(name, format_)
    if system == "any":
        system = "ios" if for_apple(report, facts) else "android"
    figure = next((m for m in report.measurements if m.name == "memory_bytes"), None)
    need = figure.value if figure else float(artifact.bytes)
    basis = f"{figure.how}: {figure.note}" if figure else "size of the artifact"
    soc = _only_chip(report, artifact, facts)
    arch = soc.hexagon_arch if soc else None
    return manifest.Requirements(
        os="ios" if system == "ios" else "android",
        min_os=facts.min_ios if system == "ios" else str(facts.min_sdk),
        min_ram_bytes=int(need) + _SYSTEM_BYTES,
        ram_basis=f"{basis}; {_SYSTEM_BYTES} bytes for the system on top",
        soc=soc.id if soc else None,
        soc_aliases=(soc.name, *soc.aliases) if soc else (),
        hexagon_arch=f"v{arch}" if arch else None,
    )


def _only_chip(report: Report, artifact: Artifact, facts: project.RuntimeFacts) -> Soc | None:
    """The chip that the artifact was compiled for; None where any runs it."""
    if not artifact.record.one_chip:
        return None
    name = artifact.soc or str(report.configuration.get("soc"))
    found = next((soc for soc in table().socs if soc.answers_to(name)), None)
    if found is None:
        raise InputError(f"the artifact is for a chip that is not known here: {name}", where=artifact.folder)
    return found


def _figure(measurement: Any) -> manifest.Figure:
    known = {key: value for key, value in asdict(measurement).items() if key in manifest.Figure.model_fields}
    return manifest.Figure(**known)
