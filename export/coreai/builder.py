"""A Core AI program as it is written: one graph after another, by the operations of Apple's dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.coreai.dialect import Program, Value, authoring, ir, ops

Type = Any  # of the binding
FREE = -1
"""In a shape: of any length."""
TO_THE_END = 2**31 - 1


@dataclass(frozen=True)
class Composite:
    """What a graph computes as a whole, by the name that Apple's compiler has one kernel for.

    Attributes:
        inputs: their names there.
        attributes: numbers and truths that it takes; an integer is 64 bits, another number float32.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, bool | int | float]

    def attribute(self) -> Any:
        """As the graph declares it."""
        told = ", ".join(f"{key} = {_literal(value)}" for key, value in sorted(self.attributes.items()))
        names = ", ".join(f'"{name}"' for name in self.inputs)
        declared = f'{{input_names = [{names}], op_attrs = {{{told}}}, output_names = ["output"]}}'
        return ir.Attribute.parse(f'#coreai.composite_declaration<"{self.name}" = {declared}>')


class Written:
    """A module that is being written; `graph` adds one, `finish` ends it."""

    def __init__(self) -> None:
        with authoring.Context(), ir.Location.unknown():  # else the file names the place of this line
            self._module = authoring.Module.create()

    @contextmanager
    def open(self) -> Iterator[Written]:
        """Graphs are added inside; behind it Apple's rewriting of what was written has run."""
        with self._module, ir.Location.unknown():
            yield self

    def graph(
        self,
        name: str,
        inputs: Mapping[str, Type],
        body: Callable[..., Mapping[str, Value]],
        *,
        states: Sequence[str] = (),
        composite: Composite | None = None,
    ) -> Callable[..., Value]:
        """Add a graph; what calls it from another one.

        Args:
            body: of the inputs, gives the outputs by name; a state among the inputs is given back by its name.
            composite: what it computes as a whole; it is then seen from this module alone.
        """
        private = composite is not None
        made = ops.GraphOp(
            name, list(inputs.values()), [], list(inputs), private=private, no_inline=private,
            composite_decl=composite.attribute() if composite else None,
        )  # fmt: skip
        with ir.InsertionPoint(made.entry_block):
            made.outputs_spec = list(body(*made.arguments).items())
        told = [{key.name: key.attr for key in one} for one in made.arg_attrs]
        for one, key in zip(told, inputs, strict=True):
            one |= {"MutableBuffers.buffer_mutation": ir.StringAttr.get(key)} if key in states else {}
        made.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(one) for one in told])
        return lambda *values: made(*values)[0]

    def finish(self) -> Program:
        """The program, to be saved."""
        return authoring.AIProgram(self._module)


def tensor(shape: Sequence[int], kind: Type) -> Type:
    """Of numbers of this kind."""
    sizes = [ir.ShapedType.get_dynamic_size() if size == FREE else size for size in shape]
    return ir.RankedTensorType.get(sizes, kind)


def half() -> Type:
    return ir.F16Type.get()


def single() -> Type:
    return ir.F32Type.get()


def signed(bits: int) -> Type:
    return ir.IntegerType.get_signed(bits)


def unsigned(bits: int) -> Type:
    return ir.IntegerType.get_unsigned(bits)


def layout(interleave: Sequence[int], alignments: Sequence[int]) -> Any:
    """How a tensor that a chip and its host share lies in memory: numbers along an axis that lie side by side, and
    multiples of bytes that each axis begins at, with the interleaved one last."""
    return authoring.HardwareConstraints(
        authoring.AllocationType.IOSurface, interleave=list(interleave), alignments=list(alignments)
    )


def constant(array: np.ndarray, name: str) -> Value:
    """float16 numbers as they are; the file calls them by this name, and else by one of chance."""
    return _held(np.ascontiguousarray(array), name, tensor(array.shape, half()))


def codes(array: np.ndarray, bits: int, name: str) -> Value:
    """Integers int8 that need 4 or 8 bits; two of 4 are a byte, the first below."""
    held = np.ascontiguousarray(array)
    if bits == 4:
        pairs = held.view(np.uint8).reshape(-1, 2) & 15
        held = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    return _held(held, name, tensor(array.shape, signed(bits)))


def transposed(x: Value, order: Sequence[int]) -> Value:
    """Its axes in another order."""
    return ops.transpose(x, np.array(order, np.uint32))


def cut(x: Value, start: Value, stop: Value, shape: Sequence[int]) -> Value:
    """From `start` to before `stop`, int32 [rank] each; `shape` is what comes of it, which Apple does not work out."""
    made = tensor([FREE if size < 0 else size for size in shape], x.type.element_type)
    return ops.SliceOp(x, start, stop, ops.constant([1] * len(shape)), results=[made]).result


def zeros(shape: Sequence[int], kind: Type) -> Value:
    """Nothing but 0."""
    return ops.constant(np.zeros(shape, np.int8 if kind == signed(4) else np.float16), dtype=kind)


def _held(array: np.ndarray, name: str, kind: Type) -> Value:
    return ops.ConstantOp(value=ir.DenseResourceElementsAttr.get_from_buffer(array, name, kind)).result


def _literal(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value} : si64" if isinstance(value, int) else f"{np.float32(value):.9e} : f32"
