"""The folder of an unfinished run, `<out>.partial`: its pieces, and the activations from which it continues.

Everything in it belongs to one fingerprint. A piece is either complete or absent, and beside it lies the SHA-256 of
what was written, which is checked when the piece is used: a damaged one is made again, the others are kept. The streams
before the next block are kept as well, so that a resumed run computes no finished block again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bluelm.errors import InputError
from bluelm.system.files import atomic_file, sha256, write_text
from bluelm.system.reading import read_json, read_note
from bluelm.text.templates import FILE, MORE
from bluelm.text.tokenizer import TOKENIZER_FILES
from calibration.ranks import Ranks
from calibration.walk import Streams
from compress.checkpoint.fingerprint import differences, fingerprint
from compress.checkpoint.pieces import Piece, read_header, write_piece
from compress.checkpoint.store import BESIDE, FORMAT, MANIFEST, QuantizedCheckpoint

INPUTS = "inputs.json"
STREAMS = "streams"
NOTE = ".sha256"  # behind a piece's name: the digest of what was written
SHA256_BYTES = 32
LOCK = "lock"
LEFT = (LOCK, f"{STREAMS}-*", ".*.tmp", f"*{NOTE}")  # no part of what is published


class Work:
    """An unfinished run's folder, as one rank sees it; rank 0 alone writes pieces."""

    def __init__(self, out: Path, inputs: Mapping[str, Any], ranks: Ranks, *, overwrite: bool = False) -> None:
        """Take up what lies there.

        Raises:
            InputError: it is of a run that had other inputs; the message says which. Or another process writes
                into it now.
        """
        self.folder, self.ranks = out.with_name(f"{out.name}.partial"), ranks
        self.fingerprint = fingerprint(inputs)
        self._lock = ExitStack()
        ranks.shared(self._take)
        try:
            self._take_up(inputs, overwrite)
        except BaseException:
            self._lock.close()
            raise

    def _take_up(self, inputs: Mapping[str, Any], overwrite: bool) -> None:
        """Go on with what lies there, or begin."""
        path, ranks = self.folder / INPUTS, self.ranks
        if overwrite and ranks.leads:
            clear(self.folder)
        elif path.is_file():
            refuse_other(_read_inputs(path), inputs, self.folder, "an unfinished run")
        ranks.shared(lambda: write_text(path, json.dumps(dict(inputs), indent=1)))
        self.folder.mkdir(parents=True, exist_ok=True)  # of a rank on another machine

    def _take(self) -> None:
        """Lock the folder for this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock.enter_context((self.folder / LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            fix = "wait for it to end, or name another output folder"
            raise InputError("another process is quantizing into this folder", where=self.folder, fix=fix) from error

    def close(self) -> None:
        """Let others write into the folder; without a piece it goes."""
        if self.ranks.leads and self.folder.is_dir() and not any(self.folder.glob("*.safetensors")):
            self.discard()
        self._lock.close()

    def is_made(self, name: str) -> bool:
        """True for a piece of this very run that is as it was written; a damaged one is made again."""
        path = self.folder / name
        try:
            return path.exists() and read_header(path).fingerprint == self.fingerprint and self._as_written(name)
        except InputError:
            return False

    def write(self, name: str, piece: Piece) -> None:
        """Store a piece, all or nothing, and the digest of its bytes."""

        def both() -> None:
            digest = write_piece(self.folder / name, piece, self.fingerprint)
            write_text(self.folder / f"{name}{NOTE}", digest)

        self.ranks.shared(both)

    def check_pieces(self) -> None:
        """See that every piece is as it was written.

        Raises:
            InputError: one is not; it is removed, so that the same command makes it again.
        """
        for note in sorted(self.folder.glob(f"*{NOTE}")):
            name = note.name.removesuffix(NOTE)
            if not self._as_written(name):
                (self.folder / name).unlink(missing_ok=True)
                fix = "give the same command again: it is made again. If this comes back, check disk and memory"
                raise InputError("a finished piece is not as it was written", where=self.folder / name, fix=fix)

    def _as_written(self, name: str) -> bool:
        path, note = self.folder / name, self.folder / f"{name}{NOTE}"
        return path.is_file() and read_note(note) == sha256(path)

    def save_streams(self, index: int, streams: Streams) -> None:
        """Keep the streams in front of block `index`, and forget those in front of earlier ones."""
        with atomic_file(self._streams_file(index)) as temporary, temporary.open("wb") as file:
            digest = hashlib.sha256(self._mark)
            file.write(self._mark)
            for part in _bytes_of(streams):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
        for path in self.folder.glob(f"{STREAMS}-*{self._whose}"):
            if path != self._streams_file(index):
                path.unlink()

    def load_streams(self, made: int, streams: Streams) -> int:
        """Fill the streams with the latest state that has all its blocks, of `made` finished ones.

        A state that is damaged, or that was not finite when it was kept, is not taken: the blocks give it again.

        Returns:
            the block that they stand in front of, 0 if none was kept; they are left alone then.
        """
        kept = [index for index in range(1, made + 1) if self._is_whole(index, streams)]
        common = set.intersection(*(set(indices) for indices in self.ranks.gathered(kept)))
        index = max(common, default=0)
        if index:
            with self._streams_file(index).open("rb") as file:
                file.seek(len(self._mark))
                for part in _bytes_of(streams):
                    if file.readinto(part) != len(part):
                        raise InputError("a file of streams was cut off while it was read", where=file.name)
        return index

    def clear_streams(self) -> None:
        """Forget all streams."""
        for path in self.folder.glob(f"{STREAMS}-*{self._whose}"):
            path.unlink()
        if not self.ranks.leads and not any(self.folder.iterdir()):  # on a machine of its own
            self.folder.rmdir()

    def publish(self, out: Path) -> None:
        """Let the finished folder be `out`, in place of an earlier one there.

        Raises:
            InputError: something lies there that is not ours.
        """
        refuse_foreign(out)
        (self.folder / INPUTS).unlink()
        for left in (path for pattern in LEFT for path in self.folder.glob(pattern)):
            left.unlink()
        if out.exists():
            shutil.rmtree(out)
        self.folder.rename(out)

    def discard(self) -> None:
        """Remove the folder with all that is in it: it is of inputs that are no more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _whose(self) -> str:
        return f"-{self.ranks.rank}-of-{self.ranks.size}.bin"

    @property
    def _mark(self) -> bytes:
        return self.fingerprint.encode()

    def _streams_file(self, index: int) -> Path:
        return self.folder / f"{STREAMS}-{index:05d}{self._whose}"

    def _is_whole(self, index: int, streams: Streams) -> bool:
        path = self._streams_file(index)
        kept = [streams.hidden, *([] if streams.exact is None else [streams.exact])]
        size = len(self._mark) + sum(tensor.numel() * tensor.element_size() for tensor in kept)
        if not path.is_file() or path.stat().st_size != size + SHA256_BYTES:
            return False
        with path.open("rb") as file:
            mark = file.read(len(self._mark))
            digest, finite = hashlib.sha256(mark), True
            left = size - len(mark)
            while left and (part := file.read(min(left, 1 << 24))):
                digest.update(part)
                finite = finite and bool(torch.frombuffer(bytearray(part), dtype=streams.hidden.dtype).isfinite().all())
                left -= len(part)
            return mark == self._mark and file.read() == digest.digest() and finite


