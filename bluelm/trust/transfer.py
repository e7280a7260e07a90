"""Bytes from a server, bounded in size by what was promised and in time by `Limits`; a broken transfer is resumed.

A thread talks to the server while the caller waits, so that a name that does not resolve, or a header that arrives
letter by letter, also ends in time.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin

from bluelm.errors import InputError, UnavailableError
from bluelm.trust.address import Address, without_secrets

PIECE = 1 << 16  # bytes taken at a time, at most
REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
BUSY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Limits:
    """What a server may take.

    Attributes:
        connect_s: until it is reached.
        stalled_s: without a byte from it.
        slowest: bytes/s, over each `window_s`; a slower transfer is broken off and taken up again.
        attempts: in a row that brought less than `slowest * window_s`.
        pause_s: before the second attempt, twice as long before each later one.
        total_s: for everything together; None: as long as it takes.
        answer_bytes: of an answer that is no file.
        clock: seconds that only grow.
    """

    connect_s: float = 15.0
    stalled_s: float = 30.0
    slowest: float = 10_000.0
    window_s: float = 60.0
    attempts: int = 5
    pause_s: float = 1.0
    total_s: float | None = None
    answer_bytes: int = 64 << 20
    clock: Callable[[], float] = time.monotonic


class Absent(Exception):  # noqa: N818  (an answer, told by the caller)
    """The server says that it has no such thing."""


class Differs(Exception):  # noqa: N818  (an answer, told by the caller)
    """What the server sends is not what was promised; the message says how."""


class _Broken(Exception):  # noqa: N818
    """A transfer that ended before its time; another attempt may help."""


class _NoRange(_Broken):
    """The server does not go on from the byte that was asked for."""


@dataclass(frozen=True)
class _Answer:
    """What a server sends: the place of its first byte in the file, bytes in all where it says so, and the bytes."""

    start: int
    size: int | None
    pieces: Iterator[bytes]


class BoundedServer:
    """One server, with its limits; `total_s` begins to run when it is made.

    Attributes:
        address: what may be shown of its address.
    """

    def __init__(self, address: Address, limits: Limits, token: str | None = None) -> None:
        """`token`: for the Authorization header, where the address has no credentials of its own."""
        import requests

        self.address = address.public
        self._whole, self._limits = address, limits
        self._authorization = address.basic or (f"Bearer {token}" if token else None)
        self._deadline = None if limits.total_s is None else limits.clock() + limits.total_s
        self._http: Any = requests

    def ask(self, path: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        """A JSON object.

        Raises:
            Absent: no such thing there.
            InputError: no JSON object, or one of more than `answer_bytes`.
            UnavailableError: the server does not answer, or not in time.
        """
        where = f"{self.address}/{path}"

        def once() -> bytes:
            with self._answer(path, parameters, 0) as answer:
                data, began = bytearray(), self._limits.clock()
                for piece in answer.pieces:
                    data += piece
                    if len(data) > self._limits.answer_bytes:
                        problem = f"the answer has more than {self._limits.answer_bytes} bytes"
                        raise InputError(problem, where=where, fix="is that the address of a hub?")
                    if self._limits.clock() - began > self._limits.window_s:
                        raise _Broken(f"its answer took longer than {self._limits.window_s:g} s")
                return bytes(data)

        failures = 0
        while True:
            try:
                return _object(once(), where)
            except _Broken as error:
                failures += 1
                self._again(failures, error)

    def file(self, path: str, parameters: Mapping[str, str], part: Path, size: int, got: Callable[[int], None]) -> None:
        """Bring a file of `size` bytes into `part`, from where `part` ends.

        Args:
            got: is told how many bytes came.

        Raises:
            Absent: no such file there.
            Differs: the server would send another number of bytes.
            UnavailableError: the server does not answer, or not in time; `part` keeps what came.
        """
        failures = 0
        part.touch()
        while (have := part.stat().st_size) != size:
            if have > size:
                part.unlink()
                part.touch()
                continue
            try:
                self._go_on(path, parameters, part, size, got)
                raise _Broken("it ended too early")
            except _Broken as error:
                now = part.stat().st_size
                if now == size:
                    return
                if isinstance(error, _NoRange):
                    part.write_bytes(b"")
                enough = now - have >= max(1, self._limits.slowest * self._limits.window_s)
                failures = 1 if enough else failures + 1
                self._again(failures, error)

    def _go_on(
        self, path: str, parameters: Mapping[str, str], part: Path, size: int, got: Callable[[int], None]
    ) -> None:
        with self._answer(path, parameters, part.stat().st_size) as answer, part.open("r+b") as file:
            if answer.size is not None and answer.size != size:
                raise Differs(f"{answer.size} bytes are offered, the hub lists {size}")
            at = answer.start
            file.seek(at)
            file.truncate()
            for piece in self._quick_enough(answer.pieces):
                at += len(piece)
                if at > size:
                    file.truncate(0)
                    raise Differs(f"more came than the {size} bytes that the hub lists")
                file.write(piece)
                got(len(piece))

    def _quick_enough(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        clock, limits = self._limits.clock, self._limits
        began, came = clock(), 0
        for piece in pieces:
            came += len(piece)
            took = clock() - began
            if took >= limits.window_s:
                if came < limits.slowest * took:
                    raise _Broken(f"only {came / took:.0f} bytes a second came, of {limits.slowest:g} at least")
                began, came = clock(), 0
            yield piece

    def _again(self, failures: int, error: _Broken) -> None:
        """Wait before another attempt.

        Raises:
            UnavailableError: there were enough.
        """
        if failures >= self._limits.attempts:
            fix = "check the network, or name a mirror with --mirror; what was fetched is kept and resumed"
            raise UnavailableError(
                f"{self.address} did not answer as it should, {failures} times: {error}", where=self.address, fix=fix
            ) from error
        time.sleep(min(self._limits.pause_s * 2 ** (failures - 1), self._left(30.0)))

    def _left(self, seconds: float) -> float:
        """`seconds`, or what is left of the time for everything.

        Raises:
            UnavailableError: nothing is left.
        """
        if self._deadline is None:
            return seconds
        left = self._deadline - self._limits.clock()
        if left <= 0:
            fix = "type the same command again: what was fetched is kept and resumed; or give --time-limit more"
            raise UnavailableError(f"the time limit of {self._limits.total_s:g} s is over", where=self.address, fix=fix)
        return min(seconds, left)

    @contextmanager
    def _answer(self, path: str, parameters: Mapping[str, str], start: int) -> Iterator[_Answer]:
        """Ask for a file from byte `start` on, wherever the server sends us."""
        query = "&".join(part for part in (urlencode(parameters), self._whole.query) if part)
        url = f"{self.address}/{path}" + (f"?{query}" if query else "")
        for _ in range(REDIRECTS + 1):
            talk = _Talk(_get(self._http, url, self._headers(url, start), self._limits))
            try:
                head = self._next(talk, self._limits.connect_s + self._limits.stalled_s)
                if head.status_code not in MOVED:
                    yield self._checked(head, start, self._pieces(talk))
                    return
                url = self._moved(url, head.headers.get("Location"))
            finally:
                talk.end()
        raise InputError(f"the server redirects more than {REDIRECTS} times", where=f"{self.address}/{path}")

    def _headers(self, url: str, start: int) -> dict[str, str]:
        """Credentials go to the server that they are for, not to where it redirects."""
        headers = {"User-Agent": "bluelm-export", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if self._authorization and self._whole.holds(url):
            headers["Authorization"] = self._authorization
        return headers

    def _moved(self, url: str, target: str | None) -> str:
        try:
            new = urljoin(url, target or "")
            odd = not target or not new.startswith(("http://", "https://"))
        except ValueError:
            new, odd = "", True
        if odd or (url.startswith("https://") and not new.startswith("https://")):
            raise InputError(f"the server redirects to {without_secrets(target or '')!r}", where=self.address)
        return new

    def _checked(self, head: Any, start: int, pieces: Iterator[bytes]) -> _Answer:
        status, headers = head.status_code, head.headers
        if status in (404, 410):
            raise Absent
        if status in (401, 403):
            fix = "check the name; for a private or gated model log in to the hub (`hf auth login`, `ms login`)"
            raise InputError(f"the server refuses it ({status})", where=self.address, fix=fix)
        if status in BUSY:
            raise _Broken(f"it answered with status {status}")
        if status == 416 and start:
            raise _NoRange("it has no such part of the file")
        if status not in (200, 206):
            raise InputError(f"the server answered with status {status}", where=self.address)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise InputError("the server sends compressed bytes, which were not asked for", where=self.address)
        length = _whole_number(headers.get("Content-Length"))
        if status == 200:
            return _Answer(0, length, pieces)
        first, _, size = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if first.partition("-")[0] != str(start) or not start:
            raise _NoRange("it sends another part of the file than was asked for")
        return _Answer(start, _whole_number(size), pieces)

    def _pieces(self, talk: _Talk) -> Iterator[bytes]:
        while (piece := self._next(talk, self._limits.stalled_s)) is not None:
            yield piece

    def _next(self, talk: _Talk, seconds: float) -> Any:
        wait = self._left(seconds)
        try:
            item = talk.said.get(timeout=wait)
        except queue.Empty:
            self._left(seconds)
            raise _Broken(f"nothing came for {wait:g} s") from None
        if isinstance(item, Exception):
            raise _Broken(_reason(item)) from item
        return item


class _Talk:
    """A request under way in a thread of its own: `said` gives the head of the answer, its pieces, and None at the end,
    or the error that it ended with."""

    def __init__(self, get: Callable[[], Any]) -> None:
        self.said: queue.Queue[Any] = queue.Queue(maxsize=8)
        self._get, self._over = get, threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        self._over.set()

    def _run(self) -> None:
        try:
            with self._get() as response:
                self._say(response)
                while not self._over.is_set() and (piece := response.raw.read1(PIECE, decode_content=False)):
                    self._say(piece)
            self._say(None)
        except Exception as error:  # noqa: BLE001  (of requests, urllib3 and the system alike)
            self._say(error)

    def _say(self, item: Any) -> None:
        while not self._over.is_set():
            try:
                self.said.put(item, timeout=0.5)
            except queue.Full:
                continue
            return


def _get(http: Any, url: str, headers: Mapping[str, str], limits: Limits) -> Callable[[], Any]:
    """A GET that follows no redirect and reads nothing before it is asked to."""

    def get() -> Any:
        with http.Session() as session:
            return session.get(
                url, headers=headers, stream=True, allow_redirects=False,
                timeout=(limits.connect_s, limits.stalled_s), auth=lambda request: request,  # none of ~/.netrc
            )  # fmt: skip

    return get


def _reason(error: BaseException) -> str:
    """What went wrong, from the innermost error: those around it tell the whole address, credentials and all."""
    inner: Any = error
    while (deeper := getattr(inner, "reason", None) or next(iter(getattr(inner, "args", ())), None)) is not None:
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    if "Timeout" in type(error).__name__:
        return "nothing came in time"
    text = without_secrets(" ".join(str(inner).split()))[:200]
    return "".join(c if c.isprintable() else "?" for c in text) or type(error).__name__


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "no JSON"
        raise InputError(f"the answer cannot be read: {reason}", where=where, fix="is that a hub's address?") from None
    if not isinstance(found, dict):
        raise InputError("the answer is not a JSON object", where=where, fix="is that a hub's address?")
    return found


def _whole_number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 20 else None
