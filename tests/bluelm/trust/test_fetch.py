"""Fetching from a hub on this machine: resumed, and every change named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bluelm.errors import ExportError, InputError, UnavailableError
from bluelm.trust.fetch import fetch
from bluelm.trust.hubs import HUBS
from bluelm.trust.manifest import PINNED, FolderManifest, verify_folder
from bluelm.trust.transfer import Limits
from tests.support.limits import HANG_S
from tests.support.trust.hub_server import COMMIT, Hub, serve

REPO = "vivo-ai/BlueLM-test"
FILES = {
    "config.json": b'{"model_type": "BlueLM"}',
    "model.safetensors": os.urandom(3_000_000),
    "sub/tokenizer.model": b"pieces",
    "modeling_bluelm.py": b"import os",
    "pytorch_model.bin": b"PK",
}
WANTED = {"config.json", "model.safetensors", "sub/tokenizer.model"}
PATIENT = Limits(connect_s=HANG_S, stalled_s=HANG_S, window_s=HANG_S, pause_s=0.0)  # on a busy machine


@pytest.fixture
def files() -> dict[str, bytes]:
    return FILES


def get(
    kind: str, hub: Hub, out: Path, mirror: Hub | None = None, pinned: FolderManifest | None = None
) -> FolderManifest:
    other = HUBS[kind](mirror.address, PATIENT) if mirror else None
    return fetch(REPO, out, "main", HUBS[kind](hub.address, PATIENT), other, pinned).manifest


def test_a_checkpoint_is_fetched_without_code_and_pickles(kind: str, hub: Hub, tmp_path: Path) -> None:
    found = get(kind, hub, tmp_path / "x")
    assert set(found.files) == WANTED
    for name in WANTED:
        assert (tmp_path / "x" / name).read_bytes() == FILES[name]
    assert found.origin is not None and found.origin.repo == REPO
    if kind == "huggingface":
        assert found.origin.revision == COMMIT
    verify_folder(tmp_path / "x", found, ignore=frozenset({PINNED}))
    assert FolderManifest.open(tmp_path / "x" / PINNED) == found
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_broken_transfer_goes_on(kind: str, hub: Hub, tmp_path: Path) -> None:
    """The line breaks twice in the middle of the weights; each time only what is missing is asked for."""
    weights = FILES["model.safetensors"]
    hub.drop = {"model.safetensors": 1_500_000}
    get(kind, hub, tmp_path / "x")
    ranges = [asked for name, asked in hub.asked if name == "model.safetensors"]
    assert ranges == [None, "bytes=1500000-"]
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == weights


def test_an_interrupted_fetch_goes_on(kind: str, hub: Hub, tmp_path: Path) -> None:
    """The server goes in the middle of the weights; a later call takes what is missing, and no finished file."""
    once = Limits(attempts=1, connect_s=HANG_S, stalled_s=HANG_S)
    hub.drop = {"model.safetensors": 1_500_000}
    with pytest.raises(UnavailableError, match="kept and resumed"):
        fetch(REPO, tmp_path / "x", "main", HUBS[kind](hub.address, once))
    assert not (tmp_path / "x").exists()
    before = len(hub.asked)
    get(kind, hub, tmp_path / "x")
    assert hub.asked[before:] == [("model.safetensors", "bytes=1500000-"), ("sub/tokenizer.model", None)]
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_damaged_part_is_fetched_anew(kind: str, hub: Hub, tmp_path: Path) -> None:
    once = Limits(attempts=1, connect_s=HANG_S, stalled_s=HANG_S)
    hub.drop = {"model.safetensors": 1_500_000}
    with pytest.raises(UnavailableError):
        fetch(REPO, tmp_path / "x", "main", HUBS[kind](hub.address, once))
    (part,) = (tmp_path / "x.parts").iterdir()
    data = bytearray(part.read_bytes())
    data[7] ^= 1
    part.write_bytes(data)
    get(kind, hub, tmp_path / "x")
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_what_a_mirror_changed_dropped_or_added_is_named(kind: str, hub: Hub, tmp_path: Path) -> None:
    weights = bytearray(FILES["model.safetensors"])
    weights[1_500_000] ^= 1
    changed = dict(FILES) | {"model.safetensors": bytes(weights), "extra.json": b"{}"}
    del changed["sub/tokenizer.model"]
    with serve(Hub(REPO, changed)) as mirror, pytest.raises(InputError) as caught:
        get(kind, hub, tmp_path / "x", mirror)
    text = str(caught.value)
    assert "changed: model.safetensors" in text
    assert "missing: sub/tokenizer.model" in text
    assert "added: extra.json" in text
    assert "config.json" not in text
    assert not (tmp_path / "x").exists()


def test_an_honest_mirror(kind: str, hub: Hub, tmp_path: Path) -> None:
    with serve(Hub(REPO, FILES)) as mirror:
        found = get(kind, hub, tmp_path / "x", mirror)
        assert found.origin is not None and found.origin.mirror == mirror.address
        assert not hub.asked


def test_a_pinned_manifest_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    pinned = get("huggingface", hub, tmp_path / "x")
    get("huggingface", hub, tmp_path / "y", pinned=pinned)
    hub.files["config.json"] = b'{"model_type": "BlueLm"}'
    with pytest.raises(InputError, match=r"changed: config\.json"):
        get("huggingface", hub, tmp_path / "z", pinned=pinned)


def test_hubs_that_do_not_answer(kind: str, tmp_path: Path) -> None:
    with serve(Hub(REPO, FILES)) as gone:
        address = gone.address
    with pytest.raises(UnavailableError):
        fetch(REPO, tmp_path / "x", "main", HUBS[kind](address, PATIENT))
    with serve(Hub("another/model", FILES)) as other, pytest.raises(ExportError):
        get(kind, other, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="exists"):
        fetch(REPO, tmp_path / "x", "main", HUBS[kind](address, PATIENT))


def test_a_hub_that_names_paths_outside_is_refused(tmp_path: Path) -> None:
    evil = Hub(REPO, {"../../evil.json": b"{}", "model.safetensors": b"x"})
    with serve(evil) as hub, pytest.raises(ExportError):
        get("huggingface", hub, tmp_path / "deep" / "x")
    assert not (tmp_path / "evil.json").exists() and not (tmp_path / "deep" / "evil.json").exists()


def test_the_hubs_own_addresses_are_known_in_a_fresh_process() -> None:
    """The clients load their parts lazily: what another test imported must not be needed."""
    code = "from bluelm.trust.hubs import HUBS; print([HUBS[kind](None, None).address[:8] for kind in HUBS])"
    environment = {name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.count("https://") == len(HUBS)


@pytest.mark.parametrize("repo", ["", "name", "../../etc/passwd", "a/b/c", "a/.."])
def test_names_that_no_hub_has_are_refused(repo: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the name of a model"):
        fetch(repo, tmp_path / "x", "main", HUBS["huggingface"]("http://127.0.0.1:9", None))
    assert not list(tmp_path.iterdir())
