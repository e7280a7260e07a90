"""Provenance of a run's checkpoint: the digest of every file, and whether it was signed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bluelm.adapters import CONFIG
from bluelm.errors import InputError
from bluelm.trust.manifest import PINNED, FolderManifest, Origin, verify_folder
from bluelm.trust.safety import check_folder
from bluelm.trust.signature import Trust
from bluelm.trust.signature import verify_folder as verify_signature

SIGNATURE = "model.sig"
MOST_CARD = 1 << 16  # characters of a model card that may hold its head


def day(text: str | None) -> datetime | None:
    """The day of --signed-at, at noon UTC.

    Raises:
        InputError: not a day, or one to come.
    """
    if text is None:
        return None
    try:
        found = datetime.strptime(text, "%Y-%m-%d").replace(hour=12, tzinfo=UTC)
    except ValueError as error:
        fix = "e.g. --signed-at 2024-05-31, or of a checkpoint's signature the file of a time stamp"
        raise InputError(f"--signed-at {text!r} is not a day", fix=fix) from error
    if found.date() > datetime.now(UTC).date():
        raise InputError(f"--signed-at {text} is in the future", fix="name the day on which it was signed")
    return found


def about(folder: Path, name: str) -> dict[str, str]:
    """What a checkpoint's model card says, for files that have a place for it.

    Returns:
        `name`, and `license` where README.md begins with YAML that names one, as on the Hugging Face hub.
    """
    told = told_by_card(folder, "license")
    return {"name": name} | ({} if told is None else {"license": told})


def told_by_card(folder: Path, key: str) -> str | None:
    """A word from the YAML that README.md begins with, as on the Hugging Face hub."""
    card = folder / "README.md"
    text = ""
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(MOST_CARD)
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    line = re.search(rf"^{key}:[ \t]*['\"]?([\w.+-]+)['\"]?[ \t]*$", head[1], re.MULTILINE) if head else None
    return line[1] if line else None


def trust_of(
    public_key: Path | None,
    chain: Sequence[Path] | None,
    signed_at: str | None = None,
    stamp_authority: Sequence[Path] | None = None,
) -> Trust | None:
    """Whom to believe, if anybody is named.

    Args:
        signed_at: a day, or the file of a time stamp.

    Raises:
        InputError: a day for certificates, where there are none; a stamp without an authority, or the reverse.
    """
    if signed_at is not None and (public_key or not chain):
        fix = "add --certificate-chain, or omit --signed-at"
        raise InputError("--signed-at would change nothing: no certificate is checked", fix=fix)
    stamp = Path(signed_at) if signed_at is not None and Path(signed_at).is_file() else None
    if bool(stamp) != bool(stamp_authority):
        fix = "give both, --signed-at FILE and --stamp-authority FILE, or a day alone"
        raise InputError("a time stamp and the authority that made it belong together", fix=fix)
    at = None if stamp else day(signed_at)
    found = Trust(public_key, tuple(chain or ()), at, stamp, tuple(stamp_authority or ()))
    return found if public_key or chain else None


def admit(
    checkpoint: Path, trust: Trust | None = None, signature: Path | None = None, required: bool = False
) -> dict[str, Any]:
    """Look at a checkpoint before a run uses it.

    Args: see `check`.

    Returns:
        What the report keeps: the manifest's digest, every file's digest, origin, signature.

    Raises:
        InputError: see `check`.
    """
    origin, said = check(checkpoint, trust, signature, required)
    found = FolderManifest.of(checkpoint)
    return {
        "manifest": found.digest(),
        "files": found.digests(),
        "origin": origin.model_dump(exclude_none=True) if origin else None,
        "signature": said,
    }


def check(
    folder: Path, trust: Trust | None = None, signature: Path | None = None, required: bool = False
) -> tuple[Origin | None, str]:
    """Look at a checkpoint or an adapter before anything is made of it.

    A manifest that `fetch` left in the folder is checked; so is a signature, when somebody to trust is named.

    Args:
        required: `--require-signature`.

    Returns:
        Where it was fetched from, and what is known of its signature.

    Raises:
        InputError: links, pickled code, bombs; files that differ from the manifest or the signature (each is
            named); no valid signature though one is required.
    """
    check_folder(folder)
    origin = None
    if (folder / PINNED).is_file():
        manifest = FolderManifest.open(folder / PINNED)
        verify_folder(folder, manifest, ignore=frozenset({PINNED, SIGNATURE}))
        origin = manifest.origin
    return origin, _signature(folder, trust, signature, required)


def _signature(checkpoint: Path, trust: Trust | None, signature: Path | None, required: bool) -> str:
    path = signature or checkpoint / SIGNATURE
    if trust is None:
        if required:
            fix = "add --public-key FILE or --certificate-chain FILE of whom you trust"
            raise InputError("a signature is required, but nobody to trust is named", fix=fix)
        return "there, not checked" if path.is_file() else "not signed"
    if not path.is_file():
        named = "--public-key and --certificate-chain"
        fix = f"ask its publisher for a model-signing signature; without {named} it is used unchecked"
        what = "adapter" if (checkpoint / CONFIG).is_file() else "checkpoint"
        raise InputError(f"the {what} is not signed", where=path, fix=fix)
    verify_signature(checkpoint, path, trust)
    return f"verified with {trust.public_key or ', '.join(map(str, trust.certificates))}"
