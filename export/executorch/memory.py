"""Lowers to XNNPACK with the weights of one delegate in memory at a time, not those of the model.

    module with stand-ins -> torch.export, partitions -> for each delegate: read its weights, serialize it, drop them

Until then only shapes are asked for, so stand-ins take address space and no memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.backend_details import CompileSpec, PreprocessResult
from torch import Tensor
from torch.export import ExportedProgram

from bluelm.system.memory import give_back

SHARED = 2**16  # elements of a tensor that is not copied with its program


def stand_in(tensor: Tensor) -> Tensor:
    """Zeros of the same shape and dtype in pages that no memory backs before they are read."""
    pages = mmap.mmap(-1, tensor.numel() * tensor.element_size())
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)


@contextmanager
def weights_when_serialized(sources: Mapping[str, Callable[[], dict[str, Tensor]]]) -> Iterator[None]:
    """Put weights in place of their stand-ins while XNNPACK serializes the delegate that holds them.

    Args:
        sources: for the prefix of a linear's buffers in the program what reads them, by the rest of their names.

    Raises:
        RuntimeError: no delegate holds a stand-in, or two do: the file would lack a weight, or hold zeros for it.
    """
    left = dict(sources)
    preprocess = XnnpackBackend.preprocess

    def read_first(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        held = edge_program.state_dict
        stand_ins = dict(held)
        for prefix in dict.fromkeys(buffer.rpartition(".")[0] for buffer in stand_ins):
            if prefix not in sources:
                continue
            if prefix not in left:
                raise RuntimeError(f"two delegates hold {prefix}")
            for name, tensor in left.pop(prefix)().items():
                if f"{prefix}.{name}" not in stand_ins:
                    raise RuntimeError(f"a delegate holds {prefix} without its {name}")
                held[f"{prefix}.{name}"] = tensor
        result = preprocess(edge_program, compile_specs)
        held.update(stand_ins)
        give_back()
        return result

    XnnpackBackend.preprocess = staticmethod(read_first)
    try:
        yield
    finally:
        XnnpackBackend.preprocess = staticmethod(preprocess)
    if left:
        raise RuntimeError(f"no delegate holds {', '.join(left)}")


@contextmanager
def shared_weights() -> Iterator[None]:
    """Let copies of a program share its weights, which no pass changes: ExecuTorch copies each delegate's program in
    full before it lowers it, all of them at once."""
    copied = torch.Tensor.__deepcopy__

    def share(self: torch.Tensor, memo: dict[int, object]) -> torch.Tensor:
        return self if type(self) is torch.Tensor and self.numel() >= SHARED else copied(self, memo)

    torch.Tensor.__deepcopy__ = share
    try:
        yield
    finally:
        torch.Tensor.__deepcopy__ = copied
