"""Everything that reads foreign bytes, each with a small valid input to mutate: for fuzzing, here and in benchmarks.

A reader gets a folder in which one file was changed. It may accept it, or raise an ExportError; anything else is a
fault. `allowed` decides.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

from bluelm.adapters import adapted
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.errors import ExportError
from bluelm.files import demo_checkpoint
from bluelm.manifest import FolderManifest
from bluelm.safety import check_folder
from bluelm.signature import Trust
from bluelm.signature import verify_folder as verify_signature
from bluelm.tokenizer import Tokenizer
from calibration.sources import read_texts
from compress.formats.adopt import adopt, given_recipe
from compress.formats.packed import PackedCheckpoint, open_weights
from compress.quantized import QuantizedTensor
from compress.recipe import Recipe
from compress.store import QuantizedCheckpoint
from eval import budget_file
from eval.baseline import regressions
from eval.history import History, Run
from eval.judge import WindowSums
from eval.measurement import Measurement
from eval.report import Report
from export.artifact import Artifact
from export.bundle import build, keys
from export.embedding import EmbeddingTable, write_embedding
from export.ranges import Ranges
from targets.runners import load_runner
from tests import bundles, packed

ROWS, HIDDEN, INNER = 16, 8, 16


@dataclass(frozen=True)
class Reader:
    """A way in: valid files by name, which of them is mutated, and the code that reads the folder.

    `exact`: what is signed, so that nothing but the valid input may be accepted.
    """

    files: Mapping[str, bytes]
    target: str
    read: Callable[[Path], object]
    exact: bool = False

    @property
    def seed(self) -> bytes:
        return self.files[self.target]

    def write(self, folder: Path) -> None:
        """The valid files into a folder."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def allowed(reader: Reader, folder: Path, data: bytes) -> bool:
    """Read the folder with `data` as the target; True when it was accepted, False when it was refused.

    Raises:
        whatever a faulty reader lets through.
    """
    (folder / reader.target).write_bytes(data)
    try:
        reader.read(folder)
    except ExportError:
        return False
    if reader.exact and data != reader.seed:
        raise AssertionError("a changed bundle was accepted")
    return True


def tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "model.embed_tokens.weight": (ROWS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (ROWS, HIDDEN),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        **{f"model.layers.0.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    }
    return {name: torch.full(shape, 0.5) for name, shape in shapes.items()}


@cache
def checkpoint() -> Mapping[str, bytes]:
    """A checkpoint of one block, eight wide."""
    config = json.loads((demo_checkpoint() / "config.json").read_text())
    config |= {
        "vocab_size": ROWS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "use_stable_embedding": False,
    }
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors())}


