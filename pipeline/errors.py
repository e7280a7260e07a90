"""Turns errors into messages and exit codes, in one place.

| code | meaning |
|---|---|
| 0 | passed |
| 1 | internal error: a short message, the traceback in a log file |
| 2 | bad input or configuration (typer gives it for wrong options itself), or memory that ran out |
| 3 | a budget failed |
| 4 | the target cannot hold this model |
| 5 | a device, an emulator or an SDK is not available |
| 6 | interrupted; the same command resumes |
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import typer

from bluelm.errors import ExportError, InputError, InterruptedRun, OutOfMemoryError, UnavailableError
from bluelm.system import interrupt
from bluelm.system.files import DEVICE_ERRORS, TRY_AGAIN
from bluelm.system.memory import is_shortage, shortage_of
from bluelm.trust.address import without_secrets
from pipeline.report.github import annotation, in_github
from pipeline.terminal import say

INTERRUPTED = InterruptedRun.exit_code
_PLACE_ERRORS = {
    **dict.fromkeys(DEVICE_ERRORS, TRY_AGAIN),
    errno.ENOSPC: "free some space, or name another --out folder",
    errno.EDQUOT: "free some space, or name another --out folder",
    errno.EFBIG: "allow larger files (ulimit -f), or name an --out folder on another file system",
    errno.EMFILE: "let a process open more files (ulimit -n), then give the same command again",
    errno.ENFILE: "let this machine open more files (sysctl fs.file-max), then give the same command again",
    errno.EBUSY: "another process holds it: wait for its end, or name another folder",
    errno.ETXTBSY: "another process runs it: wait for its end, or name another folder",
    errno.EACCES: "give the permission, or name another folder",
    errno.EPERM: "give the permission, or name another folder",
    errno.EROFS: "name a folder that can be written to",
    errno.EEXIST: "name another place: a file is in the way",
    errno.ENOTDIR: "name another place: a file stands where a folder should",
    errno.EISDIR: "name a file: this is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "name another place: symbolic links form a loop",
}


def guard(command: Callable[[], int | None], resume: str) -> int:
    """Run a command; tell what went wrong on stderr; return the exit code.

    Args:
        command: does the work; returns the exit code (None is 0).
        resume: the command line that goes on where an interrupted one stopped.

    Unexpected exceptions pass through, to `crash` (installed as sys.excepthook), which exits with 1. After a signal,
    whatever a library made of it is an interruption.
    """
    try:
        return _guarded(command)
    except KeyboardInterrupt:
        return _interrupted(resume)
    except Exception:
        if not interrupt.seen():
            raise
        return _interrupted(resume)


def _interrupted(resume: str) -> int:
    fix = f"type the same command again; what is finished is kept:\n         {resume}"
    return _tell(InterruptedRun("interrupted", fix=fix))


def _guarded(command: Callable[[], int | None]) -> int:
    """`guard` for what is no signal."""
    try:
        return command() or 0
    except ExportError as error:
        if interrupt.seen():
            raise
        return _tell(shortage_of(error) if is_shortage(error) else error)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        extra = extra_of((error.name or "").partition(".")[0])
        if extra is None:
            raise
        fix = f"pip install 'bluelm-export[{extra}]'"
        return _tell(UnavailableError(f"the package {error.name} is not installed", fix=fix))
    except OSError as error:
        if is_shortage(error):
            return tell_shortage(error)
        if error.errno not in _PLACE_ERRORS:
            raise
        fix = _PLACE_ERRORS[error.errno]
        return _tell(InputError(f"{error.strerror}", where=error.filename2 or error.filename, fix=fix))
    except Exception as error:
        if interrupt.seen():
            raise
        if str(error).startswith("Symlink loop"):  # what pathlib's resolve makes of ELOOP, a RuntimeError
            fix = _PLACE_ERRORS[errno.ELOOP]
            return _tell(InputError("symbolic links form a loop", where=str(error).partition("'")[2][:-1], fix=fix))
        if "can't start new thread" in str(error):  # a RuntimeError of Python's for EAGAIN
            fix = "allow more of them (ulimit -u) and more memory (ulimit -v), or more to the container"
            return _tell(OutOfMemoryError("the system lets this process begin no more threads", fix=fix))
        if not is_shortage(error):
            raise
        return tell_shortage(error)


def tell_shortage(error: BaseException) -> int:
    """Say that memory ran out; the exit code."""
    return _tell(shortage_of(error))


def leave(command: Callable[[], int | None]) -> NoReturn:
    """Run a command of the command line under `guard` and leave with its exit code."""
    raise typer.Exit(guard(command, resume=without_secrets(shlex.join(["bluelm-export", *sys.argv[1:]]))))


def extra_of(module: str) -> str | None:
    """The extra of this project that installs a module; None where none does."""
    wanted = _plain(_DISTRIBUTIONS.get(module, module))
    for row in requires("bluelm-export") or ():
        name, extra = re.match(r"[\w.-]+", row), re.search(r'extra == "([\w-]+)"', row)
        if name and extra and _plain(name[0]) == wanted and extra[1] not in _GATHERED:
            return extra[1]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


_DISTRIBUTIONS = {
    "coreai": "coreai-core",
    "litert_lm": "litert-lm-api",
    "OpenSSL": "pyOpenSSL",
    "cyclonedx": "cyclonedx-python-lib",
    "mlflow": "mlflow-skinny",
    "cpuinfo": "py-cpuinfo",
    "datasets": "lm_eval",  # which brings it
}
"""Of modules that are called otherwise than what installs them."""
_GATHERED = ("all", "docs", "test")


def crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook: the traceback goes into a log file, a short message to stderr."""
    path = _log_file()
    with path.open("a", encoding="utf-8") as file:
        file.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))
    say(f"\ninternal error: {kind.__name__}: {without_secrets(str(error))}", error=True)
    say(f"  where: the traceback is in {path}", error=True)
    say("  fix:   please report it with that file", error=True)


logging.getLogger("bluelm_export").addHandler(logging.NullHandler())  # without a run there is no log
logging.raiseExceptions = False  # a log that finds the disk full is no traceback on standard error


def _tell(error: ExportError) -> int:
    logging.getLogger("bluelm_export").error("%s", error)
    if in_github():
        print(annotation("error", "bluelm-export", str(error)), flush=True)
    say(f"\nerror: {error}", error=True)
    return error.exit_code


def _log_file() -> Path:
    """The log of the run under way, or a fresh file in the system's temporary folder."""
    for handler in logging.getLogger("bluelm_export").handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_file():
            return Path(handler.baseFilename)
    descriptor, name = tempfile.mkstemp(prefix="bluelm-export-", suffix=".log")
    os.close(descriptor)
    return Path(name)
