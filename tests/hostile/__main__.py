"""`python -m tests.hostile [--most N] [READER ...]`: a line of JSON for each family; 1 if there was a fault."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

import torch

from tests.hostile.judged import judge
from tests.hostile.rows import rows

WHOLE = ("files", "its format", "YAML")


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, help="inputs of each family of values, drawn; default: all")
    parser.add_argument("reader", nargs="*")
    given, faults = parser.parse_args(), 0
    for row in rows():
        if not given.reader or row.reader in given.reader:
            found = judge(row, None if row.family in WHOLE else given.most)
            faults += len(found.faults)
            print(json.dumps(asdict(found)), flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
