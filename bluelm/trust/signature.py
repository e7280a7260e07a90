"""Signatures over a folder's files in sigstore's model-transparency format, by key or certificate.

The format is written and read by the `model-signing` library; its command line verifies what is made here.
The library hashes folders itself, while bundles also sign what lies inside an archive, so signing starts
from digests. Signatures are deterministic (RFC 6979), so that the same files and key give the same bytes.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bluelm.errors import InputError, UnavailableError
from bluelm.system.reading import open_regular, read_bytes
from bluelm.trust import certificates
from bluelm.trust.manifest import Difference, FolderManifest, raise_differences
from bluelm.trust.timestamps import stamped

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

MAX_BYTES = 64 << 20
MOST_CERTIFICATES = 16  # in a chain; each is parsed before any of it is trusted


@dataclass(frozen=True)
class Trust:
    """Whom to believe: a public key, or certificates of an authority (PEM files)."""

    public_key: Path | None = None
    certificates: Sequence[Path] = ()
    at: datetime | None = None  # when certificates must have been valid; None: now
    stamp: Path | None = None  # instead: a time stamp of the signature file
    stamp_authorities: Sequence[Path] = ()  # whose stamps to believe


def sign(name: str, digests: Mapping[str, str], private: ec.EllipticCurvePrivateKey) -> bytes:
    """A signature file over files by path and hex SHA-256.

    Args:
        name: of the signed folder, informative only.

    Raises:
        UnavailableError: model-signing is not installed.
    """
    return _encode(_payload(name, digests), private.public_key(), _ecdsa(private))


def verify_exact(raw: bytes, name: str, digests: Mapping[str, str], public: ec.EllipticCurvePublicKey) -> None:
    """Check a signature that `sign` made, down to each byte of its file.

    Raises:
        InputError: another key, other files, or any byte that `sign` would not have written.
    """
    form = _pem(public)
    with tempfile.TemporaryDirectory() as folder:
        key, file = Path(folder) / "key.pem", Path(folder) / "model.sig"
        key.write_bytes(form)
        file.write_bytes(raw)
        signed = _signed_digests(file, Trust(public_key=key), where="model.sig")
    _compare(signed, digests, "model.sig")
    given = base64.b64decode(json.loads(raw)["dsseEnvelope"]["signatures"][0]["sig"])
    if _encode(_payload(name, digests), public, lambda _: given) != raw:
        raise InputError("the signature file is not as it was written: damaged or changed", where="model.sig")


def verify_folder(folder: Path, signature: Path, trust: Trust) -> FolderManifest:
    """Check a folder against a signature file, which may lie inside it; every other file must be signed.

    Returns:
        The manifest of the folder, without the signature.

    Raises:
        InputError: the signature is not valid, or files differ from the signed ones (each is named).
        UnavailableError: model-signing is not installed.
    """
    signed = _signed_digests(signature, trust, where=signature)
    manifest = FolderManifest.of(folder)
    own = {name for name in manifest.files if (folder / name).samefile(signature)}
    files = {name: file for name, file in manifest.files.items() if name not in own}
    found = FolderManifest(files=files)
    _compare(signed, found.digests(), folder)
    return found


def _compare(signed: Mapping[str, str], found: Mapping[str, str], where: object) -> None:
    out: list[Difference] = []
    for path in sorted({*signed, *found}):
        if path not in signed:
            out.append(Difference(path, "added", "not signed"))
        elif path not in found:
            out.append(Difference(path, "missing", "signed, but not there"))
        elif signed[path] != found[path]:
            out.append(Difference(path, "changed", "its SHA-256 is not the signed one"))
    raise_differences(out, where)


def _library() -> Any:
    """The modules of model-signing: (signing, manifest, ec_key, certificate, protobuf bundle)."""
    try:
        from model_signing import manifest
        from model_signing._hashing import hashing
        from model_signing._signing import sign_certificate, sign_ec_key, sign_sigstore_pb, signing
    except ImportError as error:
        fix = "pip install 'bluelm-export[bundle]'"
        raise UnavailableError(f"model-signing is not installed: {error}", fix=fix) from error
    return signing, manifest, hashing, sign_ec_key, sign_certificate, sign_sigstore_pb


def _signed_digests(signature: Path, trust: Trust, where: object) -> dict[str, str]:
    """SHA-256 by path that a valid signature names."""
    _, _, _, ec_key, certificate, bundle = _library()
    if trust.public_key is None and not trust.certificates:
        raise InputError("nothing to trust was given", fix="give --public-key FILE or --certificate-chain FILE")
    at = stamped(trust.stamp, signature, trust.stamp_authorities) if trust.stamp else trust.at
    try:
        for path in (trust.public_key, *trust.certificates):
            if path is not None:
                read_bytes(path)  # a regular file of some kilobytes: the library opens whatever it is given
        verifier = (
            ec_key.Verifier(trust.public_key) if trust.public_key else _by_certificates(certificate, trust, at, where)
        )
    except Exception as error:  # the library lets those of cryptography and OpenSSL through
        named = trust.public_key or ", ".join(map(str, trust.certificates))
        fix = "name a PEM file: --public-key for a public key, --certificate-chain for certificates"
        raise InputError("the key or certificate to trust cannot be read", where=named, fix=fix) from error
    try:
        open_regular(signature).close()
        if signature.stat().st_size > MAX_BYTES:
            raise ValueError("the file is too large for a signature")
        signed = verifier.verify(bundle.Signature.read(signature))
        digests = {item.identifier: item.digest.digest_hex for item in signed.resource_descriptors()}
        algorithms = {item.digest.algorithm for item in signed.resource_descriptors()}
    except InputError:
        raise
    except RecursionError as error:
        raise InputError("the signature file is nested too deeply", where=where) from error
    except Exception as error:  # the library lets errors of json, pydantic, cryptography and OpenSSL through
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"the signature is not valid: {reason}", where=where) from error
    if algorithms - {"sha256"}:
        raise InputError(f"the signature uses {sorted(algorithms)}, only sha256 by file is known", where=where)
    return digests


def _by_certificates(library: Any, trust: Trust, at: datetime | None, where: object) -> Any:
    """The library's verifier with a check of the chain that looks at the clock: its own takes the day when the
    signer's certificate began, on which nothing has expired.
    """
    from cryptography import x509

    class Verifier(library.Verifier):
        def _verify_certificates(self, verification_material: Any, log_fingerprints: bool = False) -> Any:
            told = verification_material.x509_certificate_chain
            given = told.certificates if told else ()
            if len(given) > MOST_CERTIFICATES:
                problem = f"the signature holds {len(given)} certificates, more than {MOST_CERTIFICATES}"
                raise InputError(problem, where=where, fix="take the folder from where it was signed")
            chain = [x509.load_der_x509_certificate(each.raw_bytes) for each in given]
            return certificates.trusted_key(chain, self._store, at, where)

    return Verifier(list(trust.certificates))


def _payload(name: str, digests: Mapping[str, str]) -> Any:
    """The in-toto statement that the library signs for a folder with these files."""
    signing, manifest, hashing, *_ = _library()
    kind = manifest.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ["model.sig"]}
    )
    items = [kind.new_item(path, hashing.Digest("sha256", bytes.fromhex(hex_))) for path, hex_ in digests.items()]
    return signing.Payload(manifest.Manifest(name, items, kind))


def _pem(public: ec.EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return public.public_bytes(serialization.Encoding.PEM, form)


def _ecdsa(private: ec.EllipticCurvePrivateKey) -> Any:
    """Deterministic ECDSA with the hash that the format fixes for the curve."""
    from cryptography.hazmat.primitives.asymmetric import ec

    _, _, _, ec_key, *_ = _library()
    algorithm = ec.ECDSA(ec_key.get_ec_key_hash(private.public_key()), deterministic_signing=True)
    return lambda data: private.sign(data, algorithm)


def _encode(payload: Any, public: ec.EllipticCurvePublicKey, signer: Any) -> bytes:
    """The DSSE envelope in a sigstore bundle, as the library's own signer writes it, with sorted keys."""
    import hashlib

    from google.protobuf import json_format
    from sigstore_models import intoto
    from sigstore_models.bundle import v1
    from sigstore_models.common import v1 as common

    signing, _, _, _, _, bundle = _library()
    raw = json_format.MessageToJson(payload.statement.pb, sort_keys=True).encode()
    made = intoto.Signature(sig=base64.b64encode(signer(bundle.pae(raw))), keyid="")
    envelope = intoto.Envelope(
        payload=base64.b64encode(raw), payload_type=signing._IN_TOTO_JSON_PAYLOAD_TYPE, signatures=[made]
    )
    hint = hashlib.sha256(_pem(public)).hexdigest()
    material = v1.VerificationMaterial(public_key=common.PublicKeyIdentifier(hint=hint), tlog_entries=[])
    whole = v1.Bundle(media_type=bundle._BUNDLE_MEDIA_TYPE, verification_material=material, dsse_envelope=envelope)
    return whole.to_json().encode()
