"""Hubs and mirrors that send too much, too slowly, or odd words."""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bluelm.errors import InputError, UnavailableError
from bluelm.trust.fetch import fetch
from bluelm.trust.hubs import HUBS
from bluelm.trust.manifest import PINNED
from bluelm.trust.transfer import Limits
from tests.support.limits import HANG_S
from tests.support.trust.hub_server import COMMIT, Hub, serve
from tests.support.trust.hubs import CONFIG, FILES, PATIENT, REPO, SHORT, WEIGHTS, endless, get, kept

# --- too much


@pytest.mark.parametrize("length", [None, 2_200_000_000])
def test_a_mirror_sends_no_more_than_the_hub_lists(kind: str, length: int | None, hub: Hub, tmp_path: Path) -> None:
    sent: list[int] = []
    with serve(Hub(REPO, FILES)) as mirror:
        mirror.instead["model.safetensors"] = endless(sent, bytes(1 << 16), length)
        with pytest.raises(InputError, match=r"changed: model\.safetensors .*the hub lists|than the 307200 bytes"):
            get(kind, hub, tmp_path / "x", mirror=mirror)
    assert sum(sent) < 1 << 25  # what the system's buffers took
    assert kept(tmp_path) == len(CONFIG)


def test_an_endless_answer_of_a_hub_ends(kind: str, hub: Hub, tmp_path: Path) -> None:
    sent: list[int] = []
    hub.instead[""] = endless(sent, b'{"a": [' + b"0," * 30_000)
    with pytest.raises(InputError, match="more than 500000 bytes"):
        get(kind, hub, tmp_path / "x", Limits(answer_bytes=500_000, pause_s=0.0))
    assert sum(sent) < 1 << 25 and not kept(tmp_path)


def test_files_that_the_disk_cannot_hold(hub: Hub, tmp_path: Path) -> None:
    hub.instead[""] = listing("huggingface", entry("model.safetensors", size=1 << 49))
    with pytest.raises(InputError, match=r"562949\.95 GB are to be fetched, .* GB of the disk are free"):
        get("huggingface", hub, tmp_path / "x")
    assert not hub.asked


