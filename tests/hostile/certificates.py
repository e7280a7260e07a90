"""Hostile certificates, time stamps and signatures by certificates, each made of a valid one."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any

from tests.hostile.binaries import Change
from tests.hostile.texts import DEEP, SHOUT, json_changed
from tests.support.trust import certificates

BEGIN, END = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"


def _armoured(data: bytes) -> bytes:
    return BEGIN + base64.encodebytes(data) + END


def _content(change: Change) -> Change:
    """The certificate's own bytes changed, its armour whole."""

    def do(valid: bytes) -> bytes:
        return _armoured(change(base64.b64decode(b"".join(valid.splitlines()[1:-1]))))

    return do


def _sequences(count: int) -> bytes:
    """Sequences in sequences, each of indefinite length."""
    return b"\x30\x80" * count


def _nested(count: int) -> bytes:
    """Sequences in sequences, with lengths that are right."""
    parts, length = list[bytes](), 0
    for _ in range(count):
        parts.append(b"\x30\x84" + struct.pack(">I", length))
        length += 6
    return b"".join(reversed(parts))


ASN1: dict[str, Change] = {
    "nothing in it": lambda valid: b"\x30\x00",
    "sequences without end": lambda valid: _sequences(DEEP),
    "sequences in sequences": lambda valid: _nested(DEEP),
    "a length of 2^64 - 1": lambda valid: b"\x30\x88" + b"\xff" * 8 + valid,
    "a length of lengths": lambda valid: b"\x30\xff" + b"\xff" * 127,
    "a length beyond the end": lambda valid: valid[:1] + b"\x84\x7f\xff\xff\xff" + valid[4:],
    "a number of a megabyte": lambda valid: b"\x30\x84\x00\x10\x00\x05\x02\x83\x10\x00\x00" + b"\x7f" * (1 << 20),
    "text that shouts": lambda valid: valid.replace(b"root", SHOUT.encode()[:4]).replace(b"time", b"\x1b[2J"),
    **{f"another bit {at} of 16": lambda valid, at=at: _flipped(valid, at) for at in range(16)},
}


def _flipped(valid: bytes, part: int) -> bytes:
    at = len(valid) * part // 16
    return valid[:at] + bytes([valid[at] ^ 4]) + valid[at + 1 :]


PEM: dict[str, Change] = {
    **{name: _content(change) for name, change in ASN1.items()},
    "ten thousand times": lambda valid: valid * 10_000,
    "a stranger's": lambda valid: certificates.issue("root", authority=True).certificate_pem,
    "a signer's in an authority's place": lambda valid: certificates.issue("root").certificate_pem,
    "an expired one": lambda valid: certificates.issue("root", authority=True, valid=certificates.PAST).certificate_pem,
    "no end of the armour": lambda valid: valid.replace(END, b""),
    "half a million marks": lambda valid: BEGIN * (1 << 19),
    "text in front": lambda valid: SHOUT.encode() + b"\n" + valid,
    "another kind": lambda valid: valid.replace(b"CERTIFICATE", b"PRIVATE KEY"),
    "headers": lambda valid: valid.replace(BEGIN, BEGIN + b"Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n"),
}


def _chain(change: Callable[[list[dict[str, str]]], Any]) -> Change:
    def do(document: dict[str, Any]) -> None:
        change(document["verificationMaterial"]["x509CertificateChain"]["certificates"])

    return json_changed(do)


SIGNATURES: dict[str, Change] = {
    "no certificates": _chain(lambda chain: chain.clear()),
    "the chain backwards": _chain(lambda chain: chain.reverse()),
    "a chain of ten thousand": _chain(lambda chain: chain.extend(chain[1:] * 5_000)),
    "a chain of one, often": _chain(lambda chain: chain.extend(chain[:1] * 1_000)),
    "a certificate of nothing": _chain(lambda chain: chain[0].update(rawBytes="")),
    "a certificate of sequences": _chain(
        lambda chain: chain[0].update(rawBytes=base64.b64encode(_nested(10_000)).decode())
    ),
    "two signatures": json_changed(lambda told: told["dsseEnvelope"]["signatures"].extend([{"sig": "AA=="}] * 2)),
    "no signature": json_changed(lambda told: told["dsseEnvelope"]["signatures"].clear()),
    "another kind of payload": json_changed(lambda told: told["dsseEnvelope"].update(payloadType="text/plain")),
    "an empty payload": json_changed(lambda told: told["dsseEnvelope"].update(payload="")),
}
