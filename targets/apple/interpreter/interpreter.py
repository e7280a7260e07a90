"""Executes a saved .mlpackage on any machine: a reference for what the program says, not for a chip's speed.

Arithmetic is float32; after each op the result is rounded to the type that the program declares for it, so a
float16 program behaves as one whose kernels accumulate in float32 and store float16. Apple's kernels may
accumulate more coarsely: that is measured on a Mac (`targets/apple/macos.py`), not here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import targets.apple.interpreter.constants
import targets.apple.interpreter.shape_ops  # noqa: F401  (both enter their ops in the table)
from bluelm.errors import InputError, TargetError
from export.coreml.package import NUMPY_TYPES, Package, ValueType, value_type
from targets.apple.interpreter.ops import OPS, Arguments, Array

State = dict[str, Array]


@dataclass(frozen=True)
class Step:
    """One op, ready to run: its arguments by parameter as value names, and what may be dropped behind it."""

    type: str
    name: str
    arguments: Mapping[str, str | tuple[str, ...]]
    outputs: tuple[tuple[str, ValueType], ...]
    frees: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """A constant or constexpr op: raw values and names of other constants by parameter."""

    type: str
    name: str
    values: Mapping[str, Any]
    names: Mapping[str, str]
    kind: ValueType
    key: bytes


@dataclass(frozen=True)
class Function:
    """One function of the program, ready to run."""

    name: str
    opset: int
    inputs: Mapping[str, ValueType]
    states: Mapping[str, ValueType]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    constants: Mapping[str, Constant]

    @property
    def made(self) -> set[str]:
        """Names of the values that a run makes."""
        return {name for step in self.steps for name, _ in step.outputs}


class Interpreter:
    """Runs the functions of one package.

    Args:
        package: a .mlpackage folder, or one that was opened.
        rounding: round to the declared float16; without it everything stays float32.
        cache_bytes: decompressed weights kept between runs, in bytes; beyond it they are decompressed anew.

    Raises:
        InputError: the package cannot be read.
        TargetError: the program has an op that is not known here; the message names it.
    """

    def __init__(self, package: Package | Path, *, rounding: bool = True, cache_bytes: int = 4 << 30) -> None:
        self.package = package if isinstance(package, Package) else Package.open(package)
        self.rounding = rounding
        self._room = cache_bytes
        self._cache: dict[bytes, Array] = {}
        self.functions: dict[str, Function] = {}
        for name in sorted(self.package.functions):
            try:
                self.functions[name] = _prepare(self.package, name)
            except (IndexError, KeyError, ValueError) as error:
                where = f"{self.package.path}, function {name}"
                raise InputError(f"the program is damaged: {error!r}", where=where) from error

    def make_state(self, function: str | None = None) -> State:
        """Zeros for each state of `function`; functions whose states agree in name and shape may share it."""
        states = self.function(function).states
        return {name: np.zeros([d or 0 for d in kind.shape or ()], np.float32) for name, kind in states.items()}

    def function(self, name: str | None) -> Function:
        """A function by name; None for the default one."""
        name = name or self.package.default_function
        if name not in self.functions:
            known = ", ".join(self.functions)
            raise InputError(f"no function {name!r}; the package has {known}", where=self.package.path)
        return self.functions[name]

    def run(
        self,
        inputs: Mapping[str, Array],
        state: State | None = None,
        function: str | None = None,
        watch: Collection[str] = (),
    ) -> dict[str, Array]:
        """Execute a function once.

        Args:
            inputs: arrays by input name; shapes must fit the declared ones.
            state: from `make_state`; updated in place.
            function: None for the package's default.
            watch: names of values inside the program to return besides the outputs.

        Returns:
            Outputs and watched values by name: float32, int32 or bool.

        Raises:
            InputError: an input or state is missing or has the wrong shape, or an index leaves its array.
        """
        plan = self.function(function)
        _check_inputs(plan, inputs)
        values = {name: self._declare(array, plan.inputs[name]) for name, array in inputs.items()}
        state = {} if state is None else state
        if missing := sorted(set(plan.states) - set(state)):
            raise InputError(f"function {plan.name!r} needs the states {missing}", fix="pass make_state()")
        keep = set(plan.outputs) | set(watch)
        for step in plan.steps:
            self._step(plan, step, values, state)
            for name in step.frees:
                if name not in keep:
                    values.pop(name, None)
        wanted = [*plan.outputs, *watch]
        if absent := [name for name in wanted if name not in values and name not in plan.constants]:
            raise InputError(f"function {plan.name!r} has no value named {absent}")
        return {n: values[n] if n in values else self._constant(plan, n) for n in wanted}

    def _step(self, plan: Function, step: Step, values: dict[str, Array], state: State) -> None:
        if step.type == "read_state":
            values[step.outputs[0][0]] = state[str(step.arguments["input"])]
            return
        if step.type == "write_state":
            name = str(step.arguments["input"])
            state[name] = self._declare(values[str(step.arguments["data"])], plan.states[name])
            return
        arguments = Arguments()
        arguments.opset = plan.opset
        for parameter, names in step.arguments.items():
            if isinstance(names, tuple):
                arguments[parameter] = [self._value(plan, name, values) for name in names]
            else:
                arguments[parameter] = self._value(plan, names, values)
        try:
            with np.errstate(all="ignore"):
                result = OPS[step.type](arguments)
        except ValueError as error:  # numpy's word for shapes that do not fit
            raise InputError(f"{step.type}: {error}", where=f"function {plan.name}, op {step.name}") from error
        results = result if isinstance(result, list) else [result]
        for (name, kind), array in zip(step.outputs, results, strict=True):
            values[name] = self._declare(array, kind)

    def _value(self, plan: Function, name: str, values: dict[str, Array]) -> Array:
        return values[name] if name in values else self._constant(plan, name)

    def _constant(self, plan: Function, name: str) -> Array:
        """A constant's value, kept while there is room; the same weights in two functions are kept once."""
        constant = plan.constants[name]
        if constant.key in self._cache:
            return self._cache[constant.key]
        arguments = Arguments({p: _widen(self.package.value(v)) for p, v in constant.values.items()})
        arguments.update({p: self._constant(plan, n) for p, n in constant.names.items()})
        raw = arguments["val"] if constant.type == "const" else OPS[constant.type](arguments)
        value = self._declare(np.asarray(raw), constant.kind)
        if value.nbytes <= self._room:
            self._room -= value.nbytes
            self._cache[constant.key] = value
        return value

    def _declare(self, array: Array, kind: ValueType) -> Array:
        """The array as the program declares it: floats as float32, rounded to float16 where it says so."""
        array = np.asarray(array)
        if kind.dtype == "fp16" and self.rounding:
            with np.errstate(over="ignore"):
                return array.astype(np.float16).astype(np.float32)
        if kind.dtype in ("fp16", "fp32", "fp64"):
            return array.astype(np.float32, copy=False)
        return array.astype(NUMPY_TYPES[kind.dtype], copy=False) if kind.shape is not None else array


