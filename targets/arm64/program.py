"""ExecuTorch's C++ runtime with the operators that LLMs take, as its libraries bring them.

`executorch.runtime` and `custom_ops` are the same, but import ExecuTorch's exporter and torch's compiler besides: 6 s.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

runtime: Any = importlib.import_module("executorch.extension.pybindings._portable_lib")  # has no annotations
OPERATORS = ("extension/llm/custom_ops", "kernels/quantized")
"""Folders of the libraries that register attention and embedding."""


def _register() -> None:
    found = find_spec("executorch")
    assert found is not None
    for root in found.submodule_search_locations or ():
        for folder in OPERATORS:
            for library in sorted((Path(root) / folder).glob("*aot_lib.*")):
                torch.ops.load_library(library)


_register()


def load_program(path: str | Path) -> Any:
    """The program in a file.

    Raises:
        RuntimeError: ExecuTorch refuses it.
    """
    checked = runtime.Verification.InternalConsistency
    return runtime._load_program(str(path), enable_etdump=False, debug_buffer_size=0, program_verification=checked)


def methods(program: Any) -> list[str]:
    """Names of a program's methods."""
    return [program.get_method_name(index) for index in range(program.num_methods())]
