"""Small bundles for the tests: made-up files, a real manifest."""

from __future__ import annotations

from pathlib import Path

from export.bundle import build, keys, manifest, payload
from export.bundle.build import Input
from export.bundle.manifest import Format
from export.bundle.zip32 import BytesSource
from tests.packages import need

NOBODY = manifest.Signing(subject="", certificate_sha256="0" * 64, development_key=False)
FILES = {
    "artifact/artifact.json": b'{"format": "onnx-cpu"}',
    "artifact/weights.bin": bytes(range(256)) * 400,
    "artifact/tokenizer.model": b"pieces",
    "LICENSES/weights.txt": "许可".encode(),
}


def draft(format_: manifest.Format) -> manifest.BundleManifest:
    """A manifest without files."""
    apple = format_ in ("ipa", "xcode")
    runtime, os = ("coreml", "ios") if apple else ("onnxruntime", "android")
    return manifest.BundleManifest(
        name="bluelm-demo",
        format=format_,
        application=manifest.Application(id="org.bluelm.demo", label="BlueLM 演示", version_code=3, version_name="1.2"),
        model=manifest.Model(name="bluelm-demo", architecture="BlueLMForCausalLM", checkpoint_digest="ab" * 32),
        recipe={"method": "gptq", "bits": 4},
        recipe_digest="cd" * 32,
        quantized_digest="ef" * 32,
        target="snapdragon (SM8650)",
        runtime=manifest.RuntimeNote(
            name=runtime,
            artifact_format="coreml" if apple else "onnx-cpu",
            versions={"onnxruntime": "1.31.1"},
            pinned={"onnxruntime": "1.31.1"},
        ),
        requirements=manifest.Requirements.model_validate(
            {
                "os": os,
                "min_os": "18.0" if apple else "24",
                "min_ram_bytes": 1 << 30,
                "ram_basis": "test",
            }
        ),
        context=512,
        prefill_chunk=128,
        bits_per_weight=4.5,
        tokenizer=manifest.TokenizerNote(
            files=("artifact/tokenizer.model",),
            kind="sentencepiece",
            template="[|Human|]:{query}[|AI|]:",
            bos_token_id=1,
            eos_token_ids=(2,),
            pad_token_id=3,
            vocab_size=4096,
        ),
        measurements=(
            manifest.Figure(name="mean_kl", subject="cpu", value=0.01, unit="nats/token", how="measured", error=0.001),
            manifest.Figure(name="decode", subject="soc", value=20.0, unit="tokens/s", how="estimated"),
        ),
        judgement=manifest.Judgement(passed=True),
        licences=manifest.Licences(code="Apache-2.0", weights="OpenAtom Model License"),
        producers={"onnxruntime": "1.31.1", "torch": "2.13.0+cpu"},
        repeatable=True,
        signing=NOBODY,
    )


def inputs(files: dict[str, bytes] | None = None) -> list[Input]:
    return [Input(path, "file", BytesSource(data)) for path, data in (FILES if files is None else files).items()]


def development_keys(folder: Path) -> payload.Keys:
    key = keys.development_key(folder / "development.pem")
    return payload.Keys(key, key)


def make(format_: manifest.Format, out: Path, signing: payload.Keys, files: dict[str, bytes] | None = None) -> Path:
    """A bundle of these files; an IPA's executable is compiled."""
    if format_ == "ipa":
        need("clang-19", "lld-19")
    return build.make(draft(format_), inputs(files), signing, out)


FORMATS: tuple[Format, ...] = ("apk", "ipa", "folder", "gradle", "xcode")
