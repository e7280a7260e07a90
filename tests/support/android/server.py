"""The real runtimes for the app's Kotlin on a desktop's Java: `python -m tests.support.android.server MODEL`.

The Java classes beside this file have the names of Android's and the runtimes' own; tensors come from them through
standard input and go back through standard output (`host/Pipe.java`), big-endian numbers, little-endian data.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[str, Arrays], Mapping[str, np.ndarray]]


def onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(method: str, inputs: Arrays) -> Arrays:
        if method == "inputs":
            return {value.name: np.zeros(0, np.uint8) for value in session.get_inputs()}
        return dict(zip(names, map(np.asarray, session.run(names, inputs)), strict=True))

    return run


def executorch(path: Path) -> Run:
    return executorch_qnn(path) if path.with_name("methods.json").exists() else llm_module(path)


def llm_module(path: Path) -> Run:
    """TextLLMRunner, as LlmModule's C++ side calls it: the statistics, then each piece of text."""
    importlib.import_module("targets.arm64.xnnpack_worker")  # registers the operators that the AAR holds
    llm: Any = importlib.import_module("executorch.extension.llm.runner")
    held: dict[str, Any] = {}

    def run(method: str, inputs: Arrays) -> Arrays:
        given = list(inputs.values())
        if method == "load":
            held["runner"] = llm.TextLLMRunner(str(path), read(given[0]))
        elif method == "reset":
            held["runner"].reset()
        else:
            told: list[Any] = []
            pieces: list[str] = []
            length, temperature = int(given[1][0]), float(read(given[2]))
            config = llm.GenerationConfig(echo=method == "echo", seq_len=length, temperature=temperature, num_bos=0)
            held["runner"].generate(read(given[0]), config, pieces.append, told.append)
            counts = {"prompt_tokens": told[0].num_prompt_tokens, "generated_tokens": told[0].num_generated_tokens}
            return {str(index): written(text) for index, text in enumerate([json.dumps(counts), *pieces])}
        return {}

    return run


def executorch_qnn(path: Path) -> Run:
    """On the NPU's simulator; its border has the bits of int16 as float16."""
    from targets.host.child import next_core
    from targets.qualcomm import executorch as qnn
    from targets.qualcomm.executorch_messages import LoadProgram, Step

    methods = {
        method.name: method for found in qnn.read_methods(path.with_name("methods.json")).values() for method in found
    }
    child = qnn.start(next_core())
    child.call(LoadProgram(str(path), tuple(methods.values())), 600)

    def run(method: str, inputs: Arrays) -> Arrays:
        feeds = dict(zip(methods[method].inputs, inputs.values(), strict=True))
        found: Arrays = child.call(Step(method, feeds), 600)
        return {key: array.view(np.float16) if array.dtype == np.int16 else array for key, array in found.items()}

    return run


def genai(path: Path) -> Run:
    """The library as its Java classes call it; what gives nothing is nothing."""
    og: Any = importlib.import_module("onnxruntime_genai")
    model = og.Model(str(path))
    tokenizer, parameters, held = og.Tokenizer(model), og.GeneratorParams(model), dict[str, Any]()

    def rendered(template: np.ndarray, messages: np.ndarray) -> np.ndarray:
        return written(tokenizer.apply_chat_template(read(messages), template_str=read(template)))

    steps: dict[str, Callable[..., Any]] = {
        "encode": lambda text: tokenizer.encode(read(text)),
        "template": rendered,
        "stream": lambda: held.update(stream=tokenizer.create_stream()),
        "decode": lambda token: written(held["stream"].decode(int(token[0]))),
        "number": lambda name, value: parameters.set_search_options(**{read(name): float(read(value))}),
        "truth": lambda name, value: parameters.set_search_options(**{read(name): bool(value[0])}),
        "generator": lambda: held.update(generator=og.Generator(model, parameters)),
        "done": lambda: [held["generator"].is_done()],
        "count": lambda: [held["generator"].token_count()],
        "append": lambda tokens: held["generator"].append_tokens(tokens),
        "rewind": lambda length: held["generator"].rewind_to(int(length[0])),
        "next": lambda: held["generator"].generate_next_token(),
        "sequence": lambda: held["generator"].get_sequence(0),
    }

    def run(method: str, inputs: Arrays) -> Arrays:
        found = steps[method](*inputs.values())
        if found is None:
            return {}
        array = np.asarray(found)
        return {"0": array if array.dtype == np.uint8 else array.astype(np.int32)}

    return run


