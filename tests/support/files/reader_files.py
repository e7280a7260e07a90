"""Small valid files of every kind that the tool reads, and the code that reads them, for `readers.py`."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save, save_file

from bluelm.adapters import adapted
from bluelm.checkpoint import Checkpoint
from bluelm.config import ModelConfig
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from bluelm.trust.manifest import FolderManifest
from compress.checkpoint.quantized import QuantizedTensor
from compress.formats.adopt import adopt, given_recipe
from compress.formats.packed import PackedCheckpoint, open_weights
from compress.recipe import Recipe
from eval.accuracy.judge import DocumentSums
from eval.history import History, KeptRun
from eval.measurement import Measurement
from eval.report import Report
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import write_embedding
from export.bundle import build, keys
from export.lowering.ranges import Ranges
from tests.support import bundles
from tests.support.checkpoints import packed

ROWS, HIDDEN, INNER = 16, 8, 16


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


def read_checkpoint(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    opened.block(0)
    opened.embedding()


def index_files() -> Mapping[str, bytes]:
    files = dict(checkpoint())
    shard = "model-00001-of-00001.safetensors"
    files[shard] = files.pop("model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors(), shard)}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def torch_files() -> Mapping[str, bytes]:
    body = BytesIO()
    torch.save(tensors(), body)
    return {"config.json": checkpoint()["config.json"], "pytorch_model.bin": body.getvalue()}


@cache
def piece_bytes() -> bytes:
    """A SentencePiece model of a few hundred bytes."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((demo_checkpoint() / "tokenizer.model").read_bytes())
    del model.pieces[300:]
    return model.SerializeToString()


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode("你好 [|AI|]: a", bos=True, marks=True))


def tokenizer_json() -> bytes:
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import BPE

    fast = Fast(BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    fast.add_special_tokens(["<s>", "</s>"])
    return fast.to_str().encode()


BUNDLED = dict(bundles.FILES) | {"artifact/weights.bin": bytes(500)}


@cache
def bundle_file(kind: Literal["apk", "ipa"]) -> bytes:
    """A bundle that is one file."""
    with tempfile.TemporaryDirectory() as place:
        return bundles.make(kind, Path(place) / "x", bundles.development_keys(Path(place)), BUNDLED).read_bytes()


@cache
def bundle_files() -> Mapping[str, bytes]:
    """A signed folder, and its keys."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        signing = bundles.development_keys(folder)
        out: dict[str, bytes] = {}
        made = bundles.make("folder", folder / "x", signing, BUNDLED)
        for path in sorted(p for p in made.rglob("*") if p.is_file()):
            out[f"x-folder/{path.relative_to(made).as_posix()}"] = path.read_bytes()
        form = keys.serialization.PublicFormat.SubjectPublicKeyInfo
        public = signing.model.private.public_key()
        out["key.pub"] = public.public_bytes(keys.serialization.Encoding.PEM, form)
        out["key.pem"] = (folder / "development.pem").read_bytes()
    return out


def app_files() -> Mapping[str, bytes]:
    with zipfile.ZipFile(BytesIO(bundle_file("ipa"))) as archive:
        home = "Payload/bluelm-demo.app/"
        return {f"A.app/{n}": archive.read(home + n) for n in ("Info.plist", "BundleRunner", "PkgInfo")}


def read_app(folder: Path) -> None:
    signing = bundles.development_keys(folder.parent)
    made = build.make(bundles.draft("ipa"), [], signing, folder / "out", build.Options(runner=folder / "A.app"))
    made.unlink()


def folder_manifest() -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "a").write_bytes(b"a")
        FolderManifest.of(Path(place)).save(Path(place) / "m.json")
        return {"m.json": (Path(place) / "m.json").read_bytes()}


def run_files() -> Mapping[str, bytes]:
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
    from tests.support.checkpoints.shapes import tiny_checkpoint

    with tempfile.TemporaryDirectory() as place:
        model = Checkpoint.open(tiny_checkpoint(Path(place) / "model"))
        recipe = Recipe.load("w4-g32", method="rtn", samples=1, length=16)
        samples = load_samples(None, model.tokenizer(), 1, 16, 0)
        quantize(model, samples, recipe, Path(place) / "q")
        files = {p.relative_to(Path(place) / "q").as_posix(): p for p in (Path(place) / "q").rglob("*")}
        return {name: path.read_bytes() for name, path in files.items() if path.is_file()}


# Layouts of quantized checkpoints: how a linear is packed, and what says so.
SETTINGS: dict[str, dict[str, Any]] = {
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
PACKS = {"gptq": packed.gptq, "awq": packed.awq, "compressed-tensors": packed.compressed}


@cache
def packed_files(method: str) -> Mapping[str, bytes]:
    """A checkpoint of one block that another tool quantized; GPTQ's with an order of its own."""
    shape = {"layers": 1, "hidden": 32, "inner": 32, "heads": 2, "kv_heads": 1, "vocab": 384, "layer_norm": False}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "m"
        scattered = method == "gptq"
        packed.write_packed(folder, PACKS[method], SETTINGS[method], shape=shape, group=16, scattered=scattered)
        small = load_file(folder / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):  # most bytes shall be the linears'
            small[name] = small[name][:ROWS].clone()
        save_file(small, folder / "model.safetensors")
        return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def read_packed(folder: Path) -> None:
    weights = open_weights(folder)
    weights.block(0)
    if isinstance(weights, PackedCheckpoint):
        recipe = given_recipe(weights, Recipe.load("w4-g32"))
        shutil.rmtree(folder / "out", ignore_errors=True)
        adopt(weights, recipe, folder / "out").verify()


def embedding_bytes() -> bytes:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (4, 32), dtype=torch.uint8, generator=generator)
    weight = QuantizedTensor(
        codes, torch.ones(4, 1, dtype=torch.float16), torch.full((4, 1), 128, dtype=torch.uint8), 8, -1
    )
    with tempfile.TemporaryDirectory() as place:
        write_embedding(Path(place) / "e", weight)
        return (Path(place) / "e").read_bytes()


