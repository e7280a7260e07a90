"""Commands on where a model comes from and what leaves the tool: fetch, manifest, verify, bundle, install."""

from __future__ import annotations

import os
import platform
import re
import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bluelm.errors import InputError, TargetError, UnavailableError
from bluelm.system.children import run
from pipeline.errors import leave
from pipeline.options.effects import refuse_if
from pipeline.options.options import SignedAt, StampAuthority
from pipeline.progress import show_progress
from pipeline.terminal import console, say

if TYPE_CHECKING:
    from datetime import datetime

    from bluelm.trust.signature import Trust


class BundleFormat(StrEnum):
    APK = "apk"
    IPA = "ipa"
    XCODE = "xcode"
    GRADLE = "gradle"
    FOLDER = "folder"


class HubName(StrEnum):
    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


PublicKey = Annotated[Path | None, typer.Option(help="PEM public key of who signed.", show_default=False)]
Chain = Annotated[
    list[Path] | None,
    typer.Option("--certificate-chain", help="PEM certificates of the authority to trust.", show_default=False),
]
SignatureFile = Annotated[
    Path | None, typer.Option(help="A model-signing signature of the folder.", show_default=False)
]
ManifestFile = Annotated[
    Path | None, typer.Option("--manifest", help="A pinned manifest of the folder.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (fetch, manifest, verify, bundle, install):
        app.command()(command)


def fetch(
    repo: Annotated[str, typer.Argument(help="e.g. vivo-ai/BlueLM-7B-Chat")],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit. Default: the hub's main branch.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: checkpoints/<name>.", show_default=False)] = None,
    hub: Annotated[HubName, typer.Option(help="Hub whose digests are trusted.")] = HubName.HUGGINGFACE,
    mirror: Annotated[str | None, typer.Option(help="Download from this mirror instead.", show_default=False)] = None,
    pinned: ManifestFile = None,
    time_limit: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds for the whole download; what has arrived is kept.", show_default=False),
    ] = None,
    slowest: Annotated[
        float, typer.Option(min=0, help="Lowest speed, in bytes a second; a slower transfer is dropped and resumed.")
    ] = 10_000,
) -> None:
    """Download a checkpoint and check every file against the hub's size and digest. After an interruption, the
    same command resumes.
    """

    def work() -> int:
        from bluelm.trust.fetch import fetch as get
        from bluelm.trust.hubs import HUBS
        from bluelm.trust.manifest import FolderManifest
        from bluelm.trust.transfer import Limits

        limits = Limits(slowest=slowest, total_s=time_limit)
        target = out or Path("checkpoints") / repo.rpartition("/")[2]
        server = HUBS[hub](None, limits)
        other = HUBS[hub](mirror, limits) if mirror is not None else None
        wanted = revision or {"huggingface": "main", "modelscope": "master"}[hub]
        known = FolderManifest.open(pinned) if pinned else None
        with show_progress(console(error=True)) as progress:
            found = get(repo, target, wanted, server, other, known, progress)
        left = f" Left out: {', '.join(map(repr, found.left_out))}." if found.left_out else ""
        files = found.manifest
        say(f"{target}: {len(files.files)} files, every one as the hub says. Manifest {files.digest()}.{left}")
        return 0

    leave(work)


def manifest(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder.")],
    out: Annotated[Path | None, typer.Option(help="Default: standard output.", show_default=False)] = None,
) -> None:
    """Write down size and SHA-256 of every file of a folder, for `verify --manifest`."""

    def work() -> int:
        from bluelm.trust.manifest import FolderManifest
        from bluelm.trust.safety import check_folder

        check_folder(checkpoint)
        found = FolderManifest.of(checkpoint)
        if not found.files:
            raise InputError("the folder is empty: there is nothing to pin", where=checkpoint)
        if out is None:
            say(found.model_dump_json(indent=1, exclude_none=True))
            return 0
        if out.resolve().is_relative_to(checkpoint.resolve()):
            raise InputError("the manifest would lie in the folder that it describes", where=out)
        found.save(out)
        say(f"{out}: {len(found.files)} files, digest {found.digest()}")
        return 0

    leave(work)


def verify(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a bundle: .apk, .ipa or folder.")],
    pinned: ManifestFile = None,
    signature: SignatureFile = None,
    public_key: PublicKey = None,
    chain: Chain = None,
    certificate: Annotated[
        str | None, typer.Option(help="SHA-256 that the bundle's certificate must have.", show_default=False)
    ] = None,
    load: Annotated[bool, typer.Option(help="Load a bundle's artifact and generate with it.")] = True,
    load_limit: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds that an answer may take. Default: depends on its size.", show_default=False),
    ] = None,
    signed_at: SignedAt = None,
    stamp_authority: StampAuthority = None,
) -> None:
    """Check a checkpoint against a manifest or a signature; or everything about a bundle."""

    def work() -> int:
        from pipeline.run.provenance import day, trust_of

        if pinned is None and signature is None and public_key is None and not chain:
            refuse_if(not load, context, "--load-limit", "nothing is loaded")
            refuse_if(
                True, context, "--stamp-authority", "a bundle is checked, and stamps are of a checkpoint's signature"
            )
            return verify_bundle(path, certificate, load, load_limit, day(signed_at))
        for option in ("--certificate", "--load", "--load-limit"):
            refuse_if(True, context, option, "a checkpoint is checked, and that is asked of a bundle")
        return _verify_checkpoint(path, pinned, signature, trust_of(public_key, chain, signed_at, stamp_authority))

    leave(work)