def _read_checkpoint(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    opened.block(0)
    opened.embedding()


def _index() -> Mapping[str, bytes]:
    files = dict(checkpoint())
    shard = "model-00001-of-00001.safetensors"
    files[shard] = files.pop("model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors(), shard)}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def _torch_files() -> Mapping[str, bytes]:
    body = BytesIO()
    torch.save(tensors(), body)
    return {"config.json": checkpoint()["config.json"], "pytorch_model.bin": body.getvalue()}


@cache
def _pieces() -> bytes:
    """A SentencePiece model of a few hundred bytes."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((demo_checkpoint() / "tokenizer.model").read_bytes())
    del model.pieces[300:]
    return model.SerializeToString()


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode("你好 [|AI|]: a", bos=True, marks=True))


def _tokenizer_json() -> bytes:
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import BPE

    fast = Fast(BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    fast.add_special_tokens(["<s>", "</s>"])
    return fast.to_str().encode()


@cache
def _bundles() -> Mapping[str, bytes]:
    """One bundle of each kind that is a file, and a signed folder."""
    files = dict(bundles.FILES) | {"artifact/weights.bin": bytes(500)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        signing = bundles.development_keys(folder)
        out: dict[str, bytes] = {}
        for kind in ("apk", "ipa"):
            out[f"x.{kind}"] = bundles.make(kind, folder / "x", signing, files).read_bytes()
        made = bundles.make("folder", folder / "x", signing, files)
        for path in sorted(p for p in made.rglob("*") if p.is_file()):
            out[f"x-folder/{path.relative_to(made).as_posix()}"] = path.read_bytes()
        form = keys.serialization.PublicFormat.SubjectPublicKeyInfo
        public = signing.model.private.public_key()
        out["key.pub"] = public.public_bytes(keys.serialization.Encoding.PEM, form)
        out["key.pem"] = (folder / "development.pem").read_bytes()
    return out


def _app() -> Mapping[str, bytes]:
    with zipfile.ZipFile(BytesIO(_bundles()["x.ipa"])) as archive:
        home = "Payload/bluelm-demo.app/"
        return {f"A.app/{n}": archive.read(home + n) for n in ("Info.plist", "BundleRunner", "PkgInfo")}


def _read_app(folder: Path) -> None:
    signing = bundles.development_keys(folder.parent)
    made = build.make(bundles.draft("ipa"), [], signing, folder / "out", build.Options(runner=folder / "A.app"))
    made.unlink()


def _signed(target: str) -> Reader:
    wanted = {name: data for name, data in _bundles().items() if name.startswith("x-folder/")}
    return Reader(wanted, f"x-folder/{target}", lambda folder: build.verify(folder / "x-folder"), True)


def _folder_manifest() -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "a").write_bytes(b"a")
        FolderManifest.of(Path(place)).save(Path(place) / "m.json")
        return {"m.json": (Path(place) / "m.json").read_bytes()}


def _run_files() -> Mapping[str, bytes]:
    """A report and an artifact's description, as small as they can be."""
    report = Report(
        passed=True, title="t", target="x", configuration={}, inputs={}, versions={}, artifacts={}, stages=(),
        measurements=(), budget={}, checks=(),
    )  # fmt: skip
    config = ModelConfig.from_dict(json.loads(checkpoint()["config.json"]), Path("config.json"))
    artifact = Artifact(
        format="onnx-cpu", model=config, context=64, chunk=16, mask_value=-1.0, cache="float32", parameters=1,
        bits_per_weight=4.5, quantized_digest="0", producers={}, files=(),
    )  # fmt: skip
    return {"report.json": report.model_dump_json().encode(), "artifact.json": artifact.model_dump_json().encode()}


@cache
def quantized() -> Mapping[str, bytes]:
    """A quantized checkpoint of the smallest model that the tool quantizes."""
    from calibration.samples import load_samples
    from compress.engine import quantize
    from tests.tiny import tiny_checkpoint

    with tempfile.TemporaryDirectory() as place:
        model = Checkpoint.open(tiny_checkpoint(Path(place) / "model"))
        recipe = Recipe.load("w4-g32", method="rtn", samples=1, length=16)
        samples = load_samples(None, model.tokenizer(), 1, 16, 0)
        quantize(model, samples, recipe, Path(place) / "q")
        files = {p.relative_to(Path(place) / "q").as_posix(): p for p in (Path(place) / "q").rglob("*")}
        return {name: path.read_bytes() for name, path in files.items() if path.is_file()}


def _quantized(target: str) -> Reader:
    return Reader(quantized(), target, QuantizedCheckpoint.open)


# Layouts of quantized checkpoints: how a linear is packed, and what says so.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 16,
                    "symmetric": False,
                },
            }
        },
        "ignore": ["lm_head"],
    },
}
_PACKS = {"gptq": packed.gptq, "awq": packed.awq, "compressed-tensors": packed.compressed}


@cache
def _packed(method: str) -> Mapping[str, bytes]:
    """A checkpoint of one block that another tool quantized; GPTQ's with an order of its own."""
    shape = {"layers": 1, "hidden": 32, "inner": 32, "heads": 2, "kv_heads": 1, "vocab": 384, "layer_norm": False}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "m"
        scattered = method == "gptq"
        packed.write_packed(folder, _PACKS[method], _SETTINGS[method], shape=shape, group=16, scattered=scattered)
        small = load_file(folder / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):  # most bytes shall be the linears'
            small[name] = small[name][:ROWS].clone()
        save_file(small, folder / "model.safetensors")
        return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def _read_packed(folder: Path) -> None:
    weights = open_weights(folder)
    weights.block(0)
    if isinstance(weights, PackedCheckpoint):
        recipe = given_recipe(weights, Recipe.load("w4-g32"))
        shutil.rmtree(folder / "out", ignore_errors=True)
        adopt(weights, recipe, folder / "out").verify()


def _packed_reader(method: str, target: str) -> Reader:
    return Reader(_packed(method), target, _read_packed)


def _beside() -> Reader:
    """GPTQ's settings in a file of their own, as AutoGPTQ wrote them."""
    files = dict(_packed("gptq"))
    config = json.loads(files["config.json"])
    settings = json.dumps(config.pop("quantization_config")).encode()
    files |= {"config.json": json.dumps(config).encode(), "quantize_config.json": settings}
    return Reader(files, "quantize_config.json", _read_packed)


