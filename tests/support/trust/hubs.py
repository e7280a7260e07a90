"""A hub of ours with a small model, and what is fetched of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bluelm.trust.fetch import Fetched, fetch
from bluelm.trust.hubs import HUBS
from bluelm.trust.transfer import Limits
from tests.support.limits import HANG_S
from tests.support.trust.hub_server import Hub

REPO = "vivo-ai/BlueLM-test"
CONFIG = b'{"model_type": "BlueLM"}'
WEIGHTS = bytes(51_200) + bytes(range(256)) * 1000
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
PATIENT = Limits(connect_s=HANG_S, stalled_s=HANG_S, window_s=HANG_S, pause_s=0.0)
SHORT = Limits(connect_s=0.2, stalled_s=0.2, window_s=0.2, pause_s=0.0, attempts=2)


def get(kind: str, hub: Hub, out: Path, limits: Limits = PATIENT, mirror: Hub | None = None) -> Fetched:
    other = HUBS[kind](mirror.address, limits) if mirror else None
    return fetch(REPO, out, "main", HUBS[kind](hub.address, limits), other)


def kept(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def endless(sent: list[int], piece: bytes, length: int | None = None, pause: float = 0.0) -> Callable[[Any], None]:
    """An answer that never ends, in pieces, each after a pause; counts bytes."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.close_connection = True
        with suppress(OSError):
            while sum(sent) < 1 << 26:
                handler.wfile.write(piece)
                sent.append(len(piece))
                time.sleep(pause)

    return answer