def _verify_checkpoint(path: Path, pinned: Path | None, signature: Path | None, trust: Trust | None) -> int:
    from bluelm.trust.manifest import FolderManifest, verify_folder
    from bluelm.trust.safety import check_folder
    from bluelm.trust.signature import verify_folder as verify_signature
    from pipeline.run.provenance import PINNED, SIGNATURE

    check_folder(path)
    if pinned is not None:
        expected = FolderManifest.open(pinned)
        own = {PINNED, SIGNATURE} - set(expected.files)
        verify_folder(path, expected, ignore=frozenset(own))
        say(f"{path}: {len(expected.files)} files, every one as {pinned} says")
    if trust is not None:
        file = signature or path / SIGNATURE
        if not file.is_file():
            raise InputError("there is no signature", where=file, fix="name it with --signature")
        found = verify_signature(path, file, trust)
        say(f"{path}: {len(found.files)} files, every one as signed in {file}")
    elif signature is not None:
        fix = "add --public-key FILE or --certificate-chain FILE"
        raise InputError("no key or authority to trust is given", where=signature, fix=fix)
    return 0


def verify_bundle(
    path: Path,
    certificate: str | None = None,
    load: bool = True,
    load_limit: float | None = None,
    signed_at: datetime | None = None,
) -> int:
    """Check a bundle and say what it is; 0.

    Args:
        certificate: hex SHA-256 of the one that must have signed.
        load: let the artifact answer, within `load_limit` seconds.
        signed_at: when certificates must have been valid; None: now.

    Raises:
        InputError: what is wrong with it. UnavailableError: nothing here can run it.
    """
    from export.bundle import build, keys
    from pipeline.bundles.bundle_check import answer

    wanted = None if certificate is None else certificate.lower().replace(":", "")
    if wanted is not None and not re.fullmatch("[0-9a-f]{64}", wanted):
        fix = "give its 64 hex digits, as `verify` and `apksigner verify --print-certs` print them"
        raise InputError(f"--certificate {certificate!r} is not the SHA-256 of a certificate", fix=fix)
    found = build.verify(path, signed_at)
    about, signers = found.manifest, {keys.fingerprint(each): each for each in found.signers}
    if wanted is not None and wanted not in signers:
        fix = "ask whoever gave you the bundle"
        raise InputError(f"signed by {' and '.join(signers)}, not by {wanted}", where=path, fix=fix)
    say(f"{path}: {about.format} of {about.model.name} for {about.target}, {len(about.files)} files as signed")
    for digest, each in signers.items():
        say(f"  signer {keys.subject(each)}, certificate SHA-256 {digest}")
    for note in found.notes:
        say(f"  note: {note}")
    if load:
        say(f"  the artifact loads and answers, {answer(found, load_limit)}")
    else:
        say("  the artifact was not run, as asked: files and signature alone were checked")
    return 0