def litert_lm(path: Path) -> Run:
    lm: Any = importlib.import_module("litert_lm")
    engine = lm.Engine(str(path), backend=lm.Backend.CPU(), cache_dir=":nocache")
    held: dict[str, Any] = {}

    def begun(top_k: np.ndarray, top_p: np.ndarray, temperature: np.ndarray) -> None:
        drawn = {"top_p": float(read(top_p)), "temperature": float(read(temperature))}
        held["talk"] = engine.create_conversation(sampler_config=lm.SamplerConfig(top_k=int(top_k[0]), **drawn))

    def sent(text: np.ndarray) -> list[np.ndarray]:
        said, error = list[str](), ""
        try:
            for message in held["talk"].send_message_async(read(text)):
                said.append("".join(part["text"] for part in message["content"]))
        except RuntimeError as refused:
            error = str(refused)
        return [written(piece) for piece in [*said, error]]

    steps: dict[str, Callable[..., list[np.ndarray] | None]] = {
        "begin": begun,
        "count": lambda: [np.array([held["talk"].token_count], np.int32)],
        "send": sent,
        "end": lambda: held.pop("talk").close(),
    }

    def run(method: str, inputs: Arrays) -> Arrays:
        return {str(index): array for index, array in enumerate(steps[method](*inputs.values()) or ())}

    return run


def litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    runners = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}

    def run(method: str, inputs: Arrays) -> Arrays:
        asked = method.removeprefix("outputs of ")
        runner = runners[asked]
        if asked != method:
            details = runner.get_output_details()
            sizes = {name: int(np.prod(d["shape"])) * np.dtype(d["dtype"]).itemsize for name, d in details.items()}
            return {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
        details = runner.get_input_details()
        typed = {name: raw.view(details[name]["dtype"]).reshape(details[name]["shape"]) for name, raw in inputs.items()}
        return runner(**typed)

    return run


def read(text: np.ndarray) -> str:
    return text.tobytes().decode()


def written(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


RUNTIMES = {"": genai, ".onnx": onnx, ".pte": executorch, ".tflite": litert, ".litertlm": litert_lm}


def read_text(file: BinaryIO) -> str:
    (length,) = struct.unpack(">H", file.read(2))
    return file.read(length).decode()


def read_arrays(file: BinaryIO) -> Arrays:
    (count,) = struct.unpack(">i", file.read(4))
    arrays: Arrays = {}
    for index in range(count):
        name, kind = read_text(file), read_text(file)
        (rank,) = struct.unpack(">i", file.read(4))
        shape = struct.unpack(f">{rank}q", file.read(8 * rank))
        (length,) = struct.unpack(">i", file.read(4))
        data = np.frombuffer(file.read(length), kind)
        arrays[name or str(index)] = data.copy() if kind == "uint8" else data.reshape(shape).copy()
    return arrays


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    file.write(struct.pack(">i", len(arrays)))
    for name, array in arrays.items():
        for text in (name, str(array.dtype)):
            file.write(struct.pack(">H", len(text)) + text.encode())
        file.write(struct.pack(f">i{array.ndim}q", array.ndim, *array.shape))
        data = np.ascontiguousarray(array).tobytes()
        file.write(struct.pack(">i", len(data)) + data)
    file.flush()


def main(path: Path) -> None:
    """Serve one model until the input ends."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")  # runtimes may print: their words go to standard error
    os.dup2(2, 1)
    run = RUNTIMES[path.suffix](path)
    while requests.peek(1):  # type: ignore[attr-defined]
        write_arrays(answers, run(read_text(requests), read_arrays(requests)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
