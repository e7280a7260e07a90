"""This machine's memory: what a process has held, giving freed memory back, and the error when there is not enough."""

from __future__ import annotations

import ctypes
import errno
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from bluelm.errors import ExportError, OutOfMemoryError

_SHORT = re.compile(
    r"DefaultCPUAllocator|can(no|')t allocate|failed to allocate|bad_alloc|out of memory|low on memory|os error 12\b",
    re.IGNORECASE,
)
MOST_WORDS = 10_000  # of an error that are looked at
CGROUP = Path("/sys/fs/cgroup")


def give_back() -> None:
    """Let glibc return what was freed; elsewhere the allocator decides.

    It keeps freed blocks of up to 32 MB for later ones of their size. Behind the sums of a wide layer, which come in
    such blocks, that is half a GB that counts as the process's until it ends.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak() -> int:
    """The most bytes that this process has held. On Linux getrusage would begin with its parent's."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free() -> int:
    """Bytes that this process may still take: of the machine, of the container that it runs in, or by `ulimit`."""
    return min([psutil.virtual_memory().available, *_left_of_limits()])


def _left_of_limits() -> Iterator[int]:
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit
        most, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        yield max(0, int(most) - int(used))
    taken = psutil.Process().memory_info()
    for limit, used in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, getattr(taken, "data", 0))):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield max(0, most - used)


def is_shortage(error: BaseException) -> bool:
    """Whether an exception of whatever library, or one that it was raised from, says that memory ran out."""
    return any(
        isinstance(one, MemoryError)
        or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        or (not _quotes(one) and _SHORT.search(str(one)[:MOST_WORDS]) is not None)
        for one in _chain(error)
    )


def _quotes(error: BaseException) -> bool:
    """Whether its words are a file's: ours, and pydantic's, which may list a hundred thousand wrong values."""
    return isinstance(error, ExportError) or hasattr(error, "error_count")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def shortage(problem: str = "", where: object = None) -> OutOfMemoryError:
    """The error that says so, with what would fit; `problem` may begin the sentence."""
    try:
        left = free()
    except MemoryError:
        return OutOfMemoryError(f"{problem} memory ran out".strip(), where=where, fix="allow this process more of it")
    own, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    size = f"{left / 1e9:.1f} GB of {total / 1e9:.1f} GB are free now, and this process has {own / 1e9:.1f} GB"
    fix = (
        f"close other programs, or stay within both: --max-memory {(left + own) * 0.8 / 1e9:.1f}GB where the command "
        "takes it (`bluelm-export plan` tells what a run needs); a shorter --context or --length, a smaller "
        "--chunk and fewer --samples take less"
    )
    return OutOfMemoryError(f"{problem} memory ran out: {size}".strip(), where=where, fix=fix)


def shortage_of(error: BaseException) -> OutOfMemoryError:
    """The same of an exception; a GPU's memory is called so."""
    found = next((str(one) for one in _chain(error) if "CUDA out of memory" in str(one)), None)
    if found is not None:
        fix = "close what else runs on it, or give --quantize-on cpu (or --device cpu)"
        return OutOfMemoryError(f"the GPU's memory ran out: {found.splitlines()[0]}", fix=fix)
    return shortage()
