"""Makes results/gate.json and gate.md of what the gate's commands left in their folders.

    python -m benchmarks.gate.page OUT [OUT ...] [--note WORDS]

A part that no folder has results of stays as it was. Rows that were not measured today, or on another commit, are said
to be so with `--note`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.gate.bench import Results
from tests.support.damages import ALL, DAMAGES

Row = dict[str, Any]
SHORT = {
    "weight_mismatches": "weights {}",
    "file_mismatches": "files {}",
    "tokenizer_mismatches": "tokenizer",
    "chat_template_mismatches": "template",
    "end_token_faults": "end token",
    "block_error_excess": "block × {}",
    "runtime_kl_excess": "range × {}",
    "position_kl_excess": "position × {}",
    "prefill_decode_kl": "decode {}",
    "bits_per_weight_deviation": "size {}",
    "runner_token_mismatches": "runner: tokens of {}",
    "runner_chat_mismatches": "runner: {} chats",
    "runner_end_faults": "runner: ends",
    "runner_refusals": "runner: refuses",
    "runner_kl_excess": "runner: arithmetic × {}",
}
"""How a check that failed is told, with its figure."""
PASSED = "passed"


def failures(row: Row) -> str:
    """What failed, in few words: "weights 7, range × 4,400"."""
    if row["verdict"] == "refused":
        return "refused"
    if row["verdict"] == PASSED:
        return PASSED if row["right"] else "**PASSED**"
    found: list[str] = []
    for told in row["failed"]:
        name, _, value = told.removesuffix(" (too few tokens)").partition(" ")
        kind = name.partition("@")[0]
        form = SHORT[kind] if kind in SHORT else kind.replace("_", " ")
        try:
            found.append(form.format(_figure(float(value))))
        except ValueError:
            found.append(form.partition(" {")[0])
    return ", ".join(dict.fromkeys(found)) + ("" if row["right"] else " **WRONG**")


def _figure(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def damage_part(rows: list[Row], before: Row | None) -> Row:
    """A row a damage, a column a runtime; a cell that is not measured again stays as it was."""
    blocks = sorted({row["blocks"] for row in rows})
    asked = {(row.name, kind) for row in DAMAGES for kind in row.formats}
    sound = {("none", kind) for kind in ALL}
    found = {key: cell for key, cell in _cells(before).items() if key in asked | sound}
    found |= {(row["damage"], row["format"]): failures(row) for row in rows if row["blocks"] == blocks[0]}
    formats = [kind for kind in ALL if any(kind == other for _, other in found)]
    names = list(dict.fromkeys(["none", *(row.name for row in DAMAGES)]))
    done = {key: cell for key, cell in found.items() if key[0] != "none"}
    whole = [cell for key, cell in found.items() if key[0] == "none"]
    missed = [key for key, cell in done.items() if "**" in cell]
    left = sorted(asked - set(found))
    cells = [
        [name, *(found.get((name, kind), "") for kind in formats)]
        for name in names
        if any((name, kind) in found for kind in formats)
    ]
    by_format: dict[str, list[str]] = {}
    for name, kind in left:
        by_format.setdefault(kind, []).append(name)
    return {
        "blocks": blocks[0],
        "judged": len(done),
        "caught": len(done) - len(missed),
        "refused": sum(cell == "refused" for cell in done.values()),
        "sound": len(whole),
        "sound_passed": sum(cell == PASSED for cell in whole),
        "runtimes": len(formats),
        "asked": len(asked),
        "missed": [f"{name} ({kind})" for name, kind in missed],
        "left": [f"{kind}: {', '.join(names)}" for kind, names in by_format.items()],
        "table": {"columns": ["damage", *formats], "rows": cells},
    }


def _cells(part: Row | None) -> dict[tuple[str, str], str]:
    """The filled cells of a part's table, by row and column."""
    if part is None:
        return {}
    columns, rows = part["table"]["columns"][1:], part["table"]["rows"]
    return {(row[0], column): cell for row in rows for column, cell in zip(columns, row[1:], strict=True) if cell}


