"""The command `compare`: compares artifacts, runs and checkpoints with the first of them."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from bluelm.errors import InputError
from pipeline.errors import leave
from pipeline.options.effects import refuse_if
from pipeline.terminal import console, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bluelm.text.tokenizer import Tokenizer
    from eval.accuracy.compare import Comparison, Side
    from targets.runtime import Place

BLOCK_TOKENS = 64
PROMPT_TOKENS = 32


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(compare)


def compare(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Artifact or run folders, quantized checkpoints, the float checkpoint; the first is what "
            "the others are compared with. `FOLDER@PLACE` says where: cpu, htp, interpreter, gpu, ane."
        ),
    ],
    blocks: Annotated[bool, typer.Option("--blocks", help="The error of each block as well.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out text to compare on.", min=2)] = 1024,
    prompts: Annotated[int, typer.Option(help="Prompts that are continued greedily.", min=0)] = 5,
    length: Annotated[int, typer.Option(help="Tokens of each continuation.", min=1)] = 64,
    plot: Annotated[Path | None, typer.Option(help="Write a plot there (.png, .svg).", show_default=False)] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.", show_default=False)
    ] = None,
) -> None:
    """Compare artifacts of any runtimes: KL, top-1 agreement, greedy tokens, and block by block."""

    def work() -> int:
        refuse_if(prompts == 0, context, "--length", "no prompt is continued", "give --prompts 1 or more")
        if len(paths) < 2:
            raise InputError("compare needs two folders or more", fix="bluelm-export compare dist/a dist/b")
        with tempfile.TemporaryDirectory(prefix="bluelm-compare-") as scratch, ExitStack() as stack:
            return _compare(paths, blocks, tokens, prompts, length, plot, json_file, Path(scratch), stack)

    leave(work)


def _compare(
    paths: Sequence[str],
    blocks: bool,
    tokens: int,
    prompts: int,
    length: int,
    plot: Path | None,
    json_file: Path | None,
    scratch: Path,
    stack: ExitStack,
) -> int:

    from bluelm.system.files import json_text, write_text
    from eval import heldout
    from eval.accuracy.compare import compare as hold
    from pipeline.report import compare_report

    subjects = [s for i, path in enumerate(paths) for s in open_subjects(path, blocks, scratch / str(i), stack)]
    for subject in subjects:
        stack.callback(subject.runtime.close)
    reference, others = subjects[0], subjects[1:]
    room = min(subject.runtime.context for subject in subjects)
    windows = heldout.load([], _tokenizer(paths[0]), length=min(heldout.LENGTH, room)).first(tokens)
    texts = [window.tokens.tolist() for window in windows]
    length = min(length, room - PROMPT_TOKENS)
    if length < 1:
        raise InputError(
            f"a context of {room} is too short to compare on", fix=f"export with more than {PROMPT_TOKENS}"
        )
    found = hold(
        reference,
        others,
        texts,
        [text[:PROMPT_TOKENS] for text in (texts * prompts)[:prompts]],
        length,
        texts[0][:BLOCK_TOKENS] if blocks else None,
    )
    compare_report.show(reference.name, found, console())
    stand_ins = {subject.name: subject.stand_in for subject in subjects if subject.stand_in}
    for name, by in stand_ins.items():
        say(f"{name}: emulated by {by}")
    if json_file is not None:
        write_text(json_file, json_text({**to_json(reference.name, found), "emulated": stand_ins}))
    if plot is not None:
        compare_report.plot(reference.name, found, plot)
    return 0


def to_json(reference: str, found: Sequence[Comparison]) -> dict[str, Any]:
    """The figures as plain values."""
    rows = []
    for comparison in found:
        row = asdict(comparison)
        if comparison.blocks is not None:
            row["blocks"] |= {
                "first_outside": comparison.blocks.first_outside,
                "same_twin": comparison.blocks.same_twin,
            }
        rows.append(row)
    return {"reference": reference, "compared": rows}


def open_subjects(path: str, blocks: bool, scratch: Path, stack: ExitStack) -> list[Side]:
    """What a path of the command line stands for: one subject, or all artifacts of a run.

    Args:
        blocks: blocks will be asked for; what shows them is built below `scratch` and closed by `stack`.

    Raises:
        InputError: nothing that can be compared lies there, or the place is unknown.
    """
    from targets.runtime import Place

    text, at, place = path.rpartition("@")
    folder = Path(text) if at and place in get_args(Place) else Path(path)
    chosen: Any = place if at and folder == Path(text) else None
    if not folder.exists() and at and chosen is None:
        raise InputError(f"unknown place {place!r}", where=path, fix=f"places: {', '.join(get_args(Place))}")
    if not folder.is_dir():
        raise InputError("there is no such folder", where=folder)
    if (folder / "artifact.json").exists():
        return [_artifact(folder, chosen, blocks, scratch, stack)]
    if (folder / "quantized.json").exists() or (folder / "config.json").exists():
        return [_checkpoint(folder)]
    inside = sorted(entry.parent for entry in folder.glob("*/artifact.json"))
    if not inside:
        raise InputError(
            "this is neither artifact nor run nor checkpoint",
            where=folder,
            fix="name a folder that holds artifact.json, quantized.json or config.json, or a finished run",
        )
    if (folder / "report.json").is_file():
        from pipeline.run.binding import open_run

        open_run(folder)  # a run stands for what its report judged; an artifact's own folder for what lies there
    return [_artifact(entry, chosen, blocks, scratch / entry.name, stack) for entry in _shipped(inside)]


def _shipped(folders: Sequence[Path]) -> list[Path]:
    """The artifacts of a run without those that another was compiled from."""
    from export.artifacts.artifact import Artifact

    kinds = {folder: Artifact.open(folder).record for folder in folders}
    sources = {kind.compiled_from for kind in kinds.values()}
    return [folder for folder, kind in kinds.items() if kind.name not in sources]


def _artifact(folder: Path, on: Place | None, blocks: bool, scratch: Path, stack: ExitStack) -> Side:
    from eval.accuracy.compare import Side
    from eval.accuracy.twins import twin_of
    from eval.files.origin import origin
    from export.artifacts.artifact import Artifact
    from targets.block_outputs import BlockTwin
    from targets.runtime import natural, open_runtime

    artifact = Artifact.open(folder)
    place: Place = on or natural(artifact.format)
    name = f"{folder.resolve().parent.name}/{folder.name} on {place}"

    # figures are the artifact's own; a build that shows its blocks answers for those alone
    found = origin(artifact, place)
    stand_in = found.by if found.how == "emulated" else ""
    runtime = open_runtime(folder, place)
    subject = Side(name, artifact.format, runtime, digest=artifact.quantized_digest, stand_in=stand_in)
    if not blocks:
        return subject
    subject = replace(subject, arithmetic=twin_of(artifact, place))
    twin = BlockTwin(artifact, place, scratch)
    stack.callback(twin.close)
    return replace(subject, steps=twin.blocks, twin=twin.logits)


def _checkpoint(folder: Path) -> Side:
    """A quantized checkpoint, dequantized, or the float one, in torch."""
    from bluelm.checkpoint import Checkpoint
    from compress.checkpoint.store import QuantizedCheckpoint
    from eval.accuracy.compare import Side, weights_steps
    from pipeline.run import provenance
    from targets.host.torch_runtime import TorchRuntime

    provenance.check(folder)
    quantized = (folder / "quantized.json").exists()
    weights = QuantizedCheckpoint.open(folder) if quantized else Checkpoint.open(folder)
    context = min(weights.config.max_position_embeddings, 512)
    kind = "dequantized" if quantized else "float"
    return Side(
        name=f"{folder.name} ({kind})",
        kind=kind,
        runtime=TorchRuntime(weights, context),
        steps=weights_steps(weights, context),
        weights=weights,
        digest=weights.digest() if quantized else "",
    )


def _tokenizer(path: str) -> Tokenizer:
    """The tokenizer beside what `path` names."""
    from bluelm.text.tokenizer import TOKENIZER_FILES, Tokenizer

    folder = Path(path) if Path(path).is_dir() else Path(path.rpartition("@")[0])
    for place in (folder, *sorted(entry.parent for entry in folder.glob("*/artifact.json"))):
        if any((place / name).exists() for name in TOKENIZER_FILES):
            return Tokenizer.from_folder(place)
    raise InputError("there is no tokenizer to read held-out text with", where=folder)
