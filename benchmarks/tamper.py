"""Two thousand tamperings with bundles of every format, and what `verify --certificate OWNER` says of each.

    python -m benchmarks.tamper [--count 2100] [--seed 0]

`tests/support/tampering/` says what is done. Each is done to a fresh copy of a small bundle, and `verify` is asked
in this process. Writes results/tamper.json and tamper.md; ends with 1 if one was not found that is not said to be
harmless.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import pages
from bluelm.errors import InputError
from export.bundle import keys, payload
from pipeline.commands.bundle import verify_bundle
from tests.support import bundles
from tests.support.tampering.case import FORMATS, Case, copied, make
from tests.support.tampering.table import TAMPERINGS, Tampering, tamper

FOUND, ACCEPTED, BROKEN = "found", "accepted", "broken"


@dataclass(frozen=True)
class Bench:
    """The owner's bundles, and the keys."""

    place: Path
    owner: payload.Keys
    attacker: payload.Keys
    made: dict[str, Path]

    @staticmethod
    def make(place: Path) -> Bench:
        """One bundle of each format."""
        for name in ("owner", "attacker", "made"):
            (place / name).mkdir(parents=True)
        owner, attacker = (bundles.development_keys(place / name) for name in ("owner", "attacker"))
        made = {kind: make(kind, place / "made" / kind.replace(" ", "-"), owner) for kind in FORMATS}
        bench = Bench(place, owner, attacker, made)
        for path in made.values():
            assert bench.answer(path) == ACCEPTED, f"{path}: not accepted as it was made"
        return bench

    def answer(self, path: Path) -> str:
        """What `verify --certificate OWNER --no-load` makes of it: `FOUND` for an error of ours that ends with 2."""
        try:
            with redirect_stdout(StringIO()):
                verify_bundle(path, keys.fingerprint(self.owner.model.certificate), load=False)
        except InputError:
            return FOUND
        except Exception as error:  # noqa: BLE001 - told as a fault
            return f"{BROKEN}: {type(error).__name__}: {error}"
        return ACCEPTED

    def trial(self, kind: str, what: Tampering, seed: str) -> str:
        """One tampering with one bundle."""
        copy = copied(self.made[kind], self.place / "copy")
        case = Case(copy, kind, random.Random(seed), self.owner, self.attacker)
        return self.answer(tamper(case, what))


def drawn(count: int, seed: int) -> Iterator[tuple[str, Tampering, str]]:
    """Formats in turn, tamperings by their weights, each first once for every format that it can be done to."""
    jobs = [(kind, what) for what in TAMPERINGS for kind in what.kinds]
    weights = [what.weight for _, what in jobs]
    draw = random.Random(seed)
    jobs += draw.choices(jobs, weights, k=max(count - len(jobs), 0))
    for number, (kind, what) in enumerate(jobs[:count]):
        yield kind, what, f"{seed} {number} {kind} {what.name}"


def table(rows: list[tuple[str, Tampering, str]]) -> dict[str, Any]:
    """A row a tampering, a column a format: found of tried."""
    counts = Counter((what.name, kind) for kind, what, _ in rows)
    found = Counter((what.name, kind) for kind, what, answer in rows if answer == FOUND)
    cells = [
        [what.name, *(f"{found[key]} / {counts[key]}" if counts[key := (what.name, kind)] else "" for kind in FORMATS)]
        for what in TAMPERINGS
    ]
    return {"columns": ["tampering", *FORMATS], "rows": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    rows: list[tuple[str, Tampering, str]] = []
    with tempfile.TemporaryDirectory() as place:
        bench = Bench.make(Path(place))
        for kind, what, seed in drawn(given.count, given.seed):
            answer = bench.trial(kind, what, seed)
            rows.append((kind, what, answer))
            if answer != FOUND and not (what.harmless and answer == ACCEPTED):
                print(f"{kind}: {what.name} ({seed}): {answer}", flush=True)
            if len(rows) % 200 == 0:
                print(f"{len(rows)} in {time.monotonic() - began:.0f} s", flush=True)
    harmful = [(kind, what, answer) for kind, what, answer in rows if not what.harmless]
    missed = [f"{kind}: {what.name}: {answer}" for kind, what, answer in harmful if answer != FOUND]
    part = {
        "tried": len(harmful),
        "found": sum(answer == FOUND for _, _, answer in harmful),
        "attacker": sum("attacker" in what.name for _, what, _ in harmful),
        "harmless": len(rows) - len(harmful),
        "reasons": {what.name: what.harmless for what in TAMPERINGS if what.harmless},
        "missed": missed,
        "seconds": round(time.monotonic() - began),
        "table": table(rows),
    }
    pages.save("tamper", {"tampering": {**part, "made": pages.stamp()}})
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