def honest_part(rows: list[Row], before: Row | None) -> Row:
    """A row a run."""

    def figure(pair: list[float | None]) -> str:
        value, error = pair
        return "" if value is None else f"{value:.5f}" + ("" if error is None else f" ± {error:.5f}")

    cells = [
        [
            row["run"], row["architecture"], row["text"], row["format"],
            PASSED if row["passed"] else f"**failed**: {', '.join(row['failed'])}",
            *(figure(row[name]) for name in ("ratio", "kl", "top1")),
            " / ".join("" if value is None else f"{value:.2g}" for value in row["excess"]),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["weights", "architecture", "text", "runtime", "verdict", "perplexity ratio", "mean KL", "top-1"]
    columns.append("range / position")
    return {
        "judged": len(rows),
        "passed": sum(row["passed"] for row in rows),
        "architectures": len({row["architecture"] for row in rows}),
        "runtimes": len({row["format"] for row in rows}),
        "largest": f"{max(value or 0 for row in rows for value in row['excess']):.2g}",
        "table": {"columns": columns, "rows": cells},
    }


def arithmetic_part(rows: list[Row], before: Row | None) -> Row:
    """A row an artifact."""
    columns = ["what", "worst range of positions, nats a token", "may cost", "decode against prefill", "one position"]
    cells = [
        [
            row["what"], f"{row['runtime_kl']:.1e}", f"{row['limit']:.1e}", f"{row['prefill_decode_kl']:.1e}",
            f"× {row['position_kl_excess']:.2g}",
        ]
        for row in rows
    ]  # fmt: skip
    return {"blocks": rows[0]["blocks"], "table": {"columns": columns, "rows": cells}}


def size_part(rows: list[Row], before: Row | None) -> Row:
    """A row a format."""
    columns = ["format", "bytes of weight files", "planned", "beyond, a block", "outside the allowance"]
    cells = [
        [
            row["format"],
            f"{row['held']:,}",
            f"{row['planned']:,}",
            f"{row['beyond_a_block']:,}",
            f"{row['outside']:.2%}",
        ]
        for row in rows
    ]
    return {"blocks": rows[0]["blocks"], "table": {"columns": columns, "rows": cells}}


PARTS: dict[str, tuple[str, tuple[str, ...], Callable[[list[Row], Row | None], Row], str]] = {
    "damage": ("damages", ("format", "damage", "blocks"), damage_part, "benchmarks.gate damage OUT --blocks 2"),
    "honest": ("honest", ("run", "architecture", "text", "format"), honest_part, "benchmarks.gate.honest OUT"),
    "arithmetic": ("arithmetic", ("what", "blocks"), arithmetic_part, "benchmarks.gate arithmetic OUT"),
    "size": ("size", ("format", "blocks"), size_part, "benchmarks.gate size OUT"),
}


def gathered(folders: Iterable[Path], file: str, key: tuple[str, ...]) -> list[Row]:
    """The rows of all folders."""
    return [row for folder in folders for row in Results(folder / f"{file}.jsonl", key)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT")
    parser.add_argument("--note", metavar="WORDS", help="when and at which commits rows were measured")
    given = parser.parse_args()
    told = {"note": given.note} if given.note else {}
    found = pages.results("gate") if pages.results_file("gate").is_file() else {}
    for part, (file, key, make, command) in PARTS.items():
        rows = gathered(given.folders, file, key)
        if rows:
            before = found.get(part)
            found[part] = {**make(rows, before), "made": {**pages.stamp(), "command": f"python -m {command}", **told}}
            if part == "damage" and before is not None:
                found[part]["earlier"] = [*before.get("earlier", []), before["made"]]
    pages.save("gate", found)


if __name__ == "__main__":
    main()