def parquet_bytes() -> bytes:
    import pyarrow
    import pyarrow.parquet

    body = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "你好"]}), body)
    return body.getvalue()


@cache
def adapter_files() -> Mapping[str, bytes]:
    """A LoRA adapter of one linear, beside the checkpoint that it belongs to."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "rank_pattern": {"k_proj": 1}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True,
    }  # fmt: skip
    sides = {f"{name}.lora_A.weight": torch.ones(2, HIDDEN), f"{name}.lora_B.weight": torch.ones(HIDDEN, 2)}
    base = {f"base/{file}": data for file, data in checkpoint().items()}
    return base | {"a/adapter_config.json": json.dumps(config).encode(), "a/adapter_model.safetensors": save(sides)}


def read_adapter(folder: Path) -> None:
    merged = adapted(Checkpoint.open(folder / "base"), [(folder / "a", 0.5)])
    merged.block(0)
    merged.digest()


def gguf_config() -> ModelConfig:
    values = json.loads(checkpoint()["config.json"])
    values |= {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return ModelConfig.from_dict(values, Path("config.json"))


@cache
def gguf_bytes() -> bytes:
    """A GGUF file of one block, 32 wide, as the exporter lays it out."""
    import gguf

    from export.gguf import export as gguf_file

    config = gguf_config()
    with tempfile.TemporaryDirectory() as place:
        writer = gguf.GGUFWriter(Path(place) / "m.gguf", gguf_file.architecture(config))
        gguf_file.add_model(writer, config, 64)
        writer.add_token_list(["<s>", "a", "你"])
        for name, source in gguf_file.tensors(config):
            rows = ROWS if source in ("model.embed_tokens", "lm_head") else 32
            if gguf_file.is_linear(config, source):
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


def read_gguf(folder: Path) -> None:
    from export.gguf.reader import GgufWeights

    found = GgufWeights(folder / "m.gguf", gguf_config())
    found.block(0)
    found.embedding()
    found.final_norm()
    found.head()
    found.quantized("output.weight")


def history_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        history = History(Path(place) / "h.sqlite")
        history.append(KeptRun("t", "x", True, (Measurement("mean_kl", 0.1, "nats/token", "measured"),), {"a": [1]}))
        return history.path.read_bytes()


def read_history(folder: Path) -> None:
    for run in History(folder / "h.sqlite").runs():
        run.figure("mean_kl")


def baseline_report() -> Report:
    """A report whose scores lie there document by document."""
    ones = (1.0, 2.0)
    sums = DocumentSums(("en", "en"), (3, 4), ones, ones, ones, ones, ones)
    figures = tuple(
        Measurement(name, 0.5, "", "measured", 0.1, 2, "", "cpu") for name in ("mean_kl", "p99_kl", "perplexity_ratio")
    )
    whole = json.loads(run_files()["report.json"])
    made = Report.model_validate(whole | {"artifacts": {"cpu": {"folder": "a", "on": "cpu"}}})
    return made.model_copy(update={"documents": {"cpu": sums}, "measurements": figures, "inputs": {"evaluation": "e"}})


def ranges_bytes() -> bytes:
    return Ranges(weights="0", samples=1, length=8, values={"a": (-1.0, 2.0)}).model_dump_json().encode()


def read_ranges(folder: Path) -> None:
    ranges = Ranges.load(folder / "r.json")
    for name in ranges.values:
        ranges.encoding(name)
