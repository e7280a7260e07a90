"""Core ML on a Mac: compiling a package, and running it on a chosen compute unit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bluelm.errors import InputError, TargetError, UnavailableError
from bluelm.system.children import run
from export.coreml.importing import import_coremltools
from export.coreml.package import Package, value_type
from export.coreml.program import DECODE, PREFILL

UNITS = {
    "cpu": "CPU_ONLY",
    "gpu": "CPU_AND_GPU",
    "ane": "CPU_AND_NE",
    "all": "ALL",
}  # --on: coremltools' name


def require_mac(what: str) -> None:
    """
    Raises:
        UnavailableError: this is not macOS.
    """
    if sys.platform != "darwin":
        raise UnavailableError(
            f"{what} needs macOS, this is {sys.platform}",
            fix="run it on a Mac, or use --on interpreter, which runs the same package anywhere",
        )


def compile_package(package: Path, folder: Path) -> Path:
    """Compile to `folder`/<name>.mlmodelc with coremlcompiler; an app can also do this on the device.

    Raises:
        UnavailableError: not macOS, or no Xcode.
        TargetError: the compiler refuses the package.
    """
    require_mac("coremlcompiler")
    if shutil.which("xcrun") is None:
        raise UnavailableError("xcrun is not installed", fix="install Xcode and its command line tools")
    command = ["xcrun", "coremlcompiler", "compile", str(package), str(folder)]
    try:
        done = run(command, "coremlcompiler", limit_s=3600)
    except subprocess.TimeoutExpired as error:
        raise TargetError("coremlcompiler did not end within an hour", where=package) from error
    compiled = folder / f"{package.stem}.mlmodelc"
    if done.returncode != 0 or not compiled.is_dir():
        said = (done.stderr or done.stdout).strip()[-500:]
        raise TargetError(f"coremlcompiler refuses the package: {said}", where=package)
    return compiled


class MacModels:
    """Functions of a package under Apple's own runtime, through coremltools, on one compute unit.

    Raises:
        InputError: an unknown unit.
        UnavailableError: not macOS, or Apple's framework cannot be loaded.
        TargetError: Core ML refuses the package on this unit.
    """

    def __init__(self, package: Path, unit: str, functions: Iterable[str]) -> None:
        if unit not in UNITS:
            raise InputError(f"no compute unit {unit!r}", fix=f"known: {', '.join(UNITS)}")
        require_mac(f"running on {unit}")
        ct = import_coremltools()
        self._models: dict[str, Any] = {}
        for name in functions:
            try:
                self._models[name] = ct.models.MLModel(
                    str(package), compute_units=getattr(ct.ComputeUnit, UNITS[unit]), function_name=name
                )
            except RuntimeError as error:
                raise TargetError(f"Core ML refuses {name} on {unit}: {error}", where=package) from error

    def make_state(self, function: str) -> Any:
        """Empty states, for every function that names the same ones."""
        return self._models[function].make_state()

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None) -> Mapping[str, np.ndarray]:
        """Outputs by name; the state carries over."""
        kept = {} if state is None else {"state": state}
        return self._models[function].predict(dict(inputs), **kept)


class MacEngine:
    """A package of ours under Apple's own runtime; an `Engine` of `CoreMLRuntime`. Raises as `MacModels`."""

    def __init__(self, package: Path, unit: str) -> None:
        self._models = MacModels(package, unit, (PREFILL, DECODE))
        self._declared = Package.open(package).functions
        self.reset()

    def reset(self) -> None:
        self._state = self._models.make_state(PREFILL)

    def inputs(self, function: str) -> Mapping[str, tuple[int | None, ...]]:
        kinds = {value.name: value_type(value.type) for value in self._declared[function].inputs}
        return {name: kind.shape or () for name, kind in kinds.items() if not kind.state}

    def run(self, function: str, inputs: Mapping[str, np.ndarray], watch: Collection[str]) -> Mapping[str, np.ndarray]:
        return self._models.predict(function, inputs, self._state)  # a debug build's outputs too
