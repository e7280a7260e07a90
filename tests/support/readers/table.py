"""The readers of weights, settings, artifacts, bundles and reports."""

from __future__ import annotations

import json
from collections.abc import Callable

from bluelm.trust.manifest import FolderManifest
from bluelm.trust.safety import check_folder
from bluelm.trust.signature import Trust
from bluelm.trust.signature import verify_folder as verify_signature
from calibration.sources import read_texts
from compress.checkpoint.store import QuantizedCheckpoint
from compress.recipe import Recipe
from eval.baseline import regressions
from eval.budget import budget_file
from eval.report import Report
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable
from export.bundle import build, keys
from targets.phones.programs import load_program
from tests.support.files import artifact_files as artifacts
from tests.support.files import reader_files as valid
from tests.support.readers.reader import Reader


def _signed(target: str) -> Reader:
    wanted = {name: data for name, data in valid.bundle_files().items() if name.startswith("x-folder/")}
    return Reader(wanted, f"x-folder/{target}", lambda folder: build.verify(folder / "x-folder"), True)


def _quantized(target: str) -> Reader:
    return Reader(valid.quantized(), target, QuantizedCheckpoint.open)


def _packed_reader(method: str, target: str) -> Reader:
    return Reader(valid.packed_files(method), target, valid.read_packed)


def _beside() -> Reader:
    """GPTQ's settings in a file of their own, as AutoGPTQ wrote them."""
    own = dict(valid.packed_files("gptq"))
    config = json.loads(own["config.json"])
    settings = json.dumps(config.pop("quantization_config")).encode()
    own |= {"config.json": json.dumps(config).encode(), "quantize_config.json": settings}
    return Reader(own, "quantize_config.json", valid.read_packed)


def _artifact(kind: str, target: str) -> Reader:
    return Reader(artifacts.artifact_files(kind), f"a/{target}", artifacts.read_artifact)