def bundle(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    format_: Annotated[
        BundleFormat | None,
        typer.Option("--format", help="Default: apk for Android, ipa or xcode for iOS.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Name without suffix. Default: <run>/bundle/<name>.", show_default=False),
    ] = None,
    allow_failed: Annotated[
        bool,
        typer.Option("--allow-failed", help="Bundle a run that failed its budget too; the manifest says so."),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(help="PKCS#12 or PEM. Default: this machine's development key.", show_default=False),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM certificate, if the key file has none.", show_default=False)
    ] = None,
    model_key: Annotated[
        Path | None,
        typer.Option(help="Elliptic curve key for the model signature if --key is RSA.", show_default=False),
    ] = None,
    package: Annotated[
        str | None, typer.Option(help="Application id, e.g. com.example.chat", show_default=False)
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name shown under the app's icon.", show_default=False)] = None,
    version_code: Annotated[int, typer.Option(min=1, max=2_100_000_000, help="Must rise with each release.")] = 1,
    version_name: Annotated[str, typer.Option(help="Version that users see.")] = "1.0",
    weights_licence: Annotated[str | None, typer.Option(help="Licence of the weights.", show_default=False)] = None,
    runner: Annotated[Path | None, typer.Option(help="Your own .app folder for an IPA.", show_default=False)] = None,
    build: Annotated[bool, typer.Option("--build", help="Call xcodebuild on the project (macOS).")] = False,
) -> None:
    """Pack a finished run into something to install, signed. The key's password is read from
    BLUELM_KEY_PASSWORD.
    """

    def work() -> int:
        from pipeline.bundles.bundling import Choice
        from pipeline.bundles.bundling import bundle as make

        no_key = "this machine's development key signs"
        refuse_if(key is None, context, "--certificate", no_key, "add --key FILE, or omit it")
        choice = Choice(
            format=None if format_ is None else format_.value,
            out=out,
            allow_failed=allow_failed,
            key=key,
            password=os.environ.get("BLUELM_KEY_PASSWORD"),
            certificate=certificate,
            model_key=model_key,
            package=package,
            label=label,
            version_code=version_code,
            version_name=version_name,
            weights_licence=weights_licence,
            runner=runner,
        )
        with show_progress(console(error=True)) as progress:
            made = make(run, choice, progress)
        _tell(made)
        if build or (made.name.endswith("-xcode") and platform.system() == "Darwin"):
            xcodebuild(made)
        return 0

    leave(work)


def bundle_passed(run: Path, passed: bool, output: Console, messages: Console) -> None:
    """The end of a run: a bundle in the default format, or why this model or machine has none.

    Raises:
        InputError: what lies in the bundle's place is not as it was written, so it would be taken for this run's.
    """
    from bluelm.errors import TargetError, UnavailableError

    if not passed:
        output.print("No bundle: the budget failed (`bluelm-export bundle --allow-failed` makes one).")
        return
    try:
        from pipeline.bundles.bundling import Choice
        from pipeline.bundles.bundling import bundle as make

        with show_progress(messages) as progress:
            made = make(run, Choice(), progress)
    except ModuleNotFoundError as error:
        text = f"No bundle: it needs {error.name}, pip install 'bluelm-export[bundle]'"
        output.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    except (TargetError, UnavailableError) as error:  # the run itself passed and is not spoilt by this
        text = f"no bundle: {error}"
        messages.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
        return
    output.print(f"Bundle: {made}", highlight=False, markup=False, soft_wrap=True)


def _tell(made: Path) -> None:
    from export.bundle.apple import ipa

    say(f"{made}")
    say(f"Check it: bluelm-export verify {made}")
    if made.suffix == ".ipa":
        say(f"note: {ipa.NOTE}")


def xcodebuild(project: Path) -> None:
    """Build an Xcode project without signing.

    Raises:
        UnavailableError: not macOS, or no Xcode. TargetError: the build failed.
    """
    if shutil.which("xcodebuild") is None:
        fix = "on a Mac with Xcode: open the project there"
        raise UnavailableError("xcodebuild is not installed", where=project, fix=fix)
    command = ["xcodebuild", "-project", "BlueLMChat.xcodeproj", "-scheme", "BlueLMChat"]
    command += ["-destination", "generic/platform=iOS", "-derivedDataPath", "../build", "build"]
    done = run([*command, "CODE_SIGNING_ALLOWED=NO"], "xcodebuild", folder=project)
    if done.returncode:
        raise TargetError(f"xcodebuild failed:\n{done.stdout[-2000:]}", where=project)


def install(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="An .apk, its folder of splits, or an .ipa.")],
    serial: Annotated[str | None, typer.Option(help="Serial of the phone.", show_default=False)] = None,
) -> None:
    """Install a bundle on a phone that it was made for; another is refused with the reason (exit code 4)."""

    def work() -> int:
        from export.bundle import build
        from pipeline.bundles.install import install as put

        found = build.verify(path)
        with show_progress(console(error=True)) as progress:
            chosen = put(path, found.manifest, serial, progress)
        say(f"installed {found.manifest.application.id} on {chosen}")
        return 0

    leave(work)
