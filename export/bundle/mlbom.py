"""A CycloneDX 1.6 bill of materials for the model (ML-BOM), derived from the manifest alone."""

from __future__ import annotations

import json
import uuid
from typing import Any

from bluelm.errors import InputError, UnavailableError
from export.bundle.manifest import BundleManifest, Figure

_NAMESPACE = uuid.UUID("6f1c0e0e-5d0b-5c53-9a2b-0d6f7b1f2a10")
# Producers by the ecosystem that their package URL names; the rest are named without one.
_PYPI = "torch torchao numpy safetensors sentencepiece onnx onnxruntime executorch coremltools"
_SPDX = ("Apache-2.0", "MIT", "BSD-3-Clause")


def encode(manifest: BundleManifest) -> bytes:
    """mlbom.cdx.json; the serial number follows from the manifest, so that it is repeatable."""
    serial = uuid.uuid5(_NAMESPACE, manifest.encode().decode())
    files = [_file(path, file.sha256) for path, file in sorted(manifest.files.items())]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": _model(manifest)},
        "components": [*_producers(manifest), *files],
        "dependencies": [
            {"ref": "model", "dependsOn": [f"file:{path}" for path in sorted(manifest.files)]},
        ],
    }
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def check(raw: bytes) -> None:
    """Validate against CycloneDX's JSON schema, strictly.

    Raises:
        InputError: what the schema does not allow.
        UnavailableError: the validator is not installed.
    """
    try:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        fix = "pip install 'bluelm-export[bundle]'"
        raise UnavailableError("the CycloneDX validator is missing", fix=fix) from error
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(raw.decode())
    if problem is not None:
        raise InputError(f"the bill of materials breaks its schema: {str(problem)[:300]}", where="mlbom.cdx.json")


def _model(manifest: BundleManifest) -> dict[str, Any]:
    parameters = {
        "task": "text-generation",
        "architectureFamily": "decoder-only transformer",
        "modelArchitecture": manifest.model.architecture,
        "inputs": [{"format": "text"}],
        "outputs": [{"format": "text"}],
    }
    properties = {
        "checkpoint_digest": manifest.model.checkpoint_digest,
        "quantized_digest": manifest.quantized_digest,
        "recipe_digest": manifest.recipe_digest,
        "recipe": json.dumps(manifest.recipe, sort_keys=True, ensure_ascii=False),
        "target": manifest.target,
        "runtime": manifest.runtime.name,
        "bits_per_weight": str(manifest.bits_per_weight),
        "checkpoint_signature": manifest.model.signature,
        **{f"origin.{key}": value for key, value in manifest.model.origin.items()},
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.model.name,
        "version": manifest.application.version_name,
        "licenses": [_licence(manifest.licences.weights)],
        "modelCard": {
            "modelParameters": parameters,
            "quantitativeAnalysis": {"performanceMetrics": [_metric(f) for f in manifest.measurements]},
        },
        "properties": [{"name": f"bluelm-export:{key}", "value": value} for key, value in sorted(properties.items())],
    }


def _metric(figure: Figure) -> dict[str, Any]:
    """One figure; the slice says what was judged and how the figure was got."""
    metric: dict[str, Any] = {
        "type": f"{figure.name} [{figure.unit}]" if figure.unit else figure.name,
        "value": str(figure.value),
        "slice": f"{figure.subject}, {figure.how}" + (f" by {figure.by}" if figure.by else ""),
    }
    if figure.error is not None:
        low, high = figure.value - 1.96 * figure.error, figure.value + 1.96 * figure.error
        metric["confidenceInterval"] = {"lowerBound": str(low), "upperBound": str(high)}
    return metric


def _licence(name: str) -> dict[str, Any]:
    return {"license": {"id": name}} if name in _SPDX else {"license": {"name": name or "unknown"}}


def _producers(manifest: BundleManifest) -> list[dict[str, Any]]:
    known = set(_PYPI.split())
    out: list[dict[str, Any]] = []
    for name, version in sorted(manifest.producers.items()):
        part: dict[str, Any] = {"type": "library", "name": name, "version": version}
        part["bom-ref"] = f"producer:{name}"
        if name in known:
            part["purl"] = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
        out.append(part)
    return out


def _file(path: str, sha256: str) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{path}",
        "name": path,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    }
