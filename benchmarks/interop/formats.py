"""Quantized checkpoints between us and the tools that users have: the same weights on both sides, bit for bit?

    python -m benchmarks.interop.formats OUT --peers DIR [--only gptqmodel,autoawq,llmcompressor,autoround,whole]

DIR holds a virtual environment a peer (as for `benchmarks.accuracy.quantizers`; autoawq needs autoawq==0.2.9 alone).
Each peer reads the folders that we write of the demo model, and writes its own, with the weights that it computes with
beside them; both are compared with what we read. Writes results/interop/formats.json and the page; what is not compared
again stays.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import pages
from benchmarks.accuracy.quantizers import DISTRIBUTIONS, versions
from benchmarks.interop.peer_exports import llama_folder
from bluelm.checkpoint import Checkpoint
from bluelm.model import Decoder
from bluelm.system.files import demo_checkpoint
from calibration.samples import load_samples
from compress.engine import quantize
from compress.formats.packed import open_weights
from compress.formats.write import Kind, write
from compress.recipe import Recipe

WORKERS = Path(__file__).parents[1] / "peers"
# rotated, and every down_proj in 8 bits with one scale a row
MIXED = {"rotate": True, "layers": {f"model.layers.{n}.mlp.down_proj": {"bits": 8, "group_size": -1} for n in range(6)}}
# name of a folder that we write -> its format, and the recipe's values
OURS: dict[str, tuple[Kind, dict[str, object]]] = {
    "gptq-sym": ("gptq", {}),
    "gptq-asym": ("gptq", {"symmetric": False}),
    "gptq-8-bit": ("gptq", {"bits": 8}),
    "gptq-g128": ("gptq", {"group_size": 128}),
    "gptq-mixed": ("gptq", MIXED),
    "awq-sym": ("awq", {}),
    "awq-asym": ("awq", {"symmetric": False}),
    "compressed-sym": ("compressed-tensors", {}),
    "compressed-asym": ("compressed-tensors", {"symmetric": False}),
    "compressed-8-bit": ("compressed-tensors", {"bits": 8}),
    "compressed-mixed": ("compressed-tensors", MIXED),
}
WEIGHTS = ("peer", "folder", "version", "equal", "largest difference")
WHOLE = ("loaded by", "folder", "versions", "linears", "difference", "mean KL", "same best token")
READS = {"gptqmodel": tuple(name for name in OURS if name.startswith("gptq")), "autoawq": ("awq-sym", "awq-asym")}

# what loads folders whole -> (environment, packages, folders): its logits are compared with our decoder's
LOADS = {
    "transformers": (
        "gptqmodel",
        ("transformers", "gptqmodel", "optimum"),
        ("gptq-sym", "gptq-asym", "awq-sym", "awq-asym"),
    ),
    "gptqmodel": ("gptqmodel", ("gptqmodel",), ("gptq-sym", "gptq-asym", "gptq-8-bit", "gptq-g128", "gptq-mixed")),
    "autoawq": ("autoawq", ("autoawq",), ("awq-sym", "awq-asym")),
    "transformers+compressed-tensors": (
        "llmcompressor",
        ("transformers", "compressed-tensors"),
        ("compressed-sym", "compressed-8-bit", "compressed-asym", "compressed-mixed"),
    ),
}


def write_ours(out: Path) -> None:
    """The folders of `OURS`, and a plain Llama folder and tokens for the peers to quantize."""
    checkpoint = Checkpoint.open(demo_checkpoint())
    llama_folder(checkpoint, out / "llama")
    samples = load_samples(None, checkpoint.tokenizer(), 8, 128, 0)
    save_file({"tokens": samples.tokens}, out / "tokens.safetensors")
    for name, (kind, values) in OURS.items():
        if not (out / name).exists():
            recipe = Recipe.make({"method": "rtn", "grid": "mse", **values})
            write(quantize(checkpoint, None, recipe, out / f"{name}.codes"), checkpoint, out / name, kind)


def run_peer(out: Path, python: Path, peer: str) -> str:
    """Run a peer's worker; the end of what it said where it failed."""
    folders = [str(out / name) for name in READS.get(peer, ())]
    inputs = [] if peer == "autoawq" else [str(out / "llama"), str(out / "tokens.safetensors")]
    command = [str(python), str(WORKERS / f"formats_{peer}.py"), *inputs, str(out), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr[-600:]


def load_whole(out: Path, peers: Path, loader: str) -> Iterator[list[str]]:
    """How the logits of a peer's model differ from those of our decoder with the dequantized weights of each folder."""
    environment, packages, names = LOADS[loader]
    python = peers / environment / "bin" / "python"
    way = loader.partition("+")[0]
    worker = [str(WORKERS / "formats_logits.py"), way, str(out / "tokens.safetensors"), str(out)]
    command = [str(python), *worker, *(str(out / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{loader}: {done.stderr[-1500:]}")
    tokens = load_file(out / "tokens.safetensors")["tokens"][:2]
    for name in names:
        line = next((line for line in done.stdout.splitlines() if line.startswith(f"{way} {name} ")), None)
        if line is not None:
            found = load_file(out / f"logits-{way}-{name}.safetensors")["logits"]
            wanted = Decoder.from_weights(open_weights(out / name))(tokens)
            linears = ", ".join(f"`{kind}`" for kind in line.split()[2:])
            yield [loader, name, versions(python, packages), linears, *apart(found, wanted)]


def apart(found: torch.Tensor, wanted: torch.Tensor) -> list[str]:
    """Logits [n, T, vocab]: largest difference as a share of the largest logit, mean KL in nats, equal best tokens."""
    kl = (wanted.log_softmax(-1).exp() * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    same = found.argmax(-1) == wanted.argmax(-1)
    largest = (found - wanted).abs().max() / wanted.abs().max()
    return [f"{largest.item():.1e}", f"{kl.mean().item():.1e}", f"{int(same.sum())} of {same.numel()}"]


def same_weights(out: Path, peers: Path, peer: str) -> Iterator[tuple[str, list[str]]]:
    """A peer reads our folders ("read") and writes its own ("written"): the weights on both sides."""
    python = peers / peer / "bin" / "python"
    fault = run_peer(out, python, peer)
    if fault:
        print(f"{peer} failed: {fault}")
    version = versions(python, [DISTRIBUTIONS.get(peer, peer)])
    for name in READS.get(peer, ()):
        dumped = out / f"read-{peer}-{name}.safetensors"
        if dumped.exists():
            yield "read", [peer, name, version, *compare(out / name, dumped)]
    for folder in sorted(path for path in out.glob(f"wrote-{peer}-*") if path.is_dir()):
        name = folder.name.removeprefix(f"wrote-{peer}-")
        yield "written", [peer, name, version, *compare(folder, folder.with_suffix(".safetensors"))]


def compare(folder: Path, weights: Path) -> list[str]:
    """How what we read of a folder differs from a peer's dequantized weights of it; equal: in the peer's dtype."""
    packed, theirs = open_weights(folder), load_file(weights)
    same, worst, count = 0, 0.0, 0
    for name, wanted in theirs.items():
        if ".layers." not in name:
            continue
        found = packed.tensor(name) if name in packed.tensors else _linear(packed, name.removesuffix(".weight"))
        count += 1
        same += torch.equal(found.to(wanted.dtype), wanted)
        worst = max(worst, ((found - wanted.float()).abs().max() / wanted.float().abs().max()).item())
    return [f"{same} of {count}", f"{worst:.1e}"]


def _linear(packed: Checkpoint, name: str) -> torch.Tensor:
    layer, _, local = name.removeprefix("model.layers.").partition(".")
    return packed.block(int(layer))[f"{local}.weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--only", default="autoawq,gptqmodel,llmcompressor,autoround,whole")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_ours(out)
    rows: dict[str, list[list[str]]] = {"read": [], "written": [], "whole": []}
    for peer in arguments.only.split(","):
        if peer == "whole":
            found = (("whole", row) for loader in LOADS for row in load_whole(out, arguments.peers, loader))
        else:
            found = same_weights(out, arguments.peers, peer)
        for part, row in found:
            rows[part].append(row)
            print(part, row, flush=True)
    if rows["read"]:
        names = [f"{peer}, {name}" for peer, folders in READS.items() for name in folders]
        pages.save_rows("formats", "read", WEIGHTS, rows["read"], names=names, key=2)
    if rows["written"]:
        pages.save_rows("formats", "written", WEIGHTS, rows["written"], key=2)
    if rows["whole"]:
        names = [f"{loader}, {name}" for loader, (_, _, folders) in LOADS.items() for name in folders]
        pages.save_rows("formats", "whole", WHOLE, rows["whole"], names=names, key=2)


if __name__ == "__main__":
    main()
