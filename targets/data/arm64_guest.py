"""Runs inside qemu-aarch64: loads an artifact's graphs and answers steps over its standard input and output.

arguments: onnx PREFILL DECODE, or litert MODEL. A message is its length in 8 bytes, then an .npz: to
here the inputs of a step, with `graph` its name; back the outputs. An empty message says that the
graphs are loaded.
"""

import io
import os
import sys

sys.path.insert(0, "/opt/site")
import numpy as np

GRAPHS = ("prefill", "decode")


def load_onnx(paths):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    opened = {path: onnxruntime.InferenceSession(path, options, providers=providers) for path in dict.fromkeys(paths)}
    sessions = {name: opened[path] for name, path in zip(GRAPHS, paths, strict=True)}  # one file may hold both

    def run(name, feeds):
        names = [output.name for output in sessions[name].get_outputs()]
        return dict(zip(names, sessions[name].run(names, feeds), strict=True))

    return run


def load_litert(paths):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=paths[0], num_threads=1)
    interpreter.allocate_tensors()
    runners = {name: interpreter.get_signature_runner(name) for name in GRAPHS}
    return lambda name, feeds: runners[name](**feeds)


def main(kind, *paths):
    said, heard = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what libraries print must not stand between messages
    run = {"onnx": load_onnx, "litert": load_litert}[kind](paths)
    said.write((0).to_bytes(8, "little"))
    said.flush()
    while True:
        size = heard.read(8)
        if len(size) < 8:
            return
        feeds = dict(np.load(io.BytesIO(heard.read(int.from_bytes(size, "little")))))
        name = str(feeds.pop("graph"))
        answer = io.BytesIO()
        np.savez(answer, **run(name, feeds))
        said.write(len(answer.getvalue()).to_bytes(8, "little") + answer.getvalue())
        said.flush()


main(*sys.argv[1:])
