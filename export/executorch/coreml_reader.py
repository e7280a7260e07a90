"""Reading a .pte of the Core ML delegate: the package in it, and how each method's border maps to its functions.

A method is one call of the delegate. Its bytes are "CMJR" and a JSON reference {key, functionName} to named data of
the file: a flattened folder of model.mlpackage and metadata.json, which lists inputs and outputs in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.exir._serialize._program import PTEFile

from bluelm.errors import InputError
from bluelm.system.reading import parse_json, read_json
from export.coreml.importing import import_coremltools
from export.coreml.package import Package
from export.executorch.flattened import unflatten
from export.executorch.reader import read_program

BACKEND, REFERENCE = "CoreMLBackend", b"CMJR"


@dataclass(frozen=True)
class Method:
    """One method of the program.

    Attributes:
        function: of the package.
        inputs: the function's inputs in the order of the method's.
        outputs: the function's outputs in the order of the method's.
    """

    name: str
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The methods by name, and the package that all of them call."""

    methods: dict[str, Method]
    package: Package


def unpack(path: Path, folder: Path) -> Program:
    """Read the file `path`; its package is written into the empty `folder`, which must outlive the result.

    Raises:
        InputError: no .pte, or one that is not wholly a single Core ML package.
        UnavailableError: coremltools is not installed.
    """
    import_coremltools()
    file = read_program(path)
    try:
        return _program(file, path, folder)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"this is not a program of the Core ML delegate: {error!r}", where=path) from None


def _program(file: PTEFile, path: Path, folder: Path) -> Program:
    references = {plan.name: _reference(file, plan, path) for plan in file.program.execution_plan}
    keys = {reference["key"] for reference in references.values()}
    if len(keys) != 1 or file.named_data is None or not keys <= set(file.named_data.pte_data):
        raise InputError(f"the methods refer to {len(keys)} packages; one of the file is expected", where=path)
    entry = file.named_data.pte_data[keys.pop()]
    unflatten(bytes(file.named_data.buffers[entry.buffer_index]), folder, path)
    root = next((found.parent for found in folder.rglob("metadata.json")), folder)
    package = Package.open(root / "model.mlpackage")
    about = read_json(root / "metadata.json")["methods"]
    methods = {
        plan.name: _method(plan, references[plan.name]["functionName"], about[plan.name])
        for plan in file.program.execution_plan
    }
    return Program(methods, package)


def _reference(file: PTEFile, plan: Any, path: Path) -> dict[str, str]:
    """What the one delegate of a method refers to."""
    instructions = [step for chain in plan.chains for step in chain.instructions]
    if [delegate.id for delegate in plan.delegates] != [BACKEND] or len(instructions) != 1:
        raise InputError(f"the method {plan.name} is not one call of the Core ML delegate", where=path)
    content = bytes(file.program.backend_delegate_data[plan.delegates[0].processed.index].data)
    if not content.startswith(REFERENCE):
        raise InputError(f"the delegate of {plan.name} holds no reference to a package", where=path)
    return parse_json(content.removeprefix(REFERENCE).decode("utf-8", "replace"), path)


def _method(plan: Any, function: str, about: dict[str, list[str]]) -> Method:
    """Names in the method's order: the call's arguments are values, inputs first, then outputs."""
    arguments = plan.chains[0].instructions[0].instr_args.args
    names = [*about["inputNames"], *about["outputNames"]]
    by_value = dict(zip(arguments, names, strict=True))
    return Method(
        plan.name,
        function,
        tuple(by_value[value] for value in plan.inputs),
        tuple(by_value[value] for value in plan.outputs),
    )
