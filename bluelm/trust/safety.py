"""What a checkpoint folder may not hold: links, special files, pickles that run code, zip bombs.

Nothing is unpickled or unpacked here: pickles are only disassembled, archives only listed.
"""

from __future__ import annotations

import os
import pickletools
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from bluelm.errors import InputError

PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle", ".npy", ".npz")
TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")
TORCH_WEIGHTS = re.compile(r"(pytorch_model|adapter_model|consolidated).*\.(bin|pt|pth)")  # some loader takes them
# What zipfile lets through on damaged archives.
_DAMAGED = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, struct.error, zlib.error)
MAX_FILES = 100_000
MAX_PICKLE = 64 << 20  # bytes of a state dict's index; a 7B model has some tens of kilobytes

# Every global that torch.save writes for a plain dictionary of tensors.
_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", f"{kind}Storage") for kind in _STORAGES.split()),
}


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative path with slashes, path) of every regular file below `folder`, in the order of their names.

    `folder` itself may be a symlink: it is what the user named.

    Raises:
        InputError: not a folder; a symlink inside it (other than those of the hub's own cache), device, socket or
            pipe; more files than any checkpoint has.
    """
    if not folder.is_dir():
        raise InputError("not a folder", where=folder)
    found: list[tuple[str, Path]] = []
    for root, folders, files in os.walk(folder, onerror=_unreadable):
        for name in [*folders, *files]:
            path = Path(root) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode) and not _in_hub_cache(folder, path):
                fix = "copy the files themselves (cp -rL), or fetch again with `bluelm-export fetch`"
                raise InputError("a symbolic link is refused: it may lead out of the folder", where=path, fix=fix)
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise InputError("not a regular file: devices, pipes and sockets are refused", where=path)
            if not stat.S_ISDIR(mode):
                found.append((path.relative_to(folder).as_posix(), path))
        if len(found) > MAX_FILES:
            raise InputError(f"more than {MAX_FILES} files: not a checkpoint", where=folder)
    yield from sorted(found)


def _in_hub_cache(folder: Path, link: Path) -> bool:
    """Whether a link is one of the hub's cache: `<repo>/snapshots/<revision>/file -> <repo>/blobs/<hash>`."""
    home = folder.resolve().parent
    blob = link.resolve()
    return home.name == "snapshots" and blob.parent == home.parent / "blobs" and blob.is_file()


def _unreadable(error: OSError) -> None:
    raise InputError(f"the folder cannot be read: {error.strerror}", where=error.filename) from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds links, pickles that could run code, or archives that unpack to more than
    they are.

    Beside safetensors nothing opens a pickle: what trainers leave there (training_args.bin, rng_state.pth,
    random_states_0.pkl, optimizer.pt) is no reason to refuse; weights that another loader would take are.

    Raises:
        InputError: naming the file and why.
    """
    files = list(walk(folder))
    unread = any(path.suffix == ".safetensors" for name, path in files if "/" not in name)
    for _, path in files:
        pickled = path.suffix.lower() in (*PICKLES, *TORCH_FILES)
        if pickled and unread and not TORCH_WEIGHTS.fullmatch(path.name.lower()):
            continue
        if path.suffix.lower() in PICKLES:
            fix = "take the checkpoint as safetensors, or remove the file"
            raise InputError("the file is of a kind that can hold pickled code", where=path, fix=fix)
        if path.suffix.lower() in TORCH_FILES:
            _check_torch_file(path)
        elif path.suffix.lower() == ".zip":
            _check_archive(path)


def _check_archive(path: Path) -> zipfile.ZipFile:
    """An archive whose entries together are no larger than the file: what torch.save writes, and no bomb."""
    try:
        archive = zipfile.ZipFile(path)
        entries = archive.infolist()
    except _DAMAGED as error:
        fix = "take the checkpoint as safetensors; bare pickles of torch older than 1.6 are refused"
        raise InputError("neither a zip archive nor readable: a bare pickle?", where=path, fix=fix) from error
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        archive.close()
        raise InputError(f"the archive unpacks to {unpacked} bytes: refused as a zip bomb", where=path)
    return archive


def _check_torch_file(path: Path) -> None:
    with _check_archive(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".pkl")]
        if len(names) != 1 or archive.getinfo(names[0]).file_size > MAX_PICKLE:
            raise InputError("not an archive of tensors as torch.save writes it", where=path)
        try:
            foreign = sorted(set(_globals(archive.read(names[0]))) - _ALLOWED)
        except (*_DAMAGED, EOFError, IndexError) as error:
            raise InputError(f"the pickle inside is damaged: {error}", where=path) from error
    if foreign:
        called = ", ".join(".".join(name) for name in foreign[:3])
        fix = "take the checkpoint as safetensors, from a source that you trust"
        raise InputError(f"the pickle inside calls {called}: it could run code; it was not run", where=path, fix=fix)


def _globals(data: bytes) -> Iterator[tuple[str, str]]:
    """Names of every object that unpickling would import.

    torch.save writes protocol 2, where each name stands in the opcode; a name from the stack could be computed.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield opcode.name, "a computed name"
