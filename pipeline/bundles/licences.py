"""Under which licence a bundle's weights are: what the checkpoint says, never a guess."""

from __future__ import annotations

from pathlib import Path

from bluelm.system.files import demo_checkpoint
from export.bundle.manifest import Licences
from pipeline.run.provenance import told_by_card

CODE = "Apache-2.0"
NOT_KNOWN = "not known"
FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "MODEL_LICENSE", "MODEL_LICENSE.pdf")


def licences(checkpoint: Path, named: str | None) -> Licences:
    """Of a bundle's code and weights.

    Args:
        checkpoint: the folder. named: by the user.
    """
    if named:
        return Licences(code=CODE, weights=named, note="as --weights-licence names it")
    if checkpoint == demo_checkpoint():
        return Licences(code=CODE, weights="Apache-2.0", note="the small model that ships with the tool")
    if told := _of_card(checkpoint):
        return Licences(code=CODE, weights=told, note="as the checkpoint's README.md names it")
    if texts := licence_files(checkpoint):
        told = ", ".join(f"LICENSES/weights-{path.name}" for path in texts)
        return Licences(code=CODE, weights=f"see {told}", note="the texts that came with the checkpoint")
    note = "the checkpoint names none; say which with --weights-licence"
    return Licences(code=CODE, weights=NOT_KNOWN, note=note)


def _of_card(checkpoint: Path) -> str | None:
    """ "other" is the hub's word where it has none, and `license_name` beside it the licence's own."""
    told = told_by_card(checkpoint, "license")
    return told_by_card(checkpoint, "license_name") if told == "other" else told


def licence_files(checkpoint: Path) -> list[Path]:
    """The texts that came with a checkpoint."""
    paths = (checkpoint / name for name in FILES)
    return [path for path in paths if path.is_file() and not path.is_symlink()]
