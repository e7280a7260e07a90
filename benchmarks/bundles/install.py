"""What `make run` and `make test` install into .venv: `python -m benchmarks.bundles.install`, after `make test`.

Sizes of the files of torch, of this project's extras and of all that they depend on, as installed here. Writes
results/install.json, which the README cites.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks import pages

EXTRAS = {"run": "bluelm-export[qualcomm,bundle]", "test": "bluelm-export[test]"}  # as the Makefile asks for them


def closure(wanted: str) -> set[str]:
    """Distributions that a requirement brings; optional ones that are not installed are left out."""
    seen: set[tuple[str, str]] = set()
    left = [Requirement(wanted)]
    while left:
        one = left.pop()
        for extra in one.extras or {""}:
            if (one.name, extra) in seen:
                continue
            seen.add((one.name, extra))
            try:
                needs = map(Requirement, distribution(one.name).requires or [])
            except PackageNotFoundError:
                continue
            left += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def size(name: str) -> int:
    """Bytes of a distribution's files."""
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return 0
    paths = (file.locate() for file in files)
    return sum(path.stat().st_size for path in map(Path, paths) if path.is_file())


def main() -> None:
    found = {f"{what}_gb": f"{sum(map(size, closure(extra))) / 1e9:.1f}" for what, extra in EXTRAS.items()}
    print(found)
    pages.save("install", {**found, "made": pages.stamp()})


if __name__ == "__main__":
    main()
