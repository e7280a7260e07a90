"""The command line, in this process or one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main


def call(*words: object) -> int:
    """The exit code of `bluelm-export WORDS`, in this process."""
    hook = sys.excepthook
    try:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
    finally:
        sys.excepthook = hook
    return int(left.value.code or 0)


LAX = """
max_perplexity_ratio: 2
max_mean_kl: 1
min_top1_agreement: 0.1
max_prefill_decode_kl: 0.001
max_runtime_kl: 0.01 # random weights feel 8-bit activations more than trained ones
min_decode_tokens_per_s: {at_least: 0.001, where: host}
max_artifact_bytes: 50 MB
max_memory_bytes: 1 GB
"""


QUICK = ["--samples", "4", "--length", "64", "--eval-tokens", "512", "--no-bundle"]


def bluelm(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, env=environment(cwd))


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HOME": str(home)}