PACKAGE = "model.mlpackage"
LONG_TO_MAKE = ("Core ML manifest", "Core ML program", "Core ML weights", "ExecuTorch")
"""Readers whose valid input takes seconds to make."""
READERS: dict[str, Callable[[], Reader]] = {
    "safetensors": lambda: Reader(valid.checkpoint(), "model.safetensors", valid.read_checkpoint),
    "index": lambda: Reader(valid.index_files(), "model.safetensors.index.json", valid.read_checkpoint),
    "config": lambda: Reader(valid.checkpoint(), "config.json", valid.read_checkpoint),
    "torch file": lambda: Reader(valid.torch_files(), "pytorch_model.bin", valid.read_checkpoint),
    "folder with a torch file": lambda: Reader(valid.torch_files(), "pytorch_model.bin", check_folder),
    "tokenizer.model": lambda: Reader(
        {"tokenizer.model": valid.piece_bytes()}, "tokenizer.model", valid.read_tokenizer
    ),
    "tokenizer.json": lambda: Reader(
        {"tokenizer.json": valid.tokenizer_json()}, "tokenizer.json", valid.read_tokenizer
    ),
    "added tokens": lambda: Reader(
        {"tokenizer.model": valid.piece_bytes(), "added_tokens.json": b'{"[|Function|]:": 300, "<x>": 301}'},
        "added_tokens.json",
        valid.read_tokenizer,
    ),
    "tokenizer config": lambda: Reader(
        {
            "tokenizer.model": valid.piece_bytes(),
            "tokenizer_config.json": b'{"legacy": false, "added_tokens_decoder": {"300": {"content": "<x>", '
            b'"lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true}}}',
        },
        "tokenizer_config.json",
        valid.read_tokenizer,
    ),
    "calibration jsonl": lambda: Reader(
        {"t.jsonl": b'{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n'},
        "t.jsonl",
        lambda folder: read_texts([folder / "t.jsonl"]),
    ),
    "recipe": lambda: Reader(
        {"r.yaml": b"method: gptq\nbits: 4\ngroup_size: 32\nsymmetric: true\n"},
        "r.yaml",
        lambda folder: Recipe.load(folder / "r.yaml"),
    ),
    "budget": lambda: Reader(
        {"b.yaml": b"extends: default\nmin_decode_tokens_per_s: {at_least: 5, accept: [measured]}\n"},
        "b.yaml",
        lambda folder: budget_file.load(folder / "b.yaml"),
    ),
    "recipe of single linears": lambda: Reader(
        {
            "r.yaml": b"method: awq+gptq\nbits: auto\nsize: 3.2 GB\nlayers:\n"
            b"  model.layers.0.mlp.down_proj: {bits: 8, group_size: -1}\n"
        },
        "r.yaml",
        lambda folder: Recipe.load(folder / "r.yaml"),
    ),
    "budget of targets and sizes": lambda: Reader(
        {
            "b.yaml": b"extends: [base.yaml]\nsizes: [{up_to: 1.5B, max_perplexity_ratio: 1.04}]\n"
            b"targets:\n  snapdragon: {max_artifact_bytes: 2 GB, sizes: [{up_to: 4B, max_mean_kl: 0.1}]}\n",
            "base.yaml": b"max_mean_kl: 0.01\n",
        },
        "b.yaml",
        lambda folder: budget_file.load(folder / "b.yaml"),
    ),
    "GPTQ tensors": lambda: _packed_reader("gptq", "model.safetensors"),
    "GPTQ config": lambda: _packed_reader("gptq", "config.json"),
    "GPTQ settings": _beside,
    "AWQ tensors": lambda: _packed_reader("awq", "model.safetensors"),
    "AWQ config": lambda: _packed_reader("awq", "config.json"),
    "compressed-tensors tensors": lambda: _packed_reader("compressed-tensors", "model.safetensors"),
    "compressed-tensors config": lambda: _packed_reader("compressed-tensors", "config.json"),
    "embedding": lambda: Reader(
        {"e.safetensors": valid.embedding_bytes()},
        "e.safetensors",
        lambda folder: EmbeddingTable.open(folder / "e.safetensors").rows([0, 1]),
    ),
    "calibration parquet": lambda: Reader(
        {"t.parquet": valid.parquet_bytes()}, "t.parquet", lambda folder: read_texts([folder / "t.parquet"])
    ),
    "adapter config": lambda: Reader(valid.adapter_files(), "a/adapter_config.json", valid.read_adapter),
    "adapter tensors": lambda: Reader(valid.adapter_files(), "a/adapter_model.safetensors", valid.read_adapter),
    "GGUF": lambda: Reader({"m.gguf": valid.gguf_bytes()}, "m.gguf", valid.read_gguf),
    "history": lambda: Reader({"h.sqlite": valid.history_bytes()}, "h.sqlite", valid.read_history),
    "baseline": lambda: Reader(
        {"b.json": valid.baseline_report().model_dump_json().encode()},
        "b.json",
        lambda folder: regressions(valid.baseline_report(), Report.read(folder / "b.json"), 0.95),
    ),
    "activation ranges": lambda: Reader({"r.json": valid.ranges_bytes()}, "r.json", valid.read_ranges),
    "runner configuration": lambda: Reader(
        {"r.yaml": b"onnx-cpu: {binary: /x/perf_test, libraries: [/x/lib.so], environment: {A: b}}\n"},
        "r.yaml",
        lambda folder: load_program("onnx-cpu", folder / "r.yaml"),
    ),
    "report": lambda: Reader(valid.run_files(), "report.json", Report.open),
    "artifact": lambda: Reader(valid.run_files(), "artifact.json", Artifact.open),
    "quantized manifest": lambda: _quantized("quantized.json"),
    "quantized tensors": lambda: _quantized("head.safetensors"),
    "folder manifest": lambda: Reader(
        valid.folder_manifest(), "m.json", lambda folder: FolderManifest.open(folder / "m.json")
    ),
    "signature": lambda: Reader(
        {name: data for name, data in valid.bundle_files().items() if name.startswith(("x-folder/", "key.pub"))},
        "x-folder/model.sig",
        lambda folder: verify_signature(folder / "x-folder", folder / "x-folder/model.sig", Trust(folder / "key.pub")),
    ),
    "signing key": lambda: Reader(
        {"key.pem": valid.bundle_files()["key.pem"]}, "key.pem", lambda folder: keys.load_key(folder / "key.pem")
    ),
    "apk": lambda: Reader(
        {"x.apk": valid.bundle_file("apk")}, "x.apk", lambda folder: build.verify(folder / "x.apk"), True
    ),
    "ipa": lambda: Reader(
        {"x.ipa": valid.bundle_file("ipa")}, "x.ipa", lambda folder: build.verify(folder / "x.ipa"), True
    ),
    "bundle manifest": lambda: _signed("manifest.json"),
    "bundle certificate": lambda: _signed("signer.pem"),
    "bundle signature": lambda: _signed("model.sig"),
    "ONNX graph": lambda: _artifact("onnx", "prefill.onnx"),
    "ONNX weights": lambda: _artifact("onnx", "weights.bin"),
    "LiteRT": lambda: _artifact("litert", "model.tflite"),
    "Core ML manifest": lambda: _artifact("coreml", f"{PACKAGE}/Manifest.json"),
    "Core ML program": lambda: _artifact("coreml", f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"),
    "Core ML weights": lambda: _artifact("coreml", f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"),
    "ExecuTorch": lambda: _artifact("executorch", "model.pte"),
    "folder in a program": lambda: Reader(
        {"f.bin": artifacts.flattened()}, "f.bin", lambda folder: artifacts.read_flattened(folder / "f.bin")
    ),
    "runner executable": lambda: Reader(valid.app_files(), "A.app/BundleRunner", valid.read_app),
    "runner Info.plist": lambda: Reader(valid.app_files(), "A.app/Info.plist", valid.read_app),
}
