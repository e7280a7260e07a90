"""An artifact: a folder with one runtime's files and artifact.json, which says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, field_validator

from bluelm.config import ModelConfig
from bluelm.errors import InputError
from bluelm.system.files import sha256, write_text
from bluelm.system.reading import first_fault, read_record
from export import formats

Format = str
"""Name of a record in `export/formats`."""
Cache = Literal["float32", "float16", "int16", "int8"]
MANIFEST = "artifact.json"
SIMULATOR = "simulator"
"""Roles that begin with this are files for judging on the host; a phone does not need them."""


class ArtifactFile(BaseModel):
    """One file: path in the folder, what it is for, size and hash.

    Roles: `prefill` and `decode` (graphs), `weights` (external data of both), `context` (compiled for the NPU),
    `program` and `manifest` (of a Core ML package), `methods` (which a program has), `embedding`, `tokenizer`,
    `ranges`, and `simulator...` (see `SIMULATOR`). A model in several parts has a file of each graph's role for each
    part, in order of execution.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    role: str
    bytes: int
    sha256: str


class NodeCount(BaseModel):
    """How many nodes of a graph the NPU took, by operation; quantize pairs and layout are nodes too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_npu: int
    in_graph: int
    kinds: dict[str, int]


class Given(BaseModel):
    """What a vendor's compiler was given, written down as it compiled; its binaries do not tell.

    Attributes:
        compiler: the version that it wrote into its binaries.
        settings: its options, by form ("shipped", "simulator"); where there is one form it is "shipped".
        files: SHA-256 of the graphs and weights that it read, by path in the artifact they are from.
        made: SHA-256 of what was made of them, by path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compiler: str
    settings: dict[str, dict[str, str]]
    files: dict[str, str]
    made: dict[str, str]


class Artifact(BaseModel):
    """What artifact.json says.

    Attributes:
        format: how the files are read: the name of a record.
        model: the model's shape.
        context: tokens that the KV cache and the graphs are laid out for.
        chunk: tokens that the prefill graph takes at once.
        mask_value: what the host adds to the score of a hidden slot.
        cache: type of the KV cache at the graphs' border.
        parameters: weights of the model, embedding and head counted.
        bits_per_weight: of the files that ship, over `parameters`.
        quantized_digest: digest of the quantized checkpoint that it holds.
        producers: tools that made it, with versions.
        target, soc: what it was compiled for.
        nodes: by graph (its file's name without suffix), what the NPU took.
        given: what a vendor's compiler was given; None where none was at work.
        notes: what a reader of the report should know.
        about: what its files say of the model: `name`, `license`, `version`, where they are known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    format: Format
    model: ModelConfig
    context: int
    chunk: int
    mask_value: float
    cache: Cache
    parameters: int
    bits_per_weight: float
    quantized_digest: str
    producers: dict[str, str]
    target: str | None = None
    soc: str | None = None
    nodes: dict[str, NodeCount] = {}
    given: Given | None = None
    notes: tuple[str, ...] = ()
    about: dict[str, str] = {}
    files: tuple[ArtifactFile, ...]
    _folder: Path = PrivateAttr()

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in formats.names():
            raise ValueError(f"unknown format {name!r}; known: {', '.join(formats.names())}")
        return name

    @property
    def record(self) -> formats.Record:
        """What its format is."""
        return formats.record(self.format)

    @property
    def folder(self) -> Path:
        """Where it was opened or saved."""
        return self._folder

    @property
    def bytes(self) -> int:
        """Bytes that ship: all files but the simulator's."""
        return sum(file.bytes for file in self.files if not file.role.startswith(SIMULATOR))

    def path(self, role: str) -> Path:
        """The file of a role; the first where there are several.

        Raises:
            InputError: the artifact has none.
        """
        found = self.paths(role)
        if not found:
            raise InputError(f"the {self.format} artifact has no {role} file", where=self._folder)
        return found[0]

    def paths(self, role: str) -> list[Path]:
        """The files of a role, one a part of the model, in order of execution; empty if there are none."""
        return [self._folder / file.path for file in self.files if file.role == role]

    def save(self, folder: Path) -> None:
        """Write artifact.json into `folder`, where the files lie."""
        write_text(folder / MANIFEST, self.model_dump_json(indent=1) + "\n")
        self._folder = folder

    @staticmethod
    def open(folder: Path) -> Artifact:
        """Read an artifact; `verify` checks the files' contents.

        Raises:
            InputError: no artifact.json, not one of ours, or a file missing or of another size.
        """
        path = Path(folder) / MANIFEST
        if not path.exists():
            raise InputError(f"there is no {MANIFEST}", where=folder, fix="name a folder that bluelm-export made")
        try:
            artifact = Artifact.model_validate_json(read_record(path))
        except ValidationError as error:
            raise InputError(f"{MANIFEST} cannot be read: {first_fault(error)}", where=path) from None
        artifact._folder = Path(folder)
        for file in artifact.files:
            found = artifact._folder / file.path
            if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
                raise InputError(f"{MANIFEST} names a file outside its folder: {file.path}", where=path)
            if not found.is_file() or found.stat().st_size != file.bytes:
                raise InputError("a file of the artifact is missing or cut", where=found, fix="export it again")
        return artifact

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            InputError: a file was changed.
        """
        for file in self.files:
            if sha256(self._folder / file.path) != file.sha256:
                raise InputError(
                    "a file of the artifact was changed",
                    where=self._folder / file.path,
                    fix="export it again",
                )


def list_files(folder: Path, roles: dict[str, str]) -> tuple[ArtifactFile, ...]:
    """Entries of the files at `roles` (path -> role), in that order."""
    return tuple(
        ArtifactFile(path=path, role=role, bytes=(folder / path).stat().st_size, sha256=sha256(folder / path))
        for path, role in roles.items()
    )


def find_source(artifact: Artifact) -> Artifact | None:
    """The artifact in the same run folder that a compiled one was made from: its format's source, with the same
    quantized checkpoint. None if there is none."""
    for path in sorted(artifact.folder.resolve().parent.glob(f"*/{MANIFEST}")):
        other = Artifact.open(path.parent)
        if other.format == artifact.record.compiled_from and other.quantized_digest == artifact.quantized_digest:
            return other.model_copy(update={"soc": artifact.soc})
    return None


def source_of(artifact: Artifact) -> Artifact:
    """`find_source`.

    Raises:
        InputError: it is not there.
    """
    found = find_source(artifact)
    if found is None:
        raise InputError(
            "a compiled artifact does not show its blocks, and the ONNX artifact it was made from is not here",
            where=artifact.folder,
            fix="compare the run folder that holds both, or the onnx-npu artifact itself",
        )
    return found
