"""`python -m tests.hostile [--most N] [READER ...]`: a line of JSON for each family; 1 if there was a fault."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import groupby

import torch

from tests.hostile.judged import judge
from tests.hostile.rows import Row, rows

WHOLE = ("files", "its format", "YAML")
TIMES = {"ONNX graph": 6, "LiteRT": 6, "Core ML program": 6, "ExecuTorch": 6}
"""Readers of many inputs that take long: of their format's own, so many times --most."""


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, help="inputs of each family of values, drawn; default: all")
    parser.add_argument("reader", nargs="*")
    given, faults = parser.parse_args(), 0
    chosen = [row for row in rows() if not given.reader or row.reader in given.reader]
    alone = given.most is None  # a process for each family, or for each reader
    for _, group in groupby(chosen, key=lambda row: row.name if alone else row.reader):
        for found in judge(list(group), lambda row: _most(row, given.most)):
            faults += len(found.faults)
            print(json.dumps(asdict(found)), flush=True)
    sys.exit(bool(faults))


def _most(row: Row, most: int | None) -> int | None:
    if most is not None and row.family == "its format" and row.reader in TIMES:
        return TIMES[row.reader] * most
    return None if row.family in WHOLE else most


if __name__ == "__main__":
    main()
