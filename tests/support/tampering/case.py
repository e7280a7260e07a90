"""A small bundle of each format, made, signed and copied."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from export.bundle import build, payload
from export.bundle.android import apk
from export.bundle.manifest import Format
from tests.support import bundles

FORMATS: tuple[str, ...] = ("apk", "split apks", "ipa", "folder", "gradle", "xcode")
WEIGHTS = dict(bundles.FILES) | {"artifact/weights.bin": bytes(range(256)) * 200}
ARCHIVES = ("apk", "split apks", "ipa")
FOLDERS = ("folder", "gradle", "xcode")
CAP = apk.RESERVE + 40_000  # of an APK: the weights are cut in two, the rest lies in the base or a split of its own


@dataclass(frozen=True)
class Case:
    """A copied bundle, and who is who."""

    path: Path
    kind: str
    draw: random.Random
    owner: payload.Keys
    attacker: payload.Keys

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())

    @property
    def home(self) -> Path:
        """Where the payload lies, in a folder."""
        return self.path / build.HOMES[_format(self.kind)]


def _format(kind: str) -> Format:
    return "apk" if kind == "split apks" else kind  # pyright: ignore[reportReturnType]


def make(kind: str, out: Path, signing: payload.Keys, files: dict[str, bytes] | None = None) -> Path:
    """A small bundle of one of `FORMATS`."""
    if kind != "split apks":
        return bundles.make(_format(kind), out, signing, WEIGHTS if files is None else files)
    inputs = bundles.inputs(WEIGHTS if files is None else files)
    return build.make(bundles.draft("apk"), inputs, signing, out, build.Options(cap=CAP))


def copied(path: Path, place: Path) -> Path:
    """A bundle's copy below an empty folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    target = place / path.name
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)
    return target
