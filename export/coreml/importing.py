"""Importing coremltools in a second and a half instead of six.

On import, coremltools imports every framework whose models it can convert: scikit-learn, TensorFlow, XGBoost,
ExecuTorch, torchao, transformers. Our programs are built operation by operation, and ExecuTorch passes programs of its
own dialect, so none of them is needed; together they take three quarters of the time.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any

from bluelm.errors import UnavailableError

NOT_ASKED = ("executorch", "libsvm", "sklearn", "tensorflow", "torchao", "transformers", "xgboost")


def import_coremltools() -> Any:
    """The coremltools package, without its complaints that Apple's frameworks are not on this machine.

    Raises:
        UnavailableError: coremltools is not installed.
    """
    try:
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        with without(NOT_ASKED):
            import coremltools
    except ImportError as error:
        raise UnavailableError(
            f"coremltools cannot be imported: {error}", fix="pip install 'bluelm-export[apple]'"
        ) from error
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return coremltools


@contextmanager
def without(packages: Sequence[str]) -> Iterator[None]:
    """Until the end of the block, in this thread, packages that are not imported yet seem not to be installed."""
    finder = _Absent(packages, threading.get_ident())
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Absent(MetaPathFinder):
    def __init__(self, packages: Sequence[str], thread: int) -> None:
        self._packages, self._thread = frozenset(packages), thread

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in self._packages and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{fullname} is not asked here", name=fullname)
