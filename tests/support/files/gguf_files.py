"""GGUF files written again with other keys, by gguf-py alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter


def rewrite(path: Path, changes: Mapping[str, Any]) -> None:
    """Give keys other values; None takes a key out. A key that is new is a text or a bool."""
    reader = GGUFReader(path)
    held = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    beside = path.with_name("again.gguf")
    writer = GGUFWriter(beside, held.pop("general.architecture").contents())
    for key in [*held, *(changes.keys() - held.keys())]:
        value = changes[key] if key in changes else held[key].contents()
        if value is None:
            continue
        kind = held[key].types[0] if key in held else GGUFValueType.get_type(value)
        if kind == GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del reader
    beside.replace(path)
