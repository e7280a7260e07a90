"""`python -m tests.hostile [READER ...]`: a line of JSON for each family; 1 if there was a fault."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from tests.hostile.judged import judge
from tests.hostile.rows import rows


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    wanted, faults = sys.argv[1:], 0
    for row in rows():
        if not wanted or row.reader in wanted:
            found = judge(row)
            faults += len(found.faults)
            print(json.dumps(asdict(found)), flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
