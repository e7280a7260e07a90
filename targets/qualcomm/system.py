"""A compiled binary's metadata, read by libQnnSystem: its graphs, their inputs and outputs.

Structures and functions are those that Qualcomm documents for programs: QnnTypes.h, System/QnnSystemInterface.h and
System/QnnSystemContext.h of the QNN API 2, https://docs.qualcomm.com ("QnnSystemContext"). Every structure tells its
version, and others than those written down here are refused. Only for the child process that holds vendor libraries.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_float, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from bluelm.errors import InputError, TargetError, UnavailableError
from targets.qualcomm.messages import BinaryContents, GraphBorder, TensorBorder
from targets.tools import require

LIBRARY = "libQnnSystem.so"
SYSTEM_API, BINARY_INFO, GRAPH_INFO, TENSORS = 1, 3, 3, (1, 2)  # versions
SCALE_OFFSET, DEFINED = 0, 1
DTYPES = {
    0x0032: "int32",
    0x0216: "float16",
    0x0232: "float32",
    0x0308: "int8",
    0x0316: "int16",
    0x0408: "uint8",
    0x0416: "uint16",
}
"""Names of Qnn_DataType_t: of integers (0x00..), floats (0x02..), signed (0x03..) and unsigned codes (0x04..)."""


class _Version(ctypes.Structure):
    _fields_ = (("major", c_uint32), ("minor", c_uint32), ("patch", c_uint32))


class _ScaleOffset(ctypes.Structure):
    _fields_ = (("scale", c_float), ("offset", c_int32))


class _Encodings(ctypes.Union):
    """The first member, and the room that the largest (a bit width, an axis, a count, two pointers) takes."""

    _fields_ = (("scale_offset", _ScaleOffset), ("largest", c_void_p * 4))


class _Quantization(ctypes.Structure):
    _fields_ = (("definition", c_uint32), ("encoding", c_uint32), ("value", _Encodings))


class _Buffer(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("size", c_uint32))


class _TensorV2(ctypes.Structure):
    _fields_ = (
        ("id", c_uint32),
        ("name", c_char_p),
        ("type", c_uint32),
        ("format", c_uint32),
        ("dtype", c_uint32),
        ("quantization", _Quantization),
        ("rank", c_uint32),
        ("dimensions", POINTER(c_uint32)),
        ("memory", c_uint32),
        ("buffer", _Buffer),
        ("is_dynamic", POINTER(c_uint8)),
        ("sparse", c_uint32 * 3),
        ("is_produced", c_uint8),
    )


class _Tensor(ctypes.Structure):
    """Version 1 is the beginning of version 2, in the same room."""

    _fields_ = (("version", c_uint32), ("value", _TensorV2))


class _GraphV3(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("inputs", c_uint32),
        ("input", POINTER(_Tensor)),
        ("outputs", c_uint32),
        ("output", POINTER(_Tensor)),
        ("updateables", c_uint32),
        ("updateable", POINTER(_Tensor)),
        ("blob_bytes", c_uint32),
        ("blob", c_void_p),
        ("first_op", c_uint32),
        ("last_op", c_uint32),
    )


class _Graph(ctypes.Structure):
    _fields_ = (("version", c_uint32), ("value", _GraphV3))


class _BinaryV3(ctypes.Structure):
    _fields_ = (
        ("backend", c_uint32),
        ("build", c_char_p),
        ("core_api", _Version),
        ("backend_api", _Version),
        ("soc_version", c_char_p),
        ("blob_version", _Version),
        ("blob_bytes", c_uint64),
        ("tensors", c_uint32),
        ("tensor", POINTER(_Tensor)),
        ("graphs", c_uint32),
        ("graph", POINTER(_Graph)),
        ("platform", c_void_p),
        ("metadata_bytes", c_uint32),
        ("metadata", c_void_p),
        ("soc_model", c_uint32),
    )


class _Binary(ctypes.Structure):
    _fields_ = (("version", c_uint32), ("value", _BinaryV3))


_Create = ctypes.CFUNCTYPE(c_uint64, POINTER(c_void_p))
_GetMetaData = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_void_p, c_uint64, POINTER(POINTER(_Binary)))
_Free = ctypes.CFUNCTYPE(c_uint64, c_void_p)


class _Interface(ctypes.Structure):
    _fields_ = (
        ("backend", c_uint32),
        ("provider", c_char_p),
        ("version", _Version),
        ("create", c_void_p),
        ("get_binary_info", c_void_p),  # the older form of the next
        ("get_metadata", c_void_p),
        ("free", c_void_p),
    )


def contents(binary: bytes, where: object) -> BinaryContents:
    """What the context binary tells.

    Raises:
        InputError: it is none.
        TargetError: it tells it in a version that is not known here.
        UnavailableError: there is no libQnnSystem.
    """
    interface = _interface()
    create, metadata, free = _Create(interface.create), _GetMetaData(interface.get_metadata), _Free(interface.free)
    handle, found = c_void_p(), POINTER(_Binary)()
    if error := create(ctypes.byref(handle)):
        raise TargetError(f"{LIBRARY} does not start: error {error}")
    try:
        if error := metadata(handle, binary, len(binary), ctypes.byref(found)):
            raise InputError(f"{LIBRARY} cannot read the compiled binary: error {error}", where=where)
        about = found.contents
        _check("binary", about.version, (BINARY_INFO,))
        graphs = tuple(_graph(about.value.graph[index]) for index in range(about.value.graphs))
        return BinaryContents(about.value.build.decode(), about.value.soc_model, graphs)
    finally:
        free(handle)


def _graph(graph: Any) -> GraphBorder:
    _check("graph", graph.version, (GRAPH_INFO,))
    value = graph.value
    inputs, outputs = _tensors(value.input, value.inputs), _tensors(value.output, value.outputs)
    return GraphBorder(value.name.decode(), tuple(inputs), tuple(outputs))


def _tensors(array: Any, count: int) -> Iterator[TensorBorder]:
    for index in range(count):
        _check("tensor", array[index].version, TENSORS)
        tensor = array[index].value
        dtype = DTYPES.get(tensor.dtype, hex(tensor.dtype))
        shape = tuple(tensor.dimensions[axis] for axis in range(tensor.rank))
        told = tensor.quantization
        scale, zero = None, 0
        if told.definition == DEFINED and told.encoding == SCALE_OFFSET:
            scale, zero = told.value.scale_offset.scale, -told.value.scale_offset.offset
        yield TensorBorder(tensor.name.decode(), dtype, shape, scale, zero)


def _check(what: str, version: int, known: tuple[int, ...]) -> None:
    if version not in known:
        raise TargetError(
            f"{LIBRARY} describes a {what} in version {version}, and only {known[-1]} is known here",
            fix="install the version of onnxruntime-qnn that bluelm-export asks for",
        )


@cache
def _interface() -> _Interface:
    require("onnxruntime-qnn")
    spec = importlib.util.find_spec("onnxruntime_qnn")
    assert spec is not None and spec.origin is not None
    try:
        library = ctypes.CDLL(str(Path(spec.origin).parent / LIBRARY))
    except OSError as error:
        raise UnavailableError(f"{LIBRARY} does not load: {error}") from None
    providers = library.QnnSystemInterface_getProviders
    providers.restype, providers.argtypes = c_uint64, [POINTER(POINTER(POINTER(_Interface))), POINTER(c_uint32)]
    found, count = POINTER(POINTER(_Interface))(), c_uint32()
    if error := providers(ctypes.byref(found), ctypes.byref(count)):
        raise UnavailableError(f"{LIBRARY} offers nothing: error {error}")
    for index in range(count.value):
        interface = found[index].contents
        if interface.version.major == SYSTEM_API:
            return interface
    raise UnavailableError(f"{LIBRARY} offers no API of version {SYSTEM_API}")
