"""The command line, in this process or one of its own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.support.faults.faulty import HEAVY


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


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([*HEAVY])


def bluelm(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`bluelm-export ARGUMENTS` in a process of its own, forked from one that has imported what takes seconds."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as place:
        said = [Path(place, name) for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_be, args=(words, cwd, said, environment(cwd)))
        process.start()
        process.join()
        stdout, stderr = (path.read_text(encoding="utf-8") for path in said)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(["bluelm-export", *words], process.exitcode, stdout, stderr)


def _be(words: list[str], folder: Path, said: list[Path], variables: dict[str, str]) -> None:
    """Be the command line, as a program that was started in `folder`."""
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.excepthook = sys.__excepthook__
    main(words)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HOME": str(home)}
