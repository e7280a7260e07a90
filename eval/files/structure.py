"""Checks of a finished artifact that need no statistics: any fault fails it.

Each gives figures (`Measurement`) whose limits `eval.budget.budget.STRUCTURE` holds; a figure's note names the first
fault.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from bluelm.block import block_of
from bluelm.config import ModelConfig
from bluelm.errors import ExportError
from bluelm.system.files import sha256
from bluelm.text.tokenizer import Message, Tokenizer
from compress.checkpoint.store import QuantizedCheckpoint
from compress.methods.rotate import quantized_config
from eval.accuracy.compare import BlockErrors
from eval.budget.limits import NOT_KNOWN
from eval.files import compiled, size_plan
from eval.measurement import Measurement
from export.artifacts.artifact import Artifact
from export.formats import Without, function
from export.readback import config_faults, read_back
from targets.host.generation import ends, generate, until
from targets.runtime import Runtime

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "chat_golden.json"
# texts on which tokenizers differ: spaces, digits, other scripts, joined emoji, marks that a user typed
ODD = (
    "",
    " ",
    "  two  spaces ",
    "tab\tand\nline\r\nends\n\n",
    "1234567890 3.14 1e-9",
    "汉字、繁體字，ひらがな 한국어",
    "👩‍👩‍👧‍👦 é é ﷺ \u200b",
    "def f(x):\n    return {'a': [x ** 2]}  # 平方",
    "[|Human|]: </s> [|AI|]: <s>",
)
FORCED = 3  # tokens of an answer before the end token is put on top


def files(
    artifact: Artifact, config: ModelConfig, tokenizer: Tokenizer, quantized: QuantizedCheckpoint | None,
    texts: Sequence[str], subject: str,
) -> list[Measurement]:  # fmt: skip
    """All that the files alone tell.

    Args:
        config, tokenizer: the float checkpoint's.
        quantized: what it was made of; None where that is not at hand, and weights are not known to be right.
        texts: a corpus for the tokenizer.
    """
    mine = _tokenizer(artifact)
    found = [
        _faults("tokenizer_mismatches", _tokenizer_faults(mine, tokenizer, [*ODD, *texts], artifact), subject, "texts"),
        _faults("chat_template_mismatches", _template_faults(mine, tokenizer), subject, "chats"),
        _faults("versions_missing", _missing_versions(artifact), subject, "versions"),
        _faults("files_changed", _changed_files(artifact), subject, "files"),
        *npu_shares(artifact, subject),
        *([compiled.mismatches(artifact, subject)] if artifact.record.compiled_from else []),
    ]
    if quantized is None:
        note = "weights, tables and metadata: the quantized checkpoint that it was made of is not at hand"
        name = f"{NOT_KNOWN}@{artifact.format}"
        return [*found, Measurement(name, 1, "items", "measured", note=note, subject=subject)]
    found += _sizes(artifact, quantized, subject)
    held = read_back(artifact, quantized)
    stands_for = quantized_config(config, quantized.recipe)
    wrong = [f"the quantized checkpoint's {fault}" for fault in config_faults(quantized.config, stands_for)]
    found.append(_faults("weight_mismatches", [*wrong, *map(str, held.wrong)], subject, "items"))
    name, note = f"{NOT_KNOWN}@{artifact.format}", "; ".join(held.sentences)
    found.append(Measurement(name, len(held.untold), "items", "measured", note=note, subject=subject))
    return found


def end_token(
    artifact: Artifact, config: ModelConfig, runtime: Runtime, prompt: Sequence[int], subject: str
) -> Measurement:
    """Whether the end token is the checkpoint's wherever the artifact names it, and ends an answer."""
    faults = list(_end_faults(artifact, config))
    mine = _tokenizer(artifact)
    stops = sorted(ends(mine, artifact)) if mine is not None else []
    if stops and len(prompt) + FORCED < runtime.context:
        seen = iter(range(FORCED + 1))
        last = stops[0]

        def choose(logits: np.ndarray) -> int:
            if next(seen) == FORCED:
                return last
            best = np.argsort(logits)[::-1]
            return next(int(token) for token in best if token not in stops)

        answered = list(until(generate(runtime, prompt, 2 * FORCED, choose), stops))
        if len(answered) != FORCED:
            faults.append(f"an answer of {len(answered)} tokens where the end token came behind {FORCED}")
    elif not stops:
        faults.append("no end token is known")
    return _faults("end_token_faults", faults, subject, "places")


