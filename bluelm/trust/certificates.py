"""Whether a certificate may sign a model at a time: its validity, its usage, and who vouches for it (RFC 5280)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bluelm.errors import InputError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

OLD = "for a signature that was made when it was valid, say when: --signed-at YYYY-MM-DD, or a time stamp of it"
WRONG_USE = "sign with a certificate for signing (digitalSignature, and codeSigning where it names its uses)"


PARTS = ("subject", "issuer", "not_valid_before_utc", "not_valid_after_utc", "serial_number", "signature_algorithm_oid")


def read_all(certificate: x509.Certificate) -> None:
    """Read what the library reads only when it is asked for.

    Raises:
        ValueError: a part of the certificate is damaged.
    """
    for part in PARTS:
        getattr(certificate, part)


def check(certificate: x509.Certificate, at: datetime | None = None, where: object = None) -> None:
    """Refuse a signer's certificate that is not valid at a time (default: now), or that is for something else.

    Raises:
        InputError: expired, not valid yet, or of a usage other than signing.
    """
    moment, name = at or datetime.now(UTC), certificate.subject.rfc4514_string()
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= moment <= last:
        problem = f"the certificate of {name} is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, not {_on(at)}"
        raise InputError(problem, where=where, fix=OLD if moment > last else "check the clock, and --signed-at")
    usage = _extension(certificate, "KeyUsage", where)
    if usage is not None and not usage.digital_signature:
        raise InputError(f"the certificate of {name} is not for signing", where=where, fix=WRONG_USE)
    _check_purpose(certificate, where)


def trusted_key(
    chain: Sequence[x509.Certificate], store: Any, at: datetime | None = None, where: object = None
) -> ec.EllipticCurvePublicKey:
    """The key of a chain's first certificate, after the chain was checked up to a certificate that is trusted.

    Args:
        chain: the signer's certificate, then those that lead from it to an authority.
        store: OpenSSL's store of the trusted certificates.

    Raises:
        InputError: what is wrong with which certificate.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from OpenSSL import crypto

    if not chain:
        raise InputError("the signature holds no certificate", where=where, fix="was it made by key? add --public-key")
    check(chain[0], at, where)
    if not any(_extension(chain[0], kind, where) for kind in ("KeyUsage", "ExtendedKeyUsage")):
        raise InputError("the signer's certificate does not say that it may sign", where=where, fix=WRONG_USE)
    store.set_time(at or datetime.now(UTC))
    leaf, *rest = (crypto.X509.from_cryptography(certificate) for certificate in chain)
    try:
        verified = crypto.X509StoreContext(store, leaf, rest).get_verified_chain()
    except crypto.X509StoreContextError as error:
        name = error.certificate.to_cryptography().subject.rfc4514_string()
        fix = OLD if "expired" in str(error) else "name the authority that you trust with --certificate-chain"
        raise InputError(
            f"the certificate of {name} is not trusted {_on(at)}: {error}", where=where, fix=fix
        ) from error
    for issuer in verified[1:]:
        _check_purpose(issuer.to_cryptography(), where)
    key = chain[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError("the signer's certificate holds no elliptic curve key", where=where)
    return key


def _on(at: datetime | None) -> str:
    return "now" if at is None else f"on {at:%Y-%m-%d}"


def _check_purpose(certificate: x509.Certificate, where: object) -> None:
    """A certificate that names its purposes (a TLS server's, say) is for these alone."""
    from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

    purposes = _extension(certificate, "ExtendedKeyUsage", where)
    if purposes is not None and not {Purpose.CODE_SIGNING, Purpose.ANY_EXTENDED_KEY_USAGE} & set(purposes):
        named = ", ".join(each._name for each in purposes)
        name = certificate.subject.rfc4514_string()
        raise InputError(f"the certificate of {name} is for {named}, not for signing", where=where, fix=WRONG_USE)


def _extension(certificate: x509.Certificate, kind: str, where: object) -> Any:
    """The value of an extension, None where the certificate has none of the kind."""
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(getattr(x509, kind)).value
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise InputError(f"the certificate's extensions cannot be read: {error}", where=where) from error
