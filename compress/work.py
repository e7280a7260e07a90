"""The folder of an unfinished run, `<out>.partial`: its pieces, and the activations that it goes on from.

Everything in it belongs to one fingerprint. A piece is there whole or not at all. The streams in front of the next
block are kept as well, so that a run that goes on computes no finished block again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bluelm.errors import InputError
from bluelm.files import atomic_file, read_json, write_text
from calibration.ranks import Ranks
from calibration.walk import Streams
from compress.fingerprint import differences, fingerprint
from compress.pieces import Piece, read_header, write_piece
from compress.store import MANIFEST, QuantizedCheckpoint

INPUTS = "inputs.json"
STREAMS = "streams"


class Work:
    """An unfinished run's folder, as one rank sees it; rank 0 alone writes pieces."""

    def __init__(self, out: Path, inputs: Mapping[str, Any], ranks: Ranks, *, overwrite: bool = False) -> None:
        """Take up what lies there.

        Raises:
            InputError: it is of a run that had other inputs; the message says which.
        """
        self.folder, self.ranks = out.with_name(f"{out.name}.partial"), ranks
        self.fingerprint = fingerprint(inputs)
        path = self.folder / INPUTS
        if overwrite and ranks.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif path.is_file():
            refuse_other(_read_inputs(path), inputs, self.folder, "an unfinished run")
        ranks.shared(lambda: write_text(path, json.dumps(dict(inputs), indent=1)))
        self.folder.mkdir(parents=True, exist_ok=True)  # of a rank on another machine

    def is_made(self, name: str) -> bool:
        """True for a piece of this very run; a damaged one is made again."""
        path = self.folder / name
        try:
            return path.exists() and read_header(path).fingerprint == self.fingerprint
        except InputError:
            return False

    def write(self, name: str, piece: Piece) -> None:
        """Store a piece, all or nothing."""
        self.ranks.shared(lambda: write_piece(self.folder / name, piece, self.fingerprint))

    def save_streams(self, index: int, streams: Streams) -> None:
        """Keep the streams in front of block `index`, and forget those in front of earlier ones."""
        with atomic_file(self._streams_file(index)) as temporary, temporary.open("wb") as file:
            file.write(self._mark)
            for part in _bytes_of(streams):
                file.write(part)
        for path in self.folder.glob(f"{STREAMS}-*{self._whose}"):
            if path != self._streams_file(index):
                path.unlink()

    def load_streams(self, made: int, streams: Streams) -> int:
        """Fill the streams with the latest state that has all its blocks, of `made` finished ones.

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
                    _fill(file, part)
        return index

    def clear_streams(self) -> None:
        """Forget all streams."""
        for path in self.folder.glob(f"{STREAMS}-*{self._whose}"):
            path.unlink()
        if not self.ranks.leads and not any(self.folder.iterdir()):  # on a machine of its own
            self.folder.rmdir()

    def publish(self, out: Path) -> None:
        """Let the finished folder be `out`, in place of what lies there."""
        (self.folder / INPUTS).unlink()
        for left in (*self.folder.glob(f"{STREAMS}-*"), *self.folder.glob(".*.tmp")):  # by runs that were killed
            left.unlink()
        if out.exists():
            shutil.rmtree(out)
        self.folder.rename(out)

    def discard(self) -> None:
        """Remove the folder with all that is in it."""
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
        if not path.is_file() or path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return file.read(len(self._mark)) == self._mark


def finished(out: Path, inputs: Mapping[str, Any], *, overwrite: bool = False) -> QuantizedCheckpoint | None:
    """What lies at `out`, if it is complete, whole and of these inputs; None for nothing or a damaged one.

    Raises:
        InputError: `out` is a file, a folder with something else in it, or of other inputs.
    """
    if not out.exists():
        return None
    if not (out / MANIFEST).is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise InputError(
            "the output exists and is not a quantized checkpoint", where=out, fix="name another output folder"
        )
    if overwrite:
        return None
    try:
        found = QuantizedCheckpoint.open(out)
        found.verify()
    except InputError:
        return None
    refuse_other(found.info.get("inputs", {}), inputs, out, "a quantized checkpoint")
    return found


def refuse_other(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, what: str) -> None:
    """Raise InputError with what differs, if something does."""
    differing = list(differences(found, wanted))
    if differing:
        raise InputError(
            f"here lies {what} of other inputs: {'; '.join(differing)}",
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


def _fill(file: BufferedReader, part: memoryview) -> None:
    if file.readinto(part) != len(part):
        raise InputError("a file of streams was cut off while it was read", where=file.name)