def _widen(array: Array) -> Array:
    """Stored floats as float32; integers as they are."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _check_inputs(plan: Function, inputs: Mapping[str, Array]) -> None:
    if missing := sorted(set(plan.inputs) - set(inputs)):
        raise InputError(f"function {plan.name!r} needs the inputs {missing}")
    if unknown := sorted(set(inputs) - set(plan.inputs)):
        raise InputError(f"function {plan.name!r} has no inputs {unknown}; it takes {sorted(plan.inputs)}")
    for name, array in inputs.items():
        declared, found = plan.inputs[name].shape or (), np.shape(array)
        fits = len(found) == len(declared) and all(d in (None, f) for d, f in zip(declared, found, strict=True))
        if not fits:
            raise InputError(f"input {name!r} has shape {found}, the program declares {declared}")


def _prepare(package: Package, name: str) -> Function:
    """Read one function of a program into steps and constants; refuse ops that are not known."""
    proto = package.functions[name]
    kinds = {value.name: value_type(value.type) for value in proto.inputs}
    constants: dict[str, Constant] = {}
    steps: list[tuple[Any, dict[str, str | tuple[str, ...]]]] = []
    for op in package.operations(name):
        if op.type not in OPS and op.type not in ("const", "read_state", "write_state"):
            raise TargetError(
                f"the interpreter does not know the op {op.type!r}",
                where=f"{package.path}, function {name}, op {_op_name(op)}",
                fix="run the package on a Mac (--on cpu), or convert it without this op",
            )
        if op.type == "const" or op.type.startswith("constexpr_"):
            constants[op.outputs[0].name] = _constant_of(op, constants)
        else:
            steps.append((op, _arguments(op, constants)))
    block = proto.block_specializations[proto.opset]
    _check_names(steps, {*kinds, *constants})
    return Function(
        name=name,
        opset=int(proto.opset.removeprefix("CoreML")),
        inputs={n: k for n, k in kinds.items() if not k.state},
        states={n: k for n, k in kinds.items() if k.state},
        outputs=tuple(block.outputs),
        steps=_with_frees(steps),
        constants=constants,
    )


def _check_names(steps: list[tuple[Any, dict[str, str | tuple[str, ...]]]], known: set[str]) -> None:
    """Every value is made before it is read."""
    for op, arguments in steps:
        for names in arguments.values():
            for name in (names,) if isinstance(names, str) else names:
                if name not in known:
                    raise ValueError(f"op {_op_name(op)} reads {name!r}, which nothing makes")
        known.update(output.name for output in op.outputs)


def _op_name(op: Any) -> str:
    if op.outputs:
        return op.outputs[0].name
    strings = op.attributes["name"].immediateValue.tensor.strings.values
    return strings[0] if strings else "without a name"


def _key(type_: str, values: Mapping[str, Any], names: Mapping[str, bytes], kind: ValueType) -> bytes:
    """What makes two constants the same: op, values (a weight's place in its file) and type."""
    parts = [f"{type_}:{kind}".encode()]
    parts += [p.encode() + v.SerializeToString(deterministic=True) for p, v in sorted(values.items())]
    parts += [p.encode() + key for p, key in sorted(names.items())]
    return b"|".join(parts)


def _constant_of(op: Any, known: Mapping[str, Constant]) -> Constant:
    values = {p: v for p, v in op.attributes.items() if p != "name"}
    names: dict[str, str] = {}
    for parameter, argument in op.inputs.items():
        binding = argument.arguments[0]
        if binding.WhichOneof("binding") == "name":
            names[parameter] = binding.name
        else:
            values[parameter] = binding.value
    kind = value_type(op.outputs[0].type)
    key = _key(op.type, values, {p: known[n].key for p, n in names.items()}, kind)
    return Constant(op.type, op.outputs[0].name, values, names, kind, key)


def _arguments(op: Any, constants: dict[str, Constant]) -> dict[str, str | tuple[str, ...]]:
    """Value names by parameter; a constant written inside the op gets a name of its own."""
    found: dict[str, str | tuple[str, ...]] = {}
    for parameter, argument in op.inputs.items():
        names = []
        for i, binding in enumerate(argument.arguments):
            if binding.WhichOneof("binding") == "name":
                names.append(binding.name)
                continue
            name = f"{_op_name(op)}.{parameter}.{i}"
            kind = value_type(binding.value.type)
            key = _key("const", {"val": binding.value}, {}, kind)
            constants[name] = Constant("const", name, {"val": binding.value}, {}, kind, key)
            names.append(name)
        several = len(names) > 1 or parameter in ("values", "ref_tensors")
        found[parameter] = tuple(names) if several else names[0]
    return found


def _with_frees(steps: list[tuple[Any, dict[str, str | tuple[str, ...]]]]) -> tuple[Step, ...]:
    """Steps in order, each with the values that no later step reads."""
    last: dict[str, int] = {}
    for i, (op, arguments) in enumerate(steps):
        for output in op.outputs:
            last[output.name] = i
        for names in arguments.values():
            for name in (names,) if isinstance(names, str) else names:
                last[name] = i
    frees: list[list[str]] = [[] for _ in steps]
    for name, i in last.items():
        frees[i].append(name)
    return tuple(
        Step(
            op.type,
            _op_name(op),
            arguments,
            tuple((o.name, value_type(o.type)) for o in op.outputs),
            tuple(frees[i]),
        )
        for i, (op, arguments) in enumerate(steps)
    )
