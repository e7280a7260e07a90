"""`python -m pipeline quantize` whose rank 1 is killed in its third block: for torchrun."""

from __future__ import annotations

import os
import signal
from typing import Any

from compress import engine
from pipeline.cli import main


def die_in_the_third_block() -> None:
    """Let this process end as by `kill -9` there: the ranks met in the second, so the first block is written."""
    original = engine._Run._solve_block

    def solve(self: Any, index: int, *rest: Any) -> Any:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index, *rest)

    engine._Run._solve_block = solve  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        die_in_the_third_block()
    main()