def clear(partial: Path) -> None:
    """Remove the files of an unfinished run from its folder, all but its lock.

    Raises:
        InputError: something else lies among them.
    """
    more = partial / MORE
    templates = () if more.is_symlink() else (f"{MORE}/*.jinja",)
    patterns = ("*.safetensors", "*.json", *TOKENIZER_FILES, FILE, *templates, *LEFT)
    found = {path for pattern in patterns for path in partial.glob(pattern)}
    ours = {path for path in found if path.is_symlink() or not path.is_dir()}
    folders = {more} if templates and more.is_dir() else set[Path]()
    there = {path for place in (partial, *folders) for path in place.iterdir()}
    foreign = sorted(path.name for path in there - ours - folders)
    if foreign:
        problem = f"among an unfinished run's files lies what no run of ours wrote: {', '.join(foreign[:3])}"
        raise InputError(problem, where=partial, fix="move it elsewhere, or name another output folder")
    for path in ours - {partial / LOCK}:
        path.unlink()
    for folder in folders:
        folder.rmdir()


def finished(out: Path, inputs: Mapping[str, Any], *, overwrite: bool = False) -> QuantizedCheckpoint | None:
    """What lies at `out`, if it is complete, whole and of these inputs; None for nothing.

    Args:
        overwrite: None, too, for an earlier one of other inputs or a damaged one.

    Raises:
        InputError: `out` is a link, a file, a folder with something else in it, damaged, or of other inputs.
    """
    if out.is_symlink():
        fix = f"name the folder that it points to: {out.resolve()}"
        raise InputError("the output is a symbolic link", where=out, fix=fix)
    if not out.exists():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not (out / MANIFEST).is_file():
        raise InputError(
            "the output exists and is not a quantized checkpoint", where=out, fix="name another output folder"
        )
    if overwrite:
        refuse_foreign(out)
        return None
    try:
        found = QuantizedCheckpoint.open(out)
        found.verify()
    except InputError as error:
        again = "move this one elsewhere" if _foreign(out) else "make it again with --overwrite"
        raise InputError(
            f"this folder holds a damaged quantized checkpoint: {error.problem}",
            where=error.where or out,
            fix=f"name another output folder, or {again}",
        ) from None
    refuse_other(found.info.get("inputs", {}), inputs, out, "a quantized checkpoint")
    return found


def refuse_foreign(out: Path) -> None:
    """See that nothing would be removed with `out` that a run of ours did not write.

    Raises:
        InputError: a file lies there that its manifest does not name.
    """
    foreign = _foreign(out)
    if foreign:
        raise InputError(
            f"the output folder holds files that bluelm-export did not write: {', '.join(foreign[:3])}",
            where=out,
            fix="move it elsewhere, or name another output folder",
        )


def _foreign(out: Path) -> list[str]:
    """Files of a folder that its manifest does not name; all, where that is none of ours."""
    if not out.exists():
        return []
    try:
        info = read_json(out / MANIFEST)
    except InputError:
        info = {}
    ours = set(info["files"]) if info.get("format") == FORMAT and isinstance(info.get("files"), dict) else set()
    there = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir() or path.is_symlink()}
    return sorted(there - ours - {MANIFEST, *BESIDE}) if ours or not there else sorted(there)


def refuse_other(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, what: str) -> None:
    """Raise InputError with what differs, if something does."""
    differing = list(differences(found, wanted))
    if differing:
        raise InputError(
            f"this folder holds {what} made from other inputs: {'; '.join(differing)}",
            where=where,
            fix="name another output folder, or replace it with --overwrite",
        )


def _read_inputs(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(error.problem, where=path, fix="remove the folder, or add --overwrite") from None


def _bytes_of(streams: Streams) -> Iterator[memoryview]:
    """The memory of the streams, batch by batch."""
    for tensor in (streams.hidden, streams.exact):
        for batch in streams.batches() if tensor is not None else ():
            assert tensor is not None
            yield _memory(tensor[batch])


def _memory(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")
