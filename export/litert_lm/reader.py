"""Reading a .litertlm back, with the schema's own classes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from litert_lm_builder import litertlm_core
from litert_lm_builder import litertlm_header_schema_py_generated as schema
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from bluelm.errors import InputError
from bluelm.system.reading import MOST_TABLE_BYTES, open_regular, parse_json
from export.artifacts.tables import read_tables
from export.litert.reader import LitertFile

MOST_HEADER = 1 << 20
MOST_SECTIONS = 64
FIX = "export it again"
MODEL, TOKENIZER, METADATA = "TFLiteModel", "HF_Tokenizer_Zlib", "LlmMetadataProto"
"""Kinds of sections, as the schema calls them."""
_pb2: Any = llm_metadata_pb2  # generated at run time


@dataclass(frozen=True)
class Held:
    """A section: its kind by the schema's name, what the header says of it, and where its bytes lie."""

    kind: str
    items: Mapping[str, str]
    begin: int
    end: int


class LitertLmFile:
    """A file's header and sections.

    Attributes:
        version: of the container. entries: what the header says of the whole. sections: in the header's order.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            InputError: no .litertlm, or a damaged one.
        """
        self.path = path
        try:
            with open_regular(path) as file:
                start = file.read(litertlm_core.HEADER_BEGIN_BYTE_OFFSET)
                if not start.startswith(litertlm_core.HEADER_MAGIC_BYTES):
                    raise ValueError("its first bytes are not those of one")
                at = litertlm_core.HEADER_END_LOCATION_BYTE_OFFSET
                size = int.from_bytes(start[at:], "little") - len(start)
                if len(start) < litertlm_core.HEADER_BEGIN_BYTE_OFFSET or not 0 < size <= MOST_HEADER:
                    raise ValueError(f"a header of {size} bytes")
                header = file.read(size)
                self._bytes = file.seek(0, 2)
            self.version = tuple(int.from_bytes(start[8 + 4 * i : 12 + 4 * i], "little") for i in range(3))
            self.entries, self.sections = read_tables(lambda: _header(header), len(header))
            for one in self.sections:
                if not 0 < one.begin <= one.end <= self._bytes:
                    raise ValueError(f"the section {one.kind} leaves the file")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"not a .litertlm file: {error}", where=path, fix=FIX) from None

    def only(self, kind: str) -> Held:
        """The section of a kind.

        Raises:
            InputError: there is none, or there are several.
        """
        found = [one for one in self.sections if one.kind == kind]
        if len(found) != 1:
            raise InputError(f"{len(found)} sections of the kind {kind} instead of one", where=self.path, fix=FIX)
        return found[0]

    def content(self, section: Held) -> bytes:
        """Its bytes; of those that are read as a whole.

        Raises:
            InputError: more than such a section holds.
        """
        if section.end - section.begin > MOST_TABLE_BYTES:
            raise InputError(f"the section {section.kind} is too long", where=self.path, fix=FIX)
        with open_regular(self.path) as file:
            file.seek(section.begin)
            return file.read(section.end - section.begin)

    def model(self, blocks: int | None = None) -> LitertFile:
        """The .tflite in it, of so many blocks at most.

        Raises:
            InputError: there is none, or a damaged one.
        """
        section = self.only(MODEL)
        return LitertFile(self.path, blocks, section.begin, section.end - section.begin)

    def tokenizer(self) -> bytes:
        """tokenizer.json.

        Raises:
            InputError: there is none, or a damaged one.
        """
        packed = self.content(self.only(TOKENIZER))
        size, reader = int.from_bytes(packed[:8], "little"), zlib.decompressobj()
        try:
            found = reader.decompress(packed[8:], MOST_TABLE_BYTES)
        except zlib.error as error:
            raise InputError(f"the tokenizer cannot be unpacked: {error}", where=self.path, fix=FIX) from None
        if not reader.eof or reader.unused_data or len(found) != size:
            raise InputError("the tokenizer is not as long as it says", where=self.path, fix=FIX)
        return found

    def table(self) -> dict[str, Any]:
        """The same as JSON."""
        return parse_json(self.tokenizer().decode(errors="replace"), self.path)

    def metadata(self) -> Any:
        """`LlmMetadata`.

        Raises:
            InputError: there is none, or a damaged one.
        """
        told = _pb2.LlmMetadata()
        try:
            told.ParseFromString(self.content(self.only(METADATA)))
        except DecodeError as error:
            raise InputError(f"the metadata cannot be read: {error}", where=self.path, fix=FIX) from None
        return told


def _header(data: bytes) -> tuple[dict[str, str], list[Held]]:
    """Entries and sections.

    Raises:
        ValueError: it says something twice, or in another way than by texts.
    """
    root: Any = schema.LiteRTLMMetaData.GetRootAs(data)
    whole, parts = root.SystemMetadata(), root.SectionMetadata()
    sections: list[Held] = []
    for at in range(parts.ObjectsLength()):
        one = parts.Objects(at)
        kind = litertlm_core.any_section_data_type_to_string(one.DataType())
        sections.append(Held(kind, _items(one.Items, one.ItemsLength()), one.BeginOffset(), one.EndOffset()))
    return _items(whole.Entries, whole.EntriesLength()), sections


def _items(pair: Callable[[int], Any], count: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for at in range(count):
        key, text = pair(at).Key().decode(), schema.StringValue()
        if pair(at).ValueType() != schema.VData.StringValue or key in found:
            raise ValueError(f"it says {key!r} twice, or by no text")
        table = pair(at).Value()
        text.Init(table.Bytes, table.Pos)
        found[key] = (text.Value() or b"").decode()
    return found