def block_figures(to_float: BlockErrors | None, to_quantized: BlockErrors, subject: str) -> list[Measurement]:
    """The error of what each block adds: against the float model, and whether it exceeds what its runtime costs."""
    found = [
        Measurement(f"block_error@{layer}", error, "", "measured", note="against the float model", subject=subject)
        for layer, error in enumerate(to_float.errors if to_float else ())
    ]
    excess, first = to_quantized.excess, to_quantized.first_outside
    where = "every block is within what the runtime costs" if first is None else f"block {first} is the first beyond"
    shares = zip(to_quantized.errors, to_quantized.expected, strict=True)
    error, limit = max(shares, key=lambda pair: pair[0] / pair[1] if np.isfinite(pair[0]) else np.inf)
    note = f"{where}: {error:.2e} of {limit:.2e}"
    return [*found, Measurement("block_error_excess", excess, "", "measured", note=note, subject=subject)]


def npu_shares(artifact: Artifact, subject: str) -> list[Measurement]:
    """Share of nodes, and of multiply-accumulates of a token, that the NPU takes, and of instructions that a delegate
    takes; [] where no compiler told."""
    found = _delegated(artifact, subject) if artifact.record.delegate else []
    counts = artifact.nodes.values()
    if not counts:
        return found
    on_npu, total = sum(c.on_npu for c in counts), sum(c.in_graph for c in counts)
    note = f"{on_npu} of {total} nodes"
    found.append(Measurement("npu_node_share", on_npu / total, "", "measured", n=total, note=note, subject=subject))
    if on_npu == total:  # embedding rows are looked up, the sampler compares: no multiplications elsewhere
        macs = multiply_accumulates(artifact.model, artifact.context)
        note = f"all {macs / 1e6:,.1f} M of a token at full context: every node of both graphs is on the NPU"
        found.append(Measurement("npu_mac_share", 1.0, "", "measured", n=macs, note=note, subject=subject))
    return found


def _delegated(artifact: Artifact, subject: str) -> list[Measurement]:
    """All of it where every method of the program is nothing but calls of one delegate, else not known."""
    from export.executorch.reader import all_delegated

    name = artifact.record.delegate
    called = all_delegated(artifact.path("model"))
    if called is None or {delegate for delegates in called.values() for delegate in delegates} != {name}:
        return []
    note = f"all {len(called)} methods are calls of {name} and nothing else"
    return [Measurement("delegated_share", 1.0, "", "measured", note=note, subject=subject)]


def not_known(artifact: Artifact, figures: Sequence[Measurement]) -> list[str]:
    """What is not checked because the format does not tell it; `figures` are the artifact's."""
    found = [figure.note for figure in figures if figure.name.startswith(NOT_KNOWN) and figure.value]
    return [*found, *(artifact.record.untold or ())]


def multiply_accumulates(config: ModelConfig, context: int) -> int:
    """Of one token behind `context` cached ones: all linears, and attention's two products."""
    block = block_of(config)
    attended = 2 * block.attention.heads * block.attention.size * context
    return config.num_layers * (block.weights + attended) + config.hidden_size * config.vocab_size


def runtime_version(artifact: Artifact) -> str:
    """The package that runs the artifact here, with its version; "" if it is not installed."""
    package = artifact.record.package
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _tokenizer(artifact: Artifact) -> Tokenizer | None:
    """The one beside the artifact; None where its files cannot be read."""
    try:
        return Tokenizer.from_folder(artifact.folder)
    except ExportError:
        return None


