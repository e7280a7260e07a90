"""The engine: the same bytes every time, also after an interruption; what it refuses; what it gains."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bluelm.checkpoint import Checkpoint
from bluelm.errors import InputError
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from bluelm.weights import Weights
from calibration.samples import Samples, load_samples
from calibration.sources import read_texts
from calibration.walk import Hessian
from compress.checkpoint.store import MANIFEST, QuantizedCheckpoint, block_file
from compress.engine import quantize
from compress.methods.loss import objective
from compress.recipe import Recipe
from tests.support.checkpoints.shapes import shortened
from tests.support.quantizing import Stopping, content

HELDOUT = Path(__file__).parents[2] / "eval" / "data" / "heldout.jsonl"
METHODS = ("gptq", "awq", "rtn")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The demo model's first two blocks."""
    return Checkpoint.open(shortened(demo_checkpoint(), 2, tmp_path_factory.mktemp("short") / "float"))


@pytest.fixture(scope="module")
def samples(short: Checkpoint) -> Samples:
    return load_samples(None, short.tokenizer(), 6, 48, 0)


@pytest.fixture(scope="module")
def finished(
    short: Checkpoint, samples: Samples, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, QuantizedCheckpoint]:
    """One uninterrupted run of each method that reads text."""
    folder = tmp_path_factory.mktemp("finished")
    return {method: quantize(short, samples, recipe(method=method), folder / method) for method in ("gptq", "awq")}


