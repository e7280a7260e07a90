"""Projects to build a chat app from: Gradle (Kotlin) and Xcode (SwiftUI), rendered from templates.

Templates lie in `templates/<format>/`; a name that ends in `.j2` is rendered by Jinja, the rest is copied.
A name with `__engine_X__` is taken for engine X alone, what lies in a folder `__loop__` for runtimes that have no API
for language models, so that the app has a tokenizer and a loop of its own. Runtimes and their versions come from
`data/runtimes.yaml` and from the versions that made and judged the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.sax.saxutils import escape

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from bluelm.errors import InputError, TargetError
from export.bundle.manifest import BundleManifest, Format
from export.formats import Without, record

TEMPLATES = Path(__file__).parent / "templates"
_TABLE = Path(__file__).parent / "data" / "runtimes.yaml"


class Library(BaseModel):
    """A dependency of the app: Maven coordinates, and which producer's version it takes.

    Attributes:
        releases, layout: where its archive lies, and how it is called there, if not in Google's repository or Central.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    maven: str
    version_of: str
    licence: str
    releases: str | None = None
    layout: str | None = None


class SwiftPackage(BaseModel):
    """Where Xcode gets a library.

    Attributes:
        branch, version_of: each version is a branch of its own, and the artifact's is taken.
        version, revision: else this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    url: str
    branch: str | None = None
    version_of: str | None = None
    version: str | None = None
    revision: str | None = None
    products: tuple[str, ...]


class RuntimeFacts(BaseModel):
    """What a bundle must know of a runtime.

    Attributes:
        engine: name of the Kotlin or Swift engine template.
        chats: what the app does for a chat: a `loop` over tokens of its own, `text` in the runtime's language-model
            API, or `messages`, which that API renders by the model's template.
        android: libraries from Maven; empty where there are none.
        no_app: why no project is made around it.
        hexagon: runs on Qualcomm's NPU, whose libraries must lie on disk.
        swift_packages: libraries that Xcode fetches. xcode: the oldest that builds them.
        kotlin, gradle: versions that build the Android project.
        min_sdk, min_ios: oldest systems that the libraries take.
        pins: producers whose version a phone's runtime must have.
        implies: further versions that a producer's version brings.
        repeatable: None, or why a vendor's compiler gives other bytes at each call.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    os: Annotated[str, Field(pattern="^(android|ios|any)$")]
    engine: str
    chats: Literal["loop", "text", "messages"] = "loop"
    android: tuple[Library, ...] = ()
    swift_packages: tuple[SwiftPackage, ...] = ()
    xcode: str = "16"
    kotlin: str = "2.1.20"
    gradle: str = "8.11.1"
    no_app: str | None = None
    hexagon: bool = False
    min_sdk: int = 24
    min_ios: str = "16.0"
    licence: str
    pins: tuple[str, ...] = ()
    implies: dict[str, dict[str, str]] = {}
    repeatable: str | None = None


@cache
def runtimes() -> dict[str, RuntimeFacts]:
    """The table of runtimes."""
    return {name: RuntimeFacts(**facts) for name, facts in yaml.safe_load(_TABLE.read_text("utf-8")).items()}


def pinned(facts: RuntimeFacts, versions: Mapping[str, str]) -> dict[str, str]:
    """The versions, of those that made the artifact, that a phone's runtime must have."""
    known = {name: version.partition("+")[0] for name, version in versions.items()}
    for name, version in list(known.items()):
        known |= facts.implies.get(f"{name} {version}", {})
    return {name: known[name] for name in facts.pins if known.get(name, "not installed") != "not installed"}


def runtime_of(artifact_format: str) -> tuple[str, RuntimeFacts]:
    """The runtime that executes artifacts of a format.

    Raises:
        TargetError: no phone's runtime does.
    """
    app = record(artifact_format).app
    if isinstance(app, Without):
        raise TargetError(f"no runtime on a phone executes {artifact_format!r}: {app.reason}")
    return app, runtimes()[app]


