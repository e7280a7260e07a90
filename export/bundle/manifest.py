"""manifest.json: what a bundle is, what it was made from, what it needs, and the digest of every file in
it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bluelm.errors import InputError
from bluelm.system.reading import check_record, first_fault
from bluelm.trust.manifest import Sha256

FILE, MLBOM, CERTIFICATE, SIGNATURE = "manifest.json", "mlbom.cdx.json", "signer.pem", "model.sig"
MAX_BYTES = 16 << 20
Format = Literal["apk", "ipa", "xcode", "gradle", "folder"]
Slug = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class Model(_Part):
    """The checkpoint that everything came from."""

    name: str
    architecture: str
    checkpoint_digest: str
    parameters: int | None = None
    origin: dict[str, str] = {}
    signature: str = Field(default="not signed", description="whether the checkpoint's own signature was checked")


class ChatNote(_Part):
    """A chat for apps without Jinja, as the template writes it (`bluelm/text/turns.py`)."""

    first: str = Field(description="in front of the first question")
    answer: str = Field(description="behind a question, so that the model answers")
    next: str = Field(description="between an answer and the next question")
    ends: tuple[str, ...] = Field(description="texts of the tokens that end an answer")


class TokenizerNote(_Part):
    """How text becomes tokens: the file, the chat template and the special tokens."""

    files: tuple[str, ...]
    kind: str
    template: str | None = Field(description="Jinja of a chat; null: none, prompts are completed as text")
    template_note: str = ""
    chat: ChatNote | None = Field(default=None, description="null: no such chat, `chat_note` says why")
    chat_note: str = ""
    marks: tuple[str, ...] = Field(default=(), description="special tokens, which are data in what a user types")
    front: tuple[int, ...] = Field(default=(), description="tokens in front of a text; a template writes its own")
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    vocab_size: int


class RuntimeNote(_Part):
    """What executes the artifact. `versions` are those that made and judged it; a device must match
    `pinned`.
    """

    name: str
    artifact_format: str
    versions: dict[str, str]
    pinned: dict[str, str] = {}
    licence: str = ""


class Requirements(_Part):
    """What a phone must have."""

    os: Literal["android", "ios", "any"]
    min_os: str = Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,4}){0,3}$", description="Android API level, or iOS version")
    min_ram_bytes: int = Field(ge=0)
    ram_basis: str = Field(description="how the memory figure was got")
    soc: str | None = None
    soc_aliases: tuple[str, ...] = ()
    hexagon_arch: str | None = None


class Figure(_Part):
    """One measurement of the report."""

    name: str
    subject: str
    value: float
    unit: str
    how: str
    error: float | None = None
    n: int | None = None
    note: str = ""
    by: str = Field(default="", description="what ran to get it, e.g. a simulator in place of the phone")


class Judgement(_Part):
    """The budget's verdict; a bundle of a failed run exists only because somebody asked for it."""

    passed: bool
    made_although_failed: bool = False
    checks: tuple[str, ...] = ()


class Licences(_Part):
    code: str
    weights: str
    note: str = ""


class Signing(_Part):
    """Whose key signed; a development key proves integrity only."""

    subject: str
    certificate_sha256: Sha256
    development_key: bool
    package_certificate_sha256: Sha256 | None = Field(default=None, description="of the APK's own signature")


class SplitPiece(_Part):
    """Where a part of a file lies in a split APK."""

    apk: str
    entry: str
    bytes: int = Field(ge=0)


class File(_Part):
    """One file of the payload."""

    role: str
    bytes: int = Field(ge=0)
    sha256: Sha256
    pieces: tuple[SplitPiece, ...] = ()


class Application(_Part):
    """Identity on the phone."""

    id: Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_]*(\.[a-zA-Z][a-zA-Z0-9_]*)+$", max_length=200)]
    label: Annotated[str, Field(min_length=1, max_length=50)]
    version_code: int = Field(ge=1, le=2_100_000_000)
    version_name: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){0,3}$", max_length=40)]


class BundleManifest(_Part):
    """All of manifest.json. Whatever is derived (the bill of materials, plists) is derived from this
    alone.
    """

    schema_version: Literal["bluelm-export/bundle/1"] = "bluelm-export/bundle/1"
    name: Slug
    format: Format
    application: Application
    model: Model
    recipe: dict[str, Any]
    recipe_digest: str
    quantized_digest: str
    target: str
    runtime: RuntimeNote
    requirements: Requirements
    context: int = Field(ge=1)
    prefill_chunk: int = Field(ge=1)
    bits_per_weight: float
    tokenizer: TokenizerNote
    measurements: tuple[Figure, ...]
    judgement: Judgement
    licences: Licences
    producers: dict[str, str]
    repeatable: bool
    repeatable_note: str = ""
    signing: Signing
    files: dict[str, File] = {}
    container: dict[str, Sha256] = Field(
        default={}, description="files around the payload; of an executable, what lies before its signature"
    )

    def encode(self) -> bytes:
        """The bytes of manifest.json: sorted, the same for the same content."""
        content = json.loads(self.model_dump_json())
        for figure in content["measurements"]:
            if not figure["by"]:  # as bundles from before there was such a field
                del figure["by"]
        for name in ("chat", "chat_note", "marks"):
            if not content["tokenizer"][name]:
                del content["tokenizer"][name]
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes, where: object) -> BundleManifest:
        """Read manifest.json.

        Raises:
            InputError: not as `encode` writes it.
        """
        try:
            manifest = cls.model_validate_json(check_record(raw.decode(), where))
            same = manifest.encode() == raw
        except (ValidationError, UnicodeError, ValueError) as error:
            reason = first_fault(error) if isinstance(error, ValidationError) else " ".join(str(error).split())[:200]
            raise InputError(f"manifest.json cannot be read: {reason}", where=where) from error
        if not same:
            raise InputError("manifest.json is not as it was written: damaged or changed", where=where)
        return manifest