def recipe(**values: Any) -> Recipe:
    return Recipe.make({"samples": 6, "length": 48, **values})


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bytes(short: Checkpoint, samples: Samples, tmp_path: Path, method: str) -> None:
    for name in ("one", "two"):
        found = quantize(short, samples, recipe(method=method, symmetric=False), tmp_path / name)
        found.verify()
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(("method", "steps"), [("gptq", 1), ("gptq", 3), ("gptq", 4), ("awq", 2)])
def test_interrupted_run_goes_on_to_the_same_bytes(
    short: Checkpoint,
    samples: Samples,
    finished: dict[str, QuantizedCheckpoint],
    tmp_path: Path,
    method: str,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(short, samples, recipe(method=method), tmp_path / "out", Stopping(steps))
    assert not (tmp_path / "out").exists()
    written = list[str]()
    from compress.checkpoint import work

    def record(path: Path, *rest: Any) -> str:
        written.append(path.name)
        return original(path, *rest)

    original = work.write_piece
    monkeypatch.setattr(work, "write_piece", record)
    resumed = quantize(short, samples, recipe(method=method), tmp_path / "out")
    assert len(written) == 4 - steps  # embedding, two blocks, head
    assert content(resumed.folder) == content(finished[method].folder)
    assert not (tmp_path / "out.partial").exists()


def test_truncated_piece_is_made_again(
    short: Checkpoint, samples: Samples, finished: dict[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(short, samples, recipe(), tmp_path / "out", Stopping(3))
    block = tmp_path / "out.partial" / "block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:1000])
    again = quantize(short, samples, recipe(), tmp_path / "out")
    assert content(again.folder) == content(finished["gptq"].folder)


def test_unfinished_run_of_other_inputs_is_refused_with_what_differs(
    short: Checkpoint, samples: Samples, finished: dict[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(short, samples, recipe(damping=0.02), tmp_path / "out", Stopping(2))
    kept = content(tmp_path / "out.partial")
    with pytest.raises(
        InputError, match=r"unfinished run made from other inputs: recipe damping was 0\.02 and is 0\.01\n"
    ):
        quantize(short, samples, recipe(), tmp_path / "out")
    assert content(tmp_path / "out.partial") == kept
    again = quantize(short, samples, recipe(), tmp_path / "out", overwrite=True)
    assert content(again.folder) == content(finished["gptq"].folder)


def test_finished_folder_is_taken_as_it_is_or_refused(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = quantize(short, samples, recipe(), out)
    progress = Stopping(99)
    assert quantize(short, samples, recipe(), out, progress).digest() == first.digest()
    assert progress.notes == []
    with pytest.raises(InputError, match=r"quantized checkpoint made from other inputs: recipe bits was 4 and is 8\n"):
        quantize(short, samples, recipe(bits=8), out, progress)
    assert QuantizedCheckpoint.open(out).digest() == first.digest()
    assert quantize(short, samples, recipe(bits=8), out, progress, overwrite=True).digest() != first.digest()
    assert progress.notes == ["embedding", "block 0", "block 1", "head"]
    assert QuantizedCheckpoint.open(out).recipe.bits == 8


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_activations_on_disk_give_the_same_bytes(
    short: Checkpoint, samples: Samples, tmp_path: Path, activations: str
) -> None:
    for name, on_disk in (("ram", False), ("disk", True)):
        quantize(short, samples, recipe(activations=activations), tmp_path / name, on_disk=on_disk)
    assert content(tmp_path / "ram") == content(tmp_path / "disk")


def test_changed_weight_or_text_is_another_run(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    first = quantize(short, samples, recipe(), tmp_path / "out").info["fingerprint"]
    other = replace(samples, tokens=samples.tokens.flip(0))
    assert quantize(short, other, recipe(), tmp_path / "out", overwrite=True).info["fingerprint"] != first
    # rounding reads no text: other text is the same run
    rounded = quantize(short, None, recipe(method="rtn"), tmp_path / "rtn").info
    assert quantize(short, samples, recipe(method="rtn"), tmp_path / "rtn").info == rounded
    assert rounded["calibration"] is None


def test_report_and_notes_are_kept(
    short: Checkpoint, samples: Samples, finished: dict[str, QuantizedCheckpoint]
) -> None:
    info = finished["gptq"].info
    assert info["calibration"] == samples.report.to_json()
    assert info["checkpoint"] == short.digest()
    note = info["layers"]["model.layers.1.mlp.down_proj"]
    assert note["method"] == "gptq"
    assert note["damping"] == 0.01
    assert 0 < note["loss"] < note["loss_rounding"]
    assert info["layers"]["lm_head"]["bits"] == 8
    awq = finished["awq"].info
    assert awq["layers"]["model.layers.0.self_attn.o_proj"]["scaling"]["loss_ratio"] <= 1


def test_layers_lose_less_than_rounded_ones_at_their_output(
    short: Checkpoint, samples: Samples, finished: dict[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    """Of the first stage, whose input both share: ‖(W - Ŵ) X‖² worked out apart from the engine."""
    gptq, rtn = finished["gptq"], quantize(short, None, recipe(method="rtn"), tmp_path / "rtn")
    hessian = Hessian()
    x = gptq.embedding()[samples.tokens]
    norm = short.block(0)["input_layernorm.weight"]
    hessian.add(torch.nn.functional.rms_norm(x, norm.shape, norm, short.config.rms_norm_eps))
    mean = hessian.mean()
    for name in ("q", "k", "v"):
        exact = short.block(0)[f"self_attn.{name}_proj.weight"]
        lost = [
            objective(exact - found.linear(f"model.layers.0.self_attn.{name}_proj").dequantize(), mean)
            for found in (gptq, rtn)
        ]
        assert (lost[0] <= lost[1] * (1 + 1e-4)).all()
        assert lost[0].sum() < 0.8 * lost[1].sum()


def test_gptq_and_awq_beat_rounding_on_held_out_text(tmp_path: Path) -> None:
    """A small edition of benchmarks/accuracy/quality.py: fewer calibration and held-out tokens, the same order."""
    checkpoint = Checkpoint.open(demo_checkpoint())
    tokenizer = checkpoint.tokenizer()
    text = [found.content for found in read_texts([HELDOUT]).documents]
    stream = [token for part in text for token in tokenizer.encode(part, bos=True, marks=True)]
    windows = torch.tensor(stream[: len(stream) // 128 * 128]).view(-1, 128)[::20]
    exact = log_probabilities(checkpoint, windows)
    some = load_samples(None, tokenizer, 64, 128, 0)
    kl: dict[str, float] = {}
    for method in METHODS:
        found = quantize(checkpoint, some, recipe(method=method), tmp_path / method)
        kl[method] = float((exact.exp() * (exact - log_probabilities(found, windows))).sum(-1).mean())
    assert kl["gptq"] < 0.65 * kl["rtn"]
    assert kl["awq"] < 1.0 * kl["rtn"]
    assert 1e-4 < kl["gptq"] < kl["rtn"] < 0.01  # neither broken nor left in float


def log_probabilities(weights: Weights, windows: Tensor) -> Tensor:
    return torch.log_softmax(Decoder.from_weights(weights)(windows), -1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"group_size": 128}, "group size 128 does not divide the 192 columns of mlp.down_proj"),
        ({"head_group_size": 64}, "two widths"),
        ({"head_bits": 4}, "two widths"),
    ],
)
def test_recipe_that_does_not_fit_the_model_is_refused(
    short: Checkpoint, tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    odd = tied(short, tmp_path / "odd")
    with pytest.raises(InputError, match=says):
        quantize(odd, None, recipe(method="rtn", **values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tied(short: Checkpoint, folder: Path) -> Checkpoint:
    """A Llama whose table is embedding and head, with 192 inner columns."""
    shutil.copytree(short.folder, folder)
    path = folder / "model.safetensors"
    tensors = {
        name: tensor[:192] if "gate" in name or "up" in name else tensor[:, :192] if "down" in name else tensor
        for name, tensor in load_file(path).items()
        if "embed_layer_norm" not in name and name != "lm_head.weight"
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 192}
    config |= {"tie_word_embeddings": True, "use_stable_embedding": False}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("method", METHODS)
def test_tied_table_is_stored_once(short: Checkpoint, samples: Samples, tmp_path: Path, method: str) -> None:
    checkpoint = tied(short, tmp_path / "tied")
    found = quantize(checkpoint, samples, recipe(method=method), tmp_path / "out")
    assert "lm_head" not in found.linears
    assert torch.equal(found.linear("lm_head").codes, found.embed().codes)
    assert torch.isfinite(Decoder.from_weights(found)(samples.tokens[:1])).all()


def test_text_is_needed_but_for_rounding(short: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs calibration text"):
        quantize(short, None, recipe(), tmp_path / "out")


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_output_that_is_something_else_is_left_alone(
    short: Checkpoint, samples: Samples, tmp_path: Path, occupied: str
) -> None:
    out = tmp_path / "out"
    if occupied == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    before = out.read_text() if out.is_file() else content(out)
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        quantize(short, samples, recipe(), out)
    assert (out.read_text() if out.is_file() else content(out)) == before


def test_bad_weights_in_the_middle_cost_no_finished_block(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(short.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        quantize(Checkpoint.open(folder), samples, recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / block_file(0)).exists()


def test_overflowing_activations_are_refused_with_the_block(
    short: Checkpoint, samples: Samples, tmp_path: Path
) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(short.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.full((256,), 1e30)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"not finite\n  where: block 0"):
        quantize(Checkpoint.open(folder), samples, recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_manifest_is_written_last(short: Checkpoint, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(short, samples, recipe(), tmp_path / "out", Stopping(4))
    assert not (tmp_path / "out.partial" / MANIFEST).exists()