def render(manifest: BundleManifest) -> dict[str, bytes]:
    """Every file of the project around the payload, by path.

    Raises:
        TargetError: the runtime does not exist on that system, or an app cannot get it there.
    """
    facts = runtimes()[manifest.runtime.name]
    name = manifest.runtime.name
    system = system_of(name, manifest.format)
    if not has_app(facts, system):
        fix = (
            f"use --format {'apk' if system == 'android' else 'ipa'} or folder, and load the model from an app of yours"
        )
        reason = facts.no_app or f"no library of it for {system} is known"
        raise TargetError(f"no app around {name} can be generated: {reason}", fix=fix)
    home = TEMPLATES / manifest.format
    paths = sorted(path for path in home.rglob("*") if path.is_file())
    found = {name: path for path in paths if (name := _name(path.relative_to(home).as_posix(), facts))}
    swift = [Path(name).stem for name in sorted(found) if name.endswith(".swift")]
    values = _values(manifest, facts) | {"sources": swift}
    out: dict[str, bytes] = {}
    for name, path in found.items():
        if name.endswith(".j2"):
            template = _jinja().get_template(path.relative_to(TEMPLATES).as_posix())
            out[name.removesuffix(".j2")] = template.render(values).encode()
        else:
            out[name] = path.read_bytes()
    return out


def _name(template: str, facts: RuntimeFacts) -> str | None:
    """A template's name in the project of a runtime; None where it is not part of it."""
    kept: list[str] = []
    for part in template.split("/"):
        if part.startswith("__"):
            kind, part = part[2:].split("__", 1)
            if kind not in (f"engine_{facts.engine}", facts.chats):
                return None
        if part:  # a folder may be named by its kind alone
            kept.append(part)
    return "/".join(kept)


def system_of(name: str, format_: Format) -> str:
    """The system that a bundle of a format is for: android, ios, or what the runtime needs of a folder.

    Raises:
        TargetError: the runtime does not exist there.
    """
    needs = runtimes()[name].os
    system = {"apk": "android", "gradle": "android", "ipa": "ios", "xcode": "ios"}.get(format_, needs)
    if needs not in (system, "any"):
        fix = "choose another format, or export for another target"
        raise TargetError(f"{name} has no runtime for {system}", fix=fix)
    return system


def has_app(facts: RuntimeFacts, system: str) -> bool:
    """Whether a project can be made: the app gets the runtime from a package registry or has it from its system."""
    if facts.no_app:
        return False
    return bool(facts.android) if system == "android" else bool(facts.swift_packages) or facts.os == "ios"


@cache
def _jinja() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["xml"] = lambda text: escape(str(text), {'"': "&quot;", "'": "\\'"})
    environment.filters["string"] = lambda text: json.dumps(str(text), ensure_ascii=False).replace("$", "\\$")
    return environment


def _values(manifest: BundleManifest, facts: RuntimeFacts) -> dict[str, Any]:
    """What templates may use; `dependencies` are pinned to the versions that judged the artifact, and `built_with`
    names them for `bluelm-export install`.
    """
    versions = manifest.runtime.pinned
    return {
        "app": manifest.application,
        "manifest": manifest,
        "runtime": manifest.runtime.name,
        "engine": facts.engine,
        "hexagon": facts.hexagon,
        "min_sdk": facts.min_sdk,
        "min_ios": manifest.requirements.min_os,
        "dependencies": [
            f"{lib.maven}:{_version(lib.version_of, versions)}{'@aar' if lib.releases else ''}" for lib in facts.android
        ],
        "releases": [lib for lib in facts.android if lib.releases],
        "built_with": "".join(f"+{x.version_of}={_version(x.version_of, versions)}" for x in facts.android),
        "packages": [_package(package, versions) for package in facts.swift_packages],
        "xcode": facts.xcode,
        "kotlin": facts.kotlin,
        "gradle": facts.gradle,
    }


def _package(package: SwiftPackage, versions: Mapping[str, str]) -> dict[str, Any]:
    """As Xcode's project file names a package, and as people do."""
    if package.branch is not None and package.version_of is not None:
        kind, name, at = "branch", "branch", package.branch.format(version=_version(package.version_of, versions))
    elif package.revision is not None:
        kind, name, at = "revision", "revision", package.revision
    else:
        kind, name, at = "exactVersion", "version", package.version
    requirement = {"kind": kind, name: at}
    return {"url": package.url, "at": at, "products": package.products, "requirement": requirement}


def _version(name: str, versions: Mapping[str, str]) -> str:
    if name not in versions:
        fix = "make the run again with this version of bluelm-export"
        raise InputError(f"the artifact does not say which version of {name} made it", fix=fix)
    return versions[name]
