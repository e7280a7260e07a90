"""Hostile Core ML packages: manifest, program and weights, each made of a valid one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from tests.hostile.protobufs import MANY, WIRE, Change, behind, inside, nested
from tests.hostile.texts import SHOUT


def _spec(change: Callable[[Any], None]) -> Change:
    """The specification of a package with something changed."""

    def do(valid: bytes) -> bytes:
        from coremltools.proto import Model_pb2

        spec: Any = Model_pb2.Model.FromString(valid)  # pyright: ignore[reportAttributeAccessIssue]
        change(spec)
        return spec.SerializeToString()

    return do


def _operations(change: Callable[[Any], None]) -> Change:
    """The same change of every operation."""

    def do(spec: Any) -> None:
        for function in spec.mlProgram.functions.values():
            for block in function.block_specializations.values():
                for operation in block.operations:
                    change(operation)

    return _spec(do)


def _values(change: Callable[[Any], None]) -> Change:
    """The same change of every constant, in an attribute or given to an operation."""

    def do(operation: Any) -> None:
        for value in operation.attributes.values():
            change(value)
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.HasField("value"):
                    change(binding.value)

    return _operations(do)


def _blob(**values: Any) -> Change:
    """Other references into the weight file."""

    def change(value: Any) -> None:
        if value.WhichOneof("value") == "blobFileValue":
            for name, given in values.items():
                setattr(value.blobFileValue, name, given)

    return _values(change)


def _sizes(*sizes: int) -> Change:
    """Other shapes of constants in the weight file."""

    def change(value: Any) -> None:
        if value.WhichOneof("value") == "blobFileValue":
            tensor = value.type.tensorType
            del tensor.dimensions[:]
            for size in sizes:
                tensor.dimensions.add().constant.size = size
            tensor.rank = len(sizes)

    return _values(change)


def _immediate_sizes(value: Any) -> None:
    if value.WhichOneof("value") == "immediateValue" and value.type.HasField("tensorType"):
        tensor = value.type.tensorType
        del tensor.dimensions[:]
        for _ in range(2):
            tensor.dimensions.add().constant.size = 2**63


def _no_value(value: Any) -> None:
    value.ClearField("immediateValue")
    value.ClearField("blobFileValue")


def _other_value(value: Any) -> None:
    if value.WhichOneof("value") == "immediateValue":
        value.immediateValue.list.SetInParent()


def _element(value: Any) -> None:
    value.type.tensorType.dataType = 25  # INT4: of texts and floats too


def _states(value: Any) -> None:
    kind = value.type
    for _ in range(40):
        kind.stateType.wrappedType.SetInParent()
        kind = kind.stateType.wrappedType


def _read_itself(operation: Any) -> None:
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if operation.outputs:
                binding.name = operation.outputs[0].name


def _shouting(operation: Any) -> None:
    operation.type = SHOUT
    for output in operation.outputs:
        output.name = SHOUT


def _no_outputs(operation: Any) -> None:
    del operation.outputs[:]


def _no_block(spec: Any) -> None:
    for function in spec.mlProgram.functions.values():
        function.opset = "CoreML99"


def _no_functions(spec: Any) -> None:
    spec.mlProgram.functions.clear()


def _many_functions(spec: Any) -> None:
    for index in range(20_000):
        spec.mlProgram.functions[f"f{index}"].opset = "x"


def _other_kind(spec: Any) -> None:
    spec.ClearField("mlProgram")
    spec.neuralNetwork.SetInParent()


PROGRAM, FUNCTIONS, VALUE, BLOCKS, OPERATIONS = 502, 2, 2, 3, 3  # Model, Program, a map's entry, Function, Block
BLOCK = (PROGRAM, FUNCTIONS, VALUE, BLOCKS, VALUE)

MLMODEL: dict[str, Change] = {
    **WIRE,
    "weights of another place": _blob(fileName="@model_path/../../../../../../../etc/passwd"),
    "weights of an absolute place": _blob(fileName="/etc/passwd"),
    "weights of a device": _blob(fileName="@model_path//dev/zero"),
    "weights of the program itself": _blob(fileName="@model_path/model.mlmodel"),
    "weights of a folder": _blob(fileName="@model_path/."),
    "weights of a name with a zero byte": _blob(fileName="@model_path/weights/\x00.bin"),
    "weights of a name that shouts": _blob(fileName=f"@model_path/{SHOUT}"),
    "weights behind the end": _blob(offset=2**40),
    "weights at 2^64 - 1": _blob(offset=2**64 - 1),
    "weights in the header": _blob(offset=0),
    "sizes of 2^63": _sizes(2**63, 2**63),
    "sizes whose product overflows": _sizes(2**32, 2**32),
    "1000 axes": _sizes(*[1] * 1000),
    "no axes": _sizes(),
    "sizes of constants in the program": _values(_immediate_sizes),
    "constants without a value": _values(_no_value),
    "constants that are lists": _values(_other_value),
    "constants of four bits": _values(_element),
    "states of states": _values(_states),
    "no types": _values(lambda value: value.ClearField("type")),
    "lists of lists": behind(nested((*BLOCK, OPERATIONS, 3, 2), 2000, (2, 1))),
    "operations that read themselves": _operations(_read_itself),
    "operations that shout": _operations(_shouting),
    "operations without outputs": _operations(_no_outputs),
    "no attributes": _operations(lambda operation: operation.attributes.clear()),
    "no inputs": _operations(lambda operation: operation.inputs.clear()),
    "another set of operations": _spec(_no_block),
    "no functions": _spec(_no_functions),
    "20,000 functions": _spec(_many_functions),
    "another kind of model": _spec(_other_kind),
    "blocks in operations": behind(nested(BLOCK, 2000, (OPERATIONS, 4))),
    "millions of empty operations": behind(inside(inside(b"", OPERATIONS) * MANY, *BLOCK)),
    "millions of operations of a letter": behind(inside(inside(b"\x0a\x01x", OPERATIONS) * MANY, *BLOCK)),
    "millions of empty functions": behind(inside(inside(b"", FUNCTIONS) * MANY, PROGRAM)),
    "nothing": lambda valid: b"",
}  # fmt: skip


def _record(field: int, number: int, form: str) -> Change:
    """Another number in every record of the weight file (a sentinel, a type, bytes, where they begin)."""

    def do(valid: bytes) -> bytes:
        data = bytearray(valid)
        for at in range(64, len(data) - 64, 64):
            if data[at : at + 4] == b"\xef\xbe\xad\xde":
                struct.pack_into(form, data, at + field, number)
        return bytes(data)

    return do


BLOBS: dict[str, Change] = {
    "no records": _record(0, 0, "<I"),
    "records of a type that is none": _record(4, 99, "<I"),
    "records of floats": _record(4, 2, "<I"),
    "records of 2^64 - 1 bytes": _record(8, 2**64 - 1, "<Q"),
    "records of no bytes": _record(8, 0, "<Q"),
    "records that begin behind the end": _record(16, 2**40, "<Q"),
    "records that begin at 2^64 - 1": _record(16, 2**64 - 1, "<Q"),
    "records that begin in one another": _record(16, 65, "<Q"),
    "a header that says more": lambda valid: struct.pack("<II", 2**32 - 1, 2**32 - 1) + valid[8:],
}


def _manifest(path: Any) -> Change:
    """A manifest whose model lies elsewhere."""

    def do(valid: bytes) -> bytes:
        said = json.loads(valid)
        for entry in said["itemInfoEntries"].values():
            entry["path"] = path
        return json.dumps(said).encode()

    return do


MANIFEST: dict[str, Change] = {
    "a model of another place": _manifest("../../../../../../../../etc/passwd"),
    "a model of an absolute place": _manifest("/etc/passwd"),
    "a model that is a device": _manifest("/dev/zero"),
    "a model with a zero byte": _manifest("a\x00b"),
    "a model that shouts": _manifest(SHOUT),
    "a model that is a number": _manifest(5),
    "a model that is the manifest": _manifest("../Manifest.json"),
    "a model that is the weights": _manifest("com.apple.CoreML/weights/weight.bin"),
}
