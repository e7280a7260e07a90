"""Every way of tampering, and which bundles it is done to."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.tampering.case import ARCHIVES, FOLDERS, FORMATS, Case
from tests.support.tampering.contents import (
    _add,
    _append,
    _append_entry,
    _bytes,
    _comment,
    _cut,
    _drop,
    _entries,
    _exchange,
    _insert,
    _lay_in,
    _link,
    _move,
    _nothing,
    _pipe,
    _remove,
    _rename,
    _rename_entry,
    _set,
    _shuffle,
    _splits,
    _structure,
    _swap_files,
    _truncate,
    _zeros,
    flip,
)
from tests.support.tampering.signed import (
    _certificate,
    _edit_manifest,
    _his_signature,
    _package_signed_again,
    _rewrapped,
    _signed_again,
)

# --- harmless --------------------------------------------------------------------------------------------------------


def _touch(case: Case) -> None:
    for path in case.files:
        os.utime(path, (case.draw.randrange(10**9), case.draw.randrange(10**9)))


def _rename_bundle(case: Case) -> None:
    case.path.rename(case.path.with_name(f"renamed-{case.path.name}"))


def _rights(case: Case) -> None:
    for path in case.files:
        path.chmod(case.draw.choice((0o600, 0o755, 0o444)))


@dataclass(frozen=True)
class Tampering:
    """One kind.

    Attributes:
        name: in words.
        kinds: the formats that it can be done to.
        harmless: why it need not be found; "" if it must be.
        weight: how often it is drawn.
    """

    name: str
    do: Callable[[Case], None]
    kinds: tuple[str, ...] = FORMATS
    harmless: str = ""
    weight: int = 2


CHANGES = {
    "a bit flipped": flip, "a byte set": _set, "bytes inserted": _insert, "bytes cut out": _cut,
    "cut off": _truncate, "bytes appended": _append, "bytes zeroed": _zeros, "bytes moved": _move,
}  # fmt: skip
LIES = ("none", "owner's", "certificate_sha256", "package_certificate_sha256")
TAMPERINGS: tuple[Tampering, ...] = (
    *(Tampering(name, _bytes(change), weight=3) for name, change in CHANGES.items()),
    *(
        Tampering(f"{name}, outside the weights", _structure(change), ARCHIVES, "", 3)
        for name, change in CHANGES.items()
    ),
    Tampering("packed anew", _entries(_nothing), ARCHIVES),
    Tampering("packed anew, compressed", _entries(_nothing, compression=zipfile.ZIP_DEFLATED), ARCHIVES),
    Tampering("an entry removed", _entries(_drop), ARCHIVES),
    Tampering("an entry added", _entries(_add), ARCHIVES),
    Tampering("an entry renamed", _entries(_rename_entry), ARCHIVES),
    Tampering("two entries exchanged", _entries(_exchange), ARCHIVES),
    Tampering("entries in another order", _entries(_shuffle), ARCHIVES),
    Tampering("an archive comment", _comment, ARCHIVES),
    Tampering("an entry appended", _append_entry, ARCHIVES),
    Tampering("a file removed", _remove, FOLDERS, "", 4),
    Tampering("a file renamed", _rename, FOLDERS, "", 4),
    Tampering("a file laid in", _lay_in, FOLDERS, "", 4),
    Tampering("a symbolic link", _link, FOLDERS),
    Tampering("two files exchanged", _swap_files, FOLDERS, "", 4),
    Tampering("a pipe in place of a file", _pipe, FOLDERS),
    Tampering("a split away, twice or renamed", _splits, ("split apks",), "", 4),
    Tampering("a value of the manifest", _edit_manifest(False), weight=4),
    Tampering("a value of the manifest, the bill of materials too", _edit_manifest(True), weight=4),
    Tampering("another certificate", _certificate, weight=3),
    Tampering("the attacker's model.sig", _his_signature, weight=3),
    Tampering("the owner's payload in another package", _rewrapped),
    Tampering("the package signed by the attacker", _package_signed_again, ("apk", "split apks")),
    *(Tampering(f"made by the attacker, signer's digest told: {lie}", _signed_again(lie), weight=1) for lie in LIES),
    Tampering("other time stamps of files", _touch, harmless="no time stamp is part of a bundle", weight=1),
    Tampering("the bundle renamed", _rename_bundle, harmless="its name is not signed", weight=1),
    Tampering("other rights of files", _rights, FOLDERS, "rights are not signed; the tool runs nothing of it", 1),
)


def tamper(case: Case, what: Tampering) -> Path:
    """Do it; the bundle's path afterwards."""
    what.do(case)
    return next(p for p in sorted(case.path.parent.iterdir()) if p.name != "elsewhere")
