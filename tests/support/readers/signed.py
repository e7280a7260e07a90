"""The readers of certificates and time stamps that a signature of a folder is held to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from bluelm.trust.signature import Trust, verify_folder
from bluelm.trust.timestamps import stamped
from tests.support.readers.reader import Reader
from tests.support.trust import certificates, stamps

LEAF, CHAIN, ROOT, SIGNATURE = "leaf.pem", "chain.pem", "root.pem", "model.sig"
STAMP, AUTHORITY = "model.tsr", "time.pem"


@cache
def _files() -> Mapping[str, bytes]:
    """A folder that is signed by certificates of two levels, and the time stamp of its signature."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        (home / "model").mkdir()
        (home / "model" / "config.json").write_text("{}")
        middle = certificates.issue("middle", certificates.ROOT, authority=True, signs=False)
        signature = certificates.sign(home / "model", certificates.issue("leaf", middle), middle, certificates.ROOT)
        (home / ROOT).write_bytes(certificates.ROOT.certificate_pem)
        wanted = ["model/config.json", ROOT, SIGNATURE]
        if shutil.which("openssl"):
            stamps.stamp(home, signature, stamps.stamper())
            wanted += [STAMP, AUTHORITY]
        return {name: (home / name).read_bytes() for name in wanted}


def _verify(folder: Path) -> None:
    verify_folder(folder / "model", folder / SIGNATURE, Trust(certificates=(folder / ROOT,)))


def _stamped(folder: Path) -> None:
    stamped(folder / STAMP, folder / SIGNATURE, [folder / AUTHORITY])


READERS: dict[str, Callable[[], Reader]] = {
    "trusted certificates": lambda: Reader(_files(), ROOT, _verify),
    "signature by certificates": lambda: Reader(_files(), SIGNATURE, _verify),
}
if shutil.which("openssl"):  # tests of stamps tell that it is missing
    READERS |= {
        "time stamp": lambda: Reader(_files(), STAMP, _stamped),
        "certificates of a stamp's authority": lambda: Reader(_files(), AUTHORITY, _stamped),
    }