def _embedding() -> bytes:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (4, 32), dtype=torch.uint8, generator=generator)
    weight = QuantizedTensor(
        codes, torch.ones(4, 1, dtype=torch.float16), torch.full((4, 1), 128, dtype=torch.uint8), 8, -1
    )
    with tempfile.TemporaryDirectory() as place:
        write_embedding(Path(place) / "e", weight)
        return (Path(place) / "e").read_bytes()


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    body = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "你好"]}), body)
    return body.getvalue()


@cache
def _adapter() -> Mapping[str, bytes]:
    """A LoRA adapter of one linear, beside the checkpoint that it belongs to."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "rank_pattern": {"k_proj": 1}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True,
    }  # fmt: skip
    sides = {f"{name}.lora_A.weight": torch.ones(2, HIDDEN), f"{name}.lora_B.weight": torch.ones(HIDDEN, 2)}
    base = {f"base/{file}": data for file, data in checkpoint().items()}
    return base | {"a/adapter_config.json": json.dumps(config).encode(), "a/adapter_model.safetensors": save(sides)}


def _read_adapter(folder: Path) -> None:
    merged = adapted(Checkpoint.open(folder / "base"), [(folder / "a", 0.5)])
    merged.block(0)
    merged.digest()


def _gguf_config() -> ModelConfig:
    values = json.loads(checkpoint()["config.json"])
    values |= {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return ModelConfig.from_dict(values, Path("config.json"))


@cache
def _gguf() -> bytes:
    """A GGUF file of one block, 32 wide, as the exporter lays it out."""
    import gguf

    from export import gguf_file

    config = _gguf_config()
    with tempfile.TemporaryDirectory() as place:
        writer = gguf.GGUFWriter(Path(place) / "m.gguf", gguf_file.architecture(config))
        gguf_file.add_model(writer, config, 64)
        writer.add_token_list(["<s>", "a", "你"])
        for name, source in gguf_file.tensors(config):
            rows = ROWS if source in ("model.embed_tokens", "lm_head") else 32
            if gguf_file.is_linear(source):
                codes = torch.full((rows, 32), 9, dtype=torch.uint8)
                scales, zeros = torch.ones(rows, 1, dtype=torch.float16), torch.full((rows, 1), 8, dtype=torch.uint8)
                blocks = gguf_file.pack(QuantizedTensor(codes, scales, zeros, 4, 32), source)
                writer.add_tensor(name, blocks, raw_dtype=gguf_file.Q4)
            else:
                writer.add_tensor(name, torch.ones(rows).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(place) / "m.gguf").read_bytes()


def _read_gguf(folder: Path) -> None:
    from export.gguf_reader import GgufWeights

    found = GgufWeights(folder / "m.gguf", _gguf_config())
    found.block(0)
    found.embedding()
    found.final_norm()
    found.head()
    found.quantized("output.weight")


def _history() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        history = History(Path(place) / "h.sqlite")
        history.append(Run("t", "x", True, (Measurement("mean_kl", 0.1, "nats/token", "measured"),), {"a": [1]}))
        return history.path.read_bytes()


def _read_history(folder: Path) -> None:
    for run in History(folder / "h.sqlite").runs():
        run.figure("mean_kl")


def _baseline() -> Report:
    """A report whose scores lie there window by window."""
    ones = (1.0, 2.0)
    sums = WindowSums(("en", "en"), (3, 4), ones, ones, ones, ones, ones)
    figures = tuple(
        Measurement(name, 0.5, "", "measured", 0.1, 2, "", "cpu") for name in ("mean_kl", "p99_kl", "perplexity_ratio")
    )
    whole = json.loads(_run_files()["report.json"])
    made = Report.model_validate(whole | {"artifacts": {"cpu": {"folder": "a", "on": "cpu"}}})
    return made.model_copy(update={"windows": {"cpu": sums}, "measurements": figures, "inputs": {"evaluation": "e"}})


def _ranges() -> bytes:
    return Ranges(weights="0", samples=1, length=8, values={"a": (-1.0, 2.0)}).model_dump_json().encode()


def _read_ranges(folder: Path) -> None:
    ranges = Ranges.load(folder / "r.json")
    for name in ranges.values:
        ranges.encoding(name)


READERS: dict[str, Callable[[], Reader]] = {
    "safetensors": lambda: Reader(checkpoint(), "model.safetensors", _read_checkpoint),
    "index": lambda: Reader(_index(), "model.safetensors.index.json", _read_checkpoint),
    "config": lambda: Reader(checkpoint(), "config.json", _read_checkpoint),
    "torch file": lambda: Reader(_torch_files(), "pytorch_model.bin", _read_checkpoint),
    "folder with a torch file": lambda: Reader(_torch_files(), "pytorch_model.bin", check_folder),
    "tokenizer.model": lambda: Reader({"tokenizer.model": _pieces()}, "tokenizer.model", _read_tokenizer),
    "tokenizer.json": lambda: Reader({"tokenizer.json": _tokenizer_json()}, "tokenizer.json", _read_tokenizer),
    "added tokens": lambda: Reader(
        {"tokenizer.model": _pieces(), "added_tokens.json": b'{"[|Function|]:": 300, "<x>": 301}'},
        "added_tokens.json",
        _read_tokenizer,
    ),
    "tokenizer config": lambda: Reader(
        {
            "tokenizer.model": _pieces(),
            "tokenizer_config.json": b'{"legacy": false, "added_tokens_decoder": {"300": {"content": "<x>", '
            b'"lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true}}}',
        },
        "tokenizer_config.json",
        _read_tokenizer,
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
        {"e.safetensors": _embedding()},
        "e.safetensors",
        lambda folder: EmbeddingTable.open(folder / "e.safetensors").rows([0, 1]),
    ),
    "calibration parquet": lambda: Reader(
        {"t.parquet": _parquet()}, "t.parquet", lambda folder: read_texts([folder / "t.parquet"])
    ),
    "adapter config": lambda: Reader(_adapter(), "a/adapter_config.json", _read_adapter),
    "adapter tensors": lambda: Reader(_adapter(), "a/adapter_model.safetensors", _read_adapter),
    "GGUF": lambda: Reader({"m.gguf": _gguf()}, "m.gguf", _read_gguf),
    "history": lambda: Reader({"h.sqlite": _history()}, "h.sqlite", _read_history),
    "baseline": lambda: Reader(
        {"b.json": _baseline().model_dump_json().encode()},
        "b.json",
        lambda folder: regressions(_baseline(), Report.read(folder / "b.json"), 0.95),
    ),
    "activation ranges": lambda: Reader({"r.json": _ranges()}, "r.json", _read_ranges),
    "runner configuration": lambda: Reader(
        {"r.yaml": b"onnx-cpu: {binary: /x/perf_test, libraries: [/x/lib.so], environment: {A: b}}\n"},
        "r.yaml",
        lambda folder: load_runner("onnx-cpu", folder / "r.yaml"),
    ),
    "report": lambda: Reader(_run_files(), "report.json", Report.open),
    "artifact": lambda: Reader(_run_files(), "artifact.json", Artifact.open),
    "quantized manifest": lambda: _quantized("quantized.json"),
    "quantized tensors": lambda: _quantized("head.safetensors"),
    "folder manifest": lambda: Reader(
        _folder_manifest(), "m.json", lambda folder: FolderManifest.open(folder / "m.json")
    ),
    "signature": lambda: Reader(
        {name: data for name, data in _bundles().items() if name.startswith(("x-folder/", "key.pub"))},
        "x-folder/model.sig",
        lambda folder: verify_signature(folder / "x-folder", folder / "x-folder/model.sig", Trust(folder / "key.pub")),
    ),
    "signing key": lambda: Reader(
        {"key.pem": _bundles()["key.pem"]}, "key.pem", lambda folder: keys.load_key(folder / "key.pem")
    ),
    "apk": lambda: Reader({"x.apk": _bundles()["x.apk"]}, "x.apk", lambda folder: build.verify(folder / "x.apk"), True),
    "ipa": lambda: Reader({"x.ipa": _bundles()["x.ipa"]}, "x.ipa", lambda folder: build.verify(folder / "x.ipa"), True),
    "bundle manifest": lambda: _signed("manifest.json"),
    "bundle certificate": lambda: _signed("signer.pem"),
    "bundle signature": lambda: _signed("model.sig"),
    "runner executable": lambda: Reader(_app(), "A.app/BundleRunner", _read_app),
    "runner Info.plist": lambda: Reader(_app(), "A.app/Info.plist", _read_app),
}


def fresh(reader: Reader, folder: Path) -> Path:
    """An empty folder with the reader's valid files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader.write(folder)
    return folder
