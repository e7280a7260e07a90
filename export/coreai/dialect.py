"""Apple's binding to its compiler, in one place: `ops` of its dialect, `ir` of MLIR, `authoring` of programs.

It has no annotations that hold. Its public part writes no integers of 4 bits, no states and no composites, and copies
out no large constants, so what is behind that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

authoring: Any = import_module("coreai.authoring")  # before the dialect, which it imports in turn
ops: Any = import_module("coreai._compiler.dialects.coreai")
ir: Any = import_module("coreai._compiler.ir")
_compiler: Any = import_module("coreai._compiler._mlir_libs._coreaiIR._bindings.compiler")

Program = Any
"""`authoring.AIProgram`."""
Value = Any
"""A tensor, whose type tells shape and numbers."""


def raw(constant: Any, size: int) -> np.ndarray:
    """The `size` bytes of a constant's numbers, uint8; it must have as many."""
    held = np.zeros(size, np.uint8)
    _compiler.copy_constant_value_to_array(constant_op=constant.operation, destination=held)
    return held
