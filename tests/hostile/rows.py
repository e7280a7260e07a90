"""Which hostile input goes to which reader of `tests/support/readers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hostile import binaries, certificates, files, graphs, packages, programs, records, tables, texts
from tests.support.readers import READERS, Reader

Put = Callable[[Path, bytes], None]
YAML_READERS = ("recipe", "budget", "recipe of single linears", "budget of targets and sizes", "runner configuration")
JINJA: dict[str, binaries.Change] = {name: lambda valid, data=data: data for name, data in texts.JINJA.items()}
IN_A_CONFIG = {name: texts.in_a_config(data) for name, data in texts.JINJA.items()}
FORMATS: dict[str, dict[str, binaries.Change]] = {
    "safetensors": binaries.SAFETENSORS,
    "GPTQ tensors": binaries.SAFETENSORS,
    "AWQ tensors": binaries.SAFETENSORS,
    "compressed-tensors tensors": binaries.SAFETENSORS,
    "adapter tensors": binaries.SAFETENSORS,
    "embedding": binaries.SAFETENSORS,
    "quantized tensors": binaries.SAFETENSORS,
    "chat template": JINJA,
    "another chat template": JINJA,
    "chat template of the config": IN_A_CONFIG,
    "named chat templates": IN_A_CONFIG,
    "task data csv": records.CSV,
    "task data without heading": records.CSV,
    "task data jsonl": binaries.JSONL,
    "task data gz": records.GZIPPED,
    "task data parquet": binaries.PARQUET,
    "answers to tasks": binaries.JSONL,
    "stage record": records.RECORDS,
    "trusted certificates": certificates.PEM,
    "certificates of a stamp's authority": certificates.PEM,
    "time stamp": certificates.ASN1,
    "signature by certificates": certificates.SIGNATURES,
    "torch file": binaries.PICKLES,
    "folder with a torch file": binaries.PICKLES,
    "calibration parquet": binaries.PARQUET,
    "calibration jsonl": binaries.JSONL,
    "history": binaries.SQLITE,
    "apk": binaries.ZIPS,
    "ipa": binaries.ZIPS,
    "ONNX graph": graphs.ONNX,
    "LiteRT": tables.TFLITE,
    "Core ML manifest": packages.MANIFEST,
    "Core ML program": packages.MLMODEL,
    "Core ML weights": packages.BLOBS,
    "ExecuTorch": programs.PTE,
    "folder in a program": programs.FLATTENED,
}
SLOW = ("GPTQ tensors", "AWQ tensors", "compressed-tensors tensors", "quantized manifest", "quantized tensors")
"""Readers of which one input takes a good part of a second: of each family some must do."""
FEW = 40


@dataclass(frozen=True)
class Row:
    """One family of inputs for one reader.

    Attributes:
        inputs: names, and what puts each in the place of the reader's target.
    """

    reader: str
    family: str
    inputs: Callable[[Reader], Iterator[tuple[str, Put]]]

    @property
    def name(self) -> str:
        return f"{self.reader}: {self.family}"


def _any(reader: Reader) -> Iterator[tuple[str, Put]]:
    yield from files.ANY.items()


def _written(data: bytes) -> Put:
    return _changed(lambda valid: data)


def _changed(change: binaries.Change) -> Put:
    def put(path: Path, valid: bytes) -> None:
        path.write_bytes(change(valid))

    return put


def _changes(table: dict[str, binaries.Change]) -> Callable[[Reader], Iterator[tuple[str, Put]]]:
    def inputs(reader: Reader) -> Iterator[tuple[str, Put]]:
        for name, change in table.items():
            yield name, _changed(change)

    return inputs


def _json(values: list[object]) -> Callable[[Reader], Iterator[tuple[str, Put]]]:
    def inputs(reader: Reader) -> Iterator[tuple[str, Put]]:
        for name, make in texts.json_with(reader.seed, values):
            yield name, _changed(lambda valid, make=make: make())

    return inputs


def _given(table: dict[str, bytes]) -> Callable[[Reader], Iterator[tuple[str, Put]]]:
    def inputs(reader: Reader) -> Iterator[tuple[str, Put]]:
        for name, data in table.items():
            yield name, _written(data)

    return inputs


def is_json(reader: Reader) -> bool:
    """Whether the reader's target is a JSON object."""
    try:
        return isinstance(json.loads(reader.seed), dict)
    except ValueError:
        return False


def rows() -> list[Row]:
    """All of them."""
    found: list[Row] = []
    for name, make in READERS.items():
        found.append(Row(name, "files", _any))
        if name in FORMATS:
            found.append(Row(name, "its format", _changes(FORMATS[name])))
        if name in YAML_READERS:
            found.append(Row(name, "YAML", _given(texts.YAML)))
        elif is_json(make()):
            found += [Row(name, family, _json(values)) for family, values in texts.VALUES.items()]
            found.append(Row(name, "JSON", _given(texts.JSON_TEXTS)))
    return found
