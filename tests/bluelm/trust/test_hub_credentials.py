"""Credentials of hubs and mirrors stay with whom they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bluelm.errors import InputError
from bluelm.trust.address import Address, without_secrets
from bluelm.trust.fetch import fetch
from bluelm.trust.hubs import HUBS
from bluelm.trust.manifest import PINNED, FolderManifest, Origin
from bluelm.trust.transfer import Limits
from tests.support.command_line import call
from tests.support.trust.hub_server import Hub, git_sha1, serve
from tests.support.trust.hubs import CONFIG, FILES, PATIENT, REPO, SHORT, get

SECRETS = ("s3cret", "us3r", "t0ken", "hf_own", "mirr0r")


def told(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Everything that was shown, and every text that was written."""
    out, err = capsys.readouterr()
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return out + err + "".join(path.read_text(errors="replace") for path in files)


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Hugging Face is this hub, and somebody is logged in there."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_own")
    return hub


def authorizations(hub: Hub) -> set[str | None]:
    return {headers.get("Authorization") for _, headers in hub.requests}


def test_credentials_of_a_mirror_stay_there(
    logged_in: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLUELM_MIRROR_TOKEN", "mirr0r")
    with serve(Hub(REPO, FILES)) as mirror:
        secret = mirror.address.replace("//", "//us3r:s3cret@") + "/?token=t0ken"
        assert call("fetch", REPO, "--out", tmp_path / "x", "--mirror", secret) == 0
        text = told(capsys, tmp_path)
        assert mirror.address in text and not [word for word in SECRETS if word in text]
        assert authorizations(mirror) == {"Basic dXMzcjpzM2NyZXQ="}
        assert all("token=t0ken" in path for path, _ in mirror.requests)
        assert authorizations(logged_in) == {"Bearer hf_own"}
        plain = mirror.address
        mirror.requests.clear()
        assert call("fetch", REPO, "--out", tmp_path / "y", "--mirror", plain) == 0
        assert authorizations(mirror) == {"Bearer mirr0r"}
        monkeypatch.delenv("BLUELM_MIRROR_TOKEN")
        mirror.requests.clear()
        assert call("fetch", REPO, "--out", tmp_path / "z", "--mirror", plain) == 0
        assert authorizations(mirror) == {None}


@pytest.mark.parametrize("fault", ["changed", "missing", "status", "odd listing", "gone", "redirect", "drops"])
def test_credentials_are_in_no_message(
    fault: str, logged_in: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "__init__", lambda self, **_: self.__dict__.update(SHORT.__dict__))
    files = {"changed": FILES | {"config.json": b"{}" * 12}, "missing": {"config.json": CONFIG}}.get(fault, FILES)
    with serve(Hub(REPO, files)) as mirror:
        secret = mirror.address.replace("//", "//us3r:s3cret@") + "?token=t0ken"
        if fault == "status":
            mirror.instead["config.json"] = lambda handler: handler.give(b"", True, 451)
        if fault == "odd listing":
            mirror.instead[""] = lambda handler: handler.give(b"?", True)
        if fault == "redirect":
            location = {"Location": f"ftp{secret[4:]}"}
            mirror.instead["config.json"] = lambda handler: handler.give(b"", True, 302, location)
        if fault == "drops":
            mirror.instead["config.json"] = lambda handler: handler.connection.close()
        if fault != "gone":
            assert call("fetch", REPO, "--out", tmp_path / "x", "--mirror", secret) in (2, 5)
    if fault == "gone":
        assert call("fetch", REPO, "--out", tmp_path / "x", "--mirror", secret) == 5
    text = told(capsys, tmp_path)
    assert "error:" in text and not [word for word in SECRETS if word in text]


def test_a_token_does_not_follow_to_another_host(kind: str, hub: Hub, tmp_path: Path) -> None:
    with serve(Hub(REPO, FILES)) as elsewhere:
        away = elsewhere.address.replace("127.0.0.1", "localhost")

        def send_on(handler: Any) -> None:
            handler.give(b"", True, 302, {"Location": f"{away}{handler.path}"})

        hub.instead["model.safetensors"] = send_on
        mirror = HUBS[kind](hub.address.replace("//", "//us3r:s3cret@"), PATIENT)
        fetch(REPO, tmp_path / "x", "main", mirror)
        assert elsewhere.asked and authorizations(elsewhere) == {None}
        assert authorizations(hub) == {"Basic dXMzcjpzM2NyZXQ="}


def test_circles_of_redirects_end(hub: Hub, tmp_path: Path) -> None:
    hub.instead["config.json"] = lambda handler: handler.give(b"", True, 307, {"Location": handler.path})
    with pytest.raises(InputError, match="more than 5 times"):
        get("huggingface", hub, tmp_path / "x")


@pytest.mark.parametrize("mirror", [
    "", "us3r:s3cret@host", "ftp://us3r:s3cret@host/", "https://", "https://us3r:s3/cret@host",
    "https://us3r:12/s3cret@host", "https://us3r:s3#cret@host", "https://us3r:s3cret@host:port", "https://us3r:s3cret@[host",
    "https://a b/?token=t0ken",
])  # fmt: skip
def test_addresses_that_are_none(mirror: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("fetch", REPO, "--out", tmp_path / "x", "--mirror", mirror) == 2
    said = capsys.readouterr().err
    assert "not a server's address" in said
    assert not [word for word in (*SECRETS, "cret") if word in said]


def test_addresses_lose_their_secrets() -> None:
    assert without_secrets("a https://u:p@ss@h:1/x?y=z#w b http://h/") == "a https://h:1/x b http://h/"
    assert Origin(hub="h", repo="r", revision="v", mirror="https://u:p@h/?token=t").mirror == "https://h/"
    assert "s3cret" not in repr(Address.of("https://us3r:s3cret@h/?s3cret"))
    address = Address.of("https://us%40r:p%2Fw@Host:443/a/")
    assert (address.public, address.credentials) == ("https://Host:443/a", "us@r:p/w")
    assert address.holds("https://host/else") and not address.holds("http://host:443/") and not address.holds("x")


def test_a_manifest_of_an_earlier_version_tells_no_secrets(hub: Hub, tmp_path: Path) -> None:
    get("huggingface", hub, tmp_path / "x")
    path = tmp_path / "x" / PINNED
    kept = json.loads(path.read_text())
    kept["origin"]["mirror"] = "https://us3r:s3cret@host/?token=t0ken"
    path.write_text(json.dumps(kept))
    origin = FolderManifest.open(path).origin
    assert origin is not None and origin.mirror == "https://host/"
    assert git_sha1(CONFIG)
