"""Writing a MIL program as an .mlpackage: weights streamed into it, the same bytes for the same input."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from export.coreml.ops import Provider

FOLDER = "com.apple.CoreML"
ITEMS = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}


def save_package(program: Any, providers: Mapping[str, Provider], metadata: Mapping[str, str], path: Path) -> None:
    """Write `program` (a MIL program of several functions) to the folder `path`.

    A constant whose weight id is in `providers` is asked for once, written to weights/weight.bin, and let go;
    functions that name the same id share the record. coremltools' own saving holds every weight in memory,
    draws random identifiers for the manifest and writes the day into the metadata; this does not.
    """
    data = path / "Data" / FOLDER
    (data / "weights").mkdir(parents=True)
    model = _model(program, _exporter(program, providers, data / "weights"), metadata)
    (data / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    (path / "Manifest.json").write_text(manifest(), encoding="utf-8")


def outline(program: Any, names: Collection[str], metadata: Mapping[str, str], folder: Path) -> Any:
    """What `save_package` says of the program (a `Model` message), without the numbers of the constants `names`.

    The small ones that nobody streams are written below the folder, which must outlive the result's use.
    """
    (folder / "weights").mkdir(parents=True)
    return _model(program, _exporter(program, dict.fromkeys(names), folder / "weights"), metadata)


def _model(program: Any, streaming: Any, metadata: Mapping[str, str]) -> Any:
    from coremltools import _SPECIFICATION_VERSION_IOS_18
    from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter

    mil_proto = streaming.export()
    streaming.blob_writers.clear()  # closes the file
    exporter = CoreMLProtoExporter(
        program,
        mil_proto,
        predicted_feature_name=None,  # type: ignore[arg-type]
        predicted_probabilities_name=None,  # type: ignore[arg-type]
        classifier_config=None,  # type: ignore[arg-type]
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=_SPECIFICATION_VERSION_IOS_18,
    )
    model: Any = exporter.export(_SPECIFICATION_VERSION_IOS_18)
    model.description.metadata.userDefined.update(dict(metadata))
    return model


def manifest() -> str:
    """Manifest.json with identifiers made from the items' names."""
    entries, identifiers = {}, {}
    for name, description in ITEMS.items():
        identifiers[name] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{FOLDER}/{name}"))
        entries[identifiers[name]] = {
            "author": FOLDER,
            "description": description,
            "name": name,
            "path": f"{FOLDER}/{name}",
        }
    content = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
    return json.dumps(content, indent=4, sort_keys=True) + "\n"


def _exporter(program: Any, providers: Mapping[str, Provider | None], weights: Path) -> Any:
    """coremltools' exporter, but for constants that are streamed, or, without a provider, left out."""
    from coremltools import _SPECIFICATION_VERSION_IOS_18
    from coremltools.converters.mil.backend.mil.helper import (
        _get_offset_by_writing_data,
        create_file_value_tensor,
        types_to_proto_primitive,
    )
    from coremltools.converters.mil.backend.mil.load import MILProtoExporter

    def named(var: Any, offset: int) -> Any:
        return create_file_value_tensor(
            file_name="@model_path/weights/weight.bin",
            offset=offset,
            dim=var.shape,
            data_type=types_to_proto_primitive(var.sym_type.get_primitive()),
        )

    class Streaming(MILProtoExporter):
        def get_milproto_value(self, var: Any) -> Any:
            key: str | None = getattr(var.op, "weight_id", None)
            if key is None or key not in providers:
                return super().get_milproto_value(var)
            if key not in self.weight_id_to_file_value:
                provider = providers[key]
                if provider is None:
                    self.weight_id_to_file_value[key] = named(var, 0)
                    return self.weight_id_to_file_value[key]
                array = provider()
                if array.shape != var.shape or array.dtype != var.val.dtype:
                    found, declared = (array.shape, array.dtype), (var.shape, var.val.dtype)
                    raise ValueError(f"constant {key} is {found}, the program declares {declared}")
                writer = self.get_blob_writer(str(weights / "weight.bin"))
                flat = SimpleNamespace(dtype=var.dtype, val=np.ascontiguousarray(array).reshape(-1))
                self.weight_id_to_file_value[key] = named(var, _get_offset_by_writing_data(flat, writer))
            return self.weight_id_to_file_value[key]

    return Streaming(program, str(weights), _SPECIFICATION_VERSION_IOS_18)