def test_compressed_bytes_are_not_unpacked(hub: Hub, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        handler.give(b"\x1f\x8b", True, 200, {"Content-Encoding": "gzip"})

    hub.instead["config.json"] = answer
    with pytest.raises(InputError, match="compressed"):
        get("huggingface", hub, tmp_path / "x")


# --- too slowly


def test_a_server_that_never_answers(kind: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="2 times: nothing came"):
            fetch(REPO, tmp_path / "x", "main", HUBS[kind](address, SHORT))


def test_a_head_letter_by_letter(hub: Hub, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        handler.close_connection = True
        with suppress(OSError):
            for letter in itertools.cycle(b"HTTP/1.1 200 OK\r\nX: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"):
                handler.connection.sendall(bytes([letter]))
                time.sleep(0.02)

    hub.instead["config.json"] = answer
    with pytest.raises(UnavailableError, match="nothing came"):
        get("huggingface", hub, tmp_path / "x", SHORT)


def test_a_file_that_stalls(kind: str, hub: Hub, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(WEIGHTS)))
        handler.end_headers()
        handler.wfile.write(WEIGHTS[:1000])
        handler.wfile.flush()
        handler.rfile.read(1)  # until the other side goes

    hub.instead["model.safetensors"] = answer
    with pytest.raises(UnavailableError, match="nothing came"):
        get(kind, hub, tmp_path / "x", SHORT)


def test_below_the_slowest_it_is_taken_up_again(kind: str, hub: Hub, tmp_path: Path) -> None:
    """A server that drips the first time: what came is kept, and the rest is asked for."""
    sent: list[int] = []

    def once(handler: Any) -> None:
        del hub.instead["model.safetensors"]
        endless(sent, WEIGHTS[:1], len(WEIGHTS), 0.01)(handler)

    hub.instead["model.safetensors"] = once
    limits = Limits(connect_s=HANG_S, stalled_s=HANG_S, window_s=0.3, slowest=10_000, pause_s=0.0, attempts=50)
    get(kind, hub, tmp_path / "x", limits)
    first, second, *_ = [asked for name, asked in hub.asked if name == "model.safetensors"]
    assert first is None and second is not None and 1 <= int(second[6:-1]) <= len(sent)


def test_a_server_that_drips_for_ever(hub: Hub, tmp_path: Path) -> None:
    hub.instead["model.safetensors"] = endless([], b"x", len(WEIGHTS), 0.01)
    limits = Limits(connect_s=HANG_S, stalled_s=HANG_S, window_s=0.2, slowest=1e6, pause_s=0.0, attempts=2)
    with pytest.raises(UnavailableError, match=r"2 times: only \d+ bytes a second came"):
        get("huggingface", hub, tmp_path / "x", limits)


def test_a_limit_for_everything(kind: str, hub: Hub, tmp_path: Path) -> None:
    """By a clock of which each look takes ten seconds."""
    ticks = itertools.count(0.0, 10.0)
    limits = Limits(total_s=25.0, clock=lambda: next(ticks), connect_s=HANG_S, stalled_s=HANG_S, window_s=HANG_S)
    with pytest.raises(UnavailableError, match="the time limit of 25 s is over"):
        get(kind, hub, tmp_path / "x", limits)


def test_busy_servers_are_asked_again(kind: str, hub: Hub, tmp_path: Path) -> None:
    statuses = [503, 429, 502]

    def busy(handler: Any) -> None:
        handler.give(b"", True, statuses.pop())
        if not statuses:
            del hub.instead["config.json"]

    hub.instead["config.json"] = busy
    assert set(get(kind, hub, tmp_path / "x").manifest.files) == set(FILES)


@pytest.mark.parametrize("status", [400, 401, 403, 451, 200])
def test_other_answers_are_told(status: int, hub: Hub, tmp_path: Path) -> None:
    hub.instead[""] = lambda handler: handler.give(b"<html>", True, status)
    with pytest.raises(InputError, match=str(status) if status != 200 else "no JSON"):
        get("huggingface", hub, tmp_path / "x")


def test_a_server_that_goes_on_elsewhere_than_asked(hub: Hub, tmp_path: Path) -> None:
    """Its 416, or another range, is no reason to give up: the file is fetched from its beginning."""
    for name, status, headers in [("a", 416, {}), ("b", 206, {"Content-Range": f"bytes 5-9/{len(WEIGHTS)}"})]:
        hub.drop = {"model.safetensors": 1000}

        def odd(handler: Any, status: int = status, headers: dict[str, str] = headers) -> None:
            if handler.headers.get("Range"):
                handler.give(b"xxxxx", True, status, headers)
            else:
                handler.file("model.safetensors", True)

        hub.instead["model.safetensors"] = odd
        get("huggingface", hub, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").read_bytes() == WEIGHTS


# --- odd words


def entry(path: object, size: object = len(CONFIG), digest: object = hashlib.sha256(CONFIG).hexdigest()) -> object:
    return path, size, digest


def listing(kind: str, *entries: Any) -> Callable[[Any], None]:
    """A listing of these files, as they are told."""
    if kind == "huggingface":
        files = [{"rfilename": path, "size": size, "lfs": {"sha256": digest}} for path, size, digest in entries]
        about: object = {"sha": COMMIT, "siblings": files}
    else:
        blobs = [{"Path": path, "Size": size, "Sha256": digest, "Type": "blob"} for path, size, digest in entries]
        about = {"Code": 200, "Data": {"Files": blobs}}
    return lambda handler: handler.give(json.dumps(about).encode(), True)


ODD = {
    "a way out": [entry("../x.json")],
    "an absolute path": [entry("/etc/x.json")],
    "a drive": [entry("c:x.json")],
    "a backslash": [entry("a\\x.json")],
    "a control character": [entry("a\x1b[2Jx.json")],
    "the other direction": [entry("a\u202ex.json")],
    "a lone surrogate": [entry("a\ud800.json")],
    "a long name": [entry("a" * 300 + ".json")],
    "the same twice": [entry("x.json"), entry("x.json")],
    "case alone": [entry("x.json"), entry("X.json")],
    "Unicode's form alone": [entry("\u00e9.json"), entry("e\u0301.json")],
    "a file as a folder": [entry("x"), entry("x/y.json")],
    "a device of Windows": [entry("nul.json")],
    "a number for a name": [entry(7)],
    "no name": [entry(None)],
    "a list for a name": [entry(["x.json"])],
    "a huge size": [entry("x.json", size=10**400)],
    "a size below zero": [entry("x.json", size=-1)],
    "a text for a size": [entry("x.json", size="24")],
    "a part of a byte": [entry("x.json", size=24.5)],
    "true for a size": [entry("x.json", size=True)],
    "no size": [entry("x.json", size=None)],
    "a short digest": [entry("x.json", digest="00")],
    "a number for a digest": [entry("x.json", digest=7)],
    "no digest": [entry("x.json", digest=None)],
}


@pytest.mark.parametrize("words", ODD)
def test_odd_listings_are_refused(words: str, kind: str, hub: Hub, tmp_path: Path) -> None:
    hub.instead[""] = listing(kind, entry("config.json"), *ODD[words])
    with pytest.raises(InputError) as caught:
        get(kind, hub, tmp_path / "x")
    assert str(caught.value).replace("\n", "").isprintable() and len(str(caught.value)) < 1000
    assert not hub.asked and not kept(tmp_path)


SHAPES = [b"[" * 100_000, b'{"siblings": ' + b"[" * 100_000, b"9" * 5000, b"null", b"[]", b"{}", b"\xff\xfe{", b""]
SHAPES += [b'{"sha": "main", "siblings": []}', b'{"sha": "%s", "siblings": {"a": 1}, "Data": 7}' % COMMIT.encode()]
SHAPES += [b'{"sha": "%s", "siblings": [7], "Data": {"Files": [7]}}' % COMMIT.encode()]
SHAPES += [b'{"sha": "%s", "siblings": [{"rfilename": "x", "lfs": 7}], "Data": []}' % COMMIT.encode()]


@pytest.mark.parametrize("answer", SHAPES, ids=range(len(SHAPES)))
def test_answers_of_odd_shapes_are_refused(answer: bytes, kind: str, hub: Hub, tmp_path: Path) -> None:
    hub.instead[""] = lambda handler: handler.give(answer, True)
    with pytest.raises(InputError):
        get(kind, hub, tmp_path / "x")
    assert not hub.asked


def test_modelscope_cuts_listings_off(hub: Hub, tmp_path: Path) -> None:
    hub.instead[""] = listing("modelscope", *(entry(f"{index}.json") for index in range(3000)))
    with pytest.raises(InputError, match="no more than 3000 files"):
        get("modelscope", hub, tmp_path / "x")


def test_no_file_is_dropped_unsaid(kind: str, tmp_path: Path) -> None:
    odd = {".cache/x.json": b"1", ".mdl": b"2", ".msc": b"3", "._____temp/y": b"4"}
    left = {"modeling.py": b"5", "old.bin": b"6", PINNED: b"7"}
    with serve(Hub(REPO, FILES | odd | left)) as hub:
        found = get(kind, hub, tmp_path / "x")
    assert set(found.manifest.files) == set(FILES | odd)
    assert set(found.left_out) == set(left)
    assert {name: (tmp_path / "x" / name).read_bytes() for name in odd} == odd


def test_what_is_not_of_this_fetch_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'mine\.txt'"):
        get("huggingface", hub, tmp_path / "x")
    (tmp_path / "x.partial" / "mine.txt").rename(tmp_path / "x.parts" / "mine.txt")
    get("huggingface", hub, tmp_path / "x")
    assert (tmp_path / "x.parts" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("revision", ["", "a\nb", "../x", "x" * 300, "a b"])
def test_revisions_that_no_hub_has(revision: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a revision"):
        fetch(REPO, tmp_path / "x", revision, HUBS["huggingface"](hub.address, PATIENT))
    assert not hub.requests