def _tokenizer_faults(
    mine: Tokenizer | None, theirs: Tokenizer, texts: Iterable[str], artifact: Artifact
) -> Iterator[str]:
    """Texts that the artifact's tokenizer splits or joins otherwise than the checkpoint's, or does not give back."""
    if mine is None:
        yield "its tokenizer cannot be read"
        return
    for name in ("bos", "eos", "front"):
        found, wanted = getattr(mine, name), getattr(theirs, name)
        if found != wanted:
            yield f"{name} is {found} instead of {wanted}"
    for text in texts:
        ids = theirs.encode(text)
        again = theirs.decode(ids)
        if mine.encode(text) != ids or mine.decode(ids) != again:
            yield repr(text[:40])


def _template_faults(mine: Tokenizer | None, theirs: Tokenizer) -> Iterator[str]:
    """Chats whose tokens are not those of the golden text (BlueLM's template) or of the checkpoint's own."""
    if mine is None:
        yield "its tokenizer cannot be read"
        return
    for chat in json.loads(GOLDEN.read_text(encoding="utf-8")):
        messages = [Message(role, content) for role, content in chat["messages"]]
        if theirs.template is None or not theirs.template.bluelm:
            messages = [m for m in messages if m.role != "system"]  # which not every template takes
            expected = theirs.chat(messages)
        else:
            expected = list(theirs.front)
            for part in chat["parts"]:
                expected += [theirs.eos or 0] if part == "</s>" else theirs.encode(part, marks=True)
        if mine.chat(messages) != expected:
            yield repr(messages[-1].content[:40])


def _end_faults(artifact: Artifact, config: ModelConfig) -> Iterator[str]:
    """Places of the artifact that name other end tokens than the checkpoint."""
    wanted = set(config.eos_token_ids)
    if set(artifact.model.eos_token_ids) != wanted:
        yield f"artifact.json says {sorted(artifact.model.eos_token_ids)}, the checkpoint {sorted(wanted)}"
    path = artifact.record.ends
    fault = None if isinstance(path, Without) else function(path)(artifact, wanted)
    if fault is not None:
        yield fault


def _changed_files(artifact: Artifact) -> Iterator[str]:
    """Files that are not those whose digests artifact.json names."""
    for file in artifact.files:
        if sha256(artifact.folder / file.path) != file.sha256:
            yield file.path


def _missing_versions(artifact: Artifact) -> Iterator[str]:
    """What is not recorded of who made the artifact, and what runs it."""
    if not artifact.producers.get("bluelm-export"):
        yield "bluelm-export, which made it"
    if not any(told for name, told in artifact.producers.items() if name != "bluelm-export"):
        yield "the format's own writer"
    if not runtime_version(artifact):
        yield f"{artifact.record.package}, which runs it"


def _sizes(artifact: Artifact, quantized: QuantizedCheckpoint, subject: str) -> list[Measurement]:
    held = size_plan.held_bytes(artifact)
    bits = 8 * held / artifact.parameters
    found = [Measurement("bits_per_weight", bits, "bits", "measured", subject=subject)]
    parts = size_plan.planned_parts(quantized, artifact)
    if parts is None:
        return found
    planned = sum(parts.values())
    told = f"{bits:.3f} bits a weight, planned {8 * planned / artifact.parameters:.3f}"
    apart = size_plan.deviation(planned, artifact)
    rest = max(artifact.bytes - planned, 0)
    return [
        *found,
        Measurement("bits_per_weight_deviation", apart, "", "measured", note=told, subject=subject),
        *(
            Measurement(f"part_bytes@{name}", size, "bytes", "measured", subject=subject)
            for name, size in parts.items()
        ),
        Measurement("part_bytes@graphs and tokenizer", rest, "bytes", "measured", subject=subject),
    ]


def _faults(name: str, faults: Iterable[str], subject: str, what: str) -> Measurement:
    found = list(faults)
    shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return Measurement(name, len(found), what, "measured", note=shown, subject=subject)
