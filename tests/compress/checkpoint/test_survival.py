"""What a run survives: being killed anywhere, a full disk. What comes out then is the same to the byte."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints.shapes import write_checkpoint

LAYERS = 3
QUANTIZE = ("-m", "pipeline", "quantize")
SMALL = ("--samples", "16", "--length", "32")
UNCHECKED = """
import sys
from bluelm.checkpoint import Checkpoint
from calibration.samples import load_samples
from compress import engine
from compress.recipe import Recipe
from pipeline.errors import guard

checkpoint = Checkpoint.open(sys.argv[1])
samples = load_samples(None, checkpoint.tokenizer(), 16, 32, 0)
recipe = Recipe.load("w4-g32", samples=16, length=32)
sys.exit(guard(lambda: engine.quantize(checkpoint, samples, recipe, sys.argv[2]) and None, "again"))
"""  # the command would see beforehand that there is no room


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("survival") / "model", layers=LAYERS)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, bytes]:
    out = model.parent / "undisturbed"
    subprocess.run([sys.executable, *QUANTIZE, str(model), str(out), *SMALL], check=True)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("seed", [0])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    command = [sys.executable, "-m", "tests.support.faults.survival", str(model), str(tmp_path / "out"), str(seed)]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert said["kills"] > 0
    assert said["begun"] <= LAYERS + said["kills"], "more than the block that was under way was done again"
    assert content(tmp_path / "out") == undisturbed


def test_a_full_disk_ends_it_clearly_and_it_goes_on_when_there_is_room(
    model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "unchecked.py").write_text(UNCHECKED)
    quantize = f"{sys.executable} {' '.join((*QUANTIZE, str(model), str(disk / 'out'), *SMALL))}"
    unchecked = f"{sys.executable} {tmp_path / 'unchecked.py'} {model} {disk / 'out'}"
    script = f"""
        mount -t tmpfs -o size=1m tmpfs {disk} || exit 77
        head -c 850000 /dev/zero > {disk}/others
        {quantize}; echo "refused $?"
        {unchecked}; echo "exit $?"
        find {disk} -type f
        rm {disk}/others
        {quantize}; echo "exit $?"
        cp -r {disk}/out {tmp_path}/out
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare to make a small disk with")
    ran = subprocess.run([unshare, "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if ran.returncode == 77 or "unshare failed" in ran.stderr:
        pytest.skip(f"no small disk here: {ran.stderr}")
    _, rest = ran.stdout.split("refused 2\n")
    assert "of disk" in ran.stderr, ran.stderr
    _, after = rest.split("exit 2\n")
    assert "No space left on device\n  where: " in ran.stderr, ran.stderr
    assert "out.partial/" in after
    assert ".tmp" not in after
    assert "exit 0" in after
    assert content(tmp_path / "out") == undisturbed
