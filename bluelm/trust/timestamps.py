"""Proof that a signature existed at a time: an authority's time stamp of its file (RFC 3161)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from bluelm.errors import InputError, UnavailableError
from bluelm.system.reading import read_bytes

MAX_BYTES = 1 << 20


def stamped(stamp: Path, signature: Path, authorities: Sequence[Path]) -> datetime:
    """The time at which an authority saw the bytes of `signature`.

    Args:
        stamp: its response, as `openssl ts` and curl store it (.tsr).
        authorities: PEM certificates of whom to believe the time.

    Raises:
        InputError: no time stamp, of another file, by somebody else, or by a certificate that is not for it or was
            not valid then.
        UnavailableError: rfc3161-client is not installed.
    """
    try:
        from cryptography import x509
        from rfc3161_client import VerificationError, VerifierBuilder, decode_timestamp_response
    except ImportError as error:
        fix = "pip install 'bluelm-export[bundle]'"
        raise UnavailableError(f"rfc3161-client is not installed: {error}", fix=fix) from error
    try:
        if stamp.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        response = decode_timestamp_response(read_bytes(stamp, MAX_BYTES))
        moment = response.tst_info.gen_time
    except (OSError, ValueError) as error:
        fix = "give the authority's answer as it came: openssl ts -query -data model.sig -sha256 -cert"
        raise InputError(f"not a time stamp: {_short(error)}", where=stamp, fix=fix) from error
    try:
        roots = [root for file in authorities for root in x509.load_pem_x509_certificates(read_bytes(file))]
    except (OSError, ValueError) as error:
        where = ", ".join(map(str, authorities))
        raise InputError("the certificates of the stamp's authority cannot be read", where=where) from error
    try:
        VerifierBuilder(roots=roots).build().verify_message(response, read_bytes(signature))
    except (VerificationError, ValueError) as error:
        fix = "ask for a stamp of this signature file, and name its authority with --stamp-authority"
        raise InputError(f"the time stamp does not hold: {_short(error)}", where=stamp, fix=fix) from error
    return moment


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
