"""Addresses of servers. Their credentials (user:password@, ?token=) are sent to that server only, and neither stored
nor shown.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, unquote, urlsplit

from bluelm.errors import InputError

_SECRETS = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^\s'\"<>]*@)?([^\s'\"<>?#]*)(?:[?#][^\s'\"<>]*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """Where a server answers.

    Attributes:
        public: scheme, host, port and path, without a slash at the end: what may be shown.
        query: what is added to each request there, as it was given.
        credentials: of HTTP's basic authentication, "user:password".
    """

    public: str
    query: str = field(default="", repr=False)
    credentials: str = field(default="", repr=False)

    @classmethod
    def of(cls, text: str) -> Address:
        """Read `https://[user:password@]host[:port][/path][?query]`.

        Raises:
            InputError: it is no such address; the message holds none of its credentials.
        """
        parts = _split(text)
        if parts is None:
            fix = "give one like https://host/path; in a password write / ? # @ as %2F %3F %23 %40"
            raise InputError("this is not a server's address", where="the hub's or mirror's address", fix=fix)
        login, _, host = parts.netloc.rpartition("@")
        path = quote(unquote(parts.path), safe="/~:+,=").rstrip("/")
        return cls(f"{parts.scheme}://{host}{path}", parts.query, unquote(login))

    @property
    def basic(self) -> str | None:
        """The value of an Authorization header."""
        if not self.credentials:
            return None
        login = self.credentials if ":" in self.credentials else f"{self.credentials}:"
        return "Basic " + base64.b64encode(login.encode()).decode("ascii")

    def holds(self, url: str) -> bool:
        """Whether a URL is of the same scheme, host and port, and so may be told the credentials."""
        mine, other = _split(self.public), _split(url)
        return mine is not None and other is not None and _origin(mine) == _origin(other)


def _split(text: str) -> SplitResult | None:
    """The parts of an address with which one can speak HTTP, else None."""
    try:
        parts = urlsplit(text)
        readable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets
        return None
    odd = parts.fragment or "@" in parts.path or not text.isprintable() or " " in text
    return parts if readable and not odd else None


def _origin(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


def without_secrets(text: str) -> str:
    """A text whose addresses have lost what stands before an @ and behind a question mark."""
    return _SECRETS.sub(r"\1\2", text) if "://" in text else text
