"""A folder in one piece, as ExecuTorch's Core ML delegate keeps its package: bytes of files, then a table of contents.

The table is JSON, written backwards so that it is read from the end: nodes (kind 0 a file, 1 a folder) with their name,
where their bytes lie, and their children's places among the nodes; the last is the folder itself
(inmemory_filesystem.cpp in backends/apple/coreml/runtime). ExecuTorch's own `unflatten_directory_contents` writes
wherever a name leads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bluelm.errors import InputError
from bluelm.trust.paths import check_name

MOST_TABLE = 1 << 20  # bytes; a package has a handful of files
MOST_DEPTH = 16


def unflatten(content: bytes, folder: Path, where: object) -> None:
    """Write the files into `folder`, below the flattened folder's own name.

    Raises:
        InputError: there is no such table, or it names places outside the folder or the bytes.
    """
    try:
        nodes = _table(content)
        for name, data in _files(nodes, len(nodes) - 1, content, 0, set()):
            check_name(name, where)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the package in the program cannot be unpacked: {error}", where=where) from None


def _table(content: bytes) -> list[Any]:
    text = content[-MOST_TABLE:][::-1].decode("utf-8", "replace")
    return json.JSONDecoder().raw_decode(text)[0]["nodes"]


def _files(
    nodes: list[Any], index: int, content: bytes, depth: int, seen: set[int]
) -> Iterator[tuple[str, memoryview]]:
    """Path and bytes of every file below a node."""
    if index in seen or not 0 <= index < len(nodes) or depth > MOST_DEPTH:
        raise ValueError("its folders lead in a circle, nowhere, or too deep")
    seen.add(index)
    node = nodes[index]
    if node["kind"] == 0:
        start, size = node["dataRegion"]["offset"], node["dataRegion"]["size"]
        if not 0 <= start <= start + size <= len(content):
            raise ValueError(f"a file lies at {start}, of {size} bytes")
        yield node["name"], memoryview(content)[start : start + size]
        return
    if node["kind"] != 1:
        raise ValueError(f"a node of the kind {node['kind']}")
    for name, child in node["children"].items():
        if nodes[child]["name"] != name or "/" in name:
            raise ValueError(f"{name!r} is the name of another file")
        for below, data in _files(nodes, child, content, depth + 1, seen):
            yield f"{node['name']}/{below}", data
