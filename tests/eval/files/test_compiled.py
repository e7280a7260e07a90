"""Graphs that Qualcomm compiled: what they tell by the vendor's own API, what they were given, what they compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bluelm.errors import InputError
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import EMBED
from eval.accuracy import twin_blocks
from eval.files import compiled, structure
from eval.files.compiled import LIMIT, TwinCheck
from export import readback
from export.artifacts.artifact import Artifact, source_of
from export.lowering.ranges import Ranges
from export.onnx import npu as onnx_npu
from export.readback.items import linear_names
from targets.block_outputs import open_blocks
from targets.qualcomm.border import binary_of, onnx_border
from targets.qualcomm.compile import binary_contents
from targets.qualcomm.given import faults as given_faults
from targets.qualcomm.messages import SHARING
from targets.registry import find
from tests.packages import requires
from tests.support import damage
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.shapes import LINEARS
from tests.support.damages import qualcomm as hurts

Change = Callable[[torch.Tensor, torch.Tensor], None]
"""Writes random codes [out, in] into some of a weight's."""


def made(folder: Path, runtime: str = "qnn-context", recipe: str = lowering.PLAIN, **options: object) -> Artifact:
    """A run's folders: the onnx-npu artifact, and beside it what was compiled of it."""
    shutil.copytree(lowering.npu(recipe, **options).folder, folder / "npu")  # type: ignore[arg-type]
    return find("snapdragon", runtime=runtime).compile(Artifact.open(folder / "npu"), folder / "compiled")


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(tmp_path_factory.mktemp("compiled"), "executorch-qnn")


@pytest.fixture(params=["contexts", "programs"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return request.getfixturevalue(request.param)


def copied(artifact: Artifact, folder: Path) -> Artifact:
    """The run's folders once more, to be damaged."""
    shutil.copytree(artifact.folder.parent, folder)
    return Artifact.open(folder / artifact.folder.name)


def excess(artifact: Artifact, scratch: Path) -> float:
    check = TwinCheck(artifact, lowering.quantized(), "htp")
    with open_blocks(artifact, "htp", scratch) as shown:
        return check.figure(shown, "npu").value  # type: ignore[arg-type]


@requires("libatomic1")
def test_what_was_compiled_is_sound(artifact: Artifact, tmp_path: Path) -> None:
    assert compiled.mismatches(artifact, "npu").value == 0
    found = readback.read_back(artifact, lowering.quantized())
    assert not found.wrong
    assert {"lm_head", "model.layers.1.mlp.down_proj", "rope"} <= {finding.item for finding in found.untold}
    assert EMBED not in {finding.item for finding in found.untold}  # the table lies beside, as it is
    assert excess(artifact, tmp_path) < 0.7


@requires("libatomic1")
def test_a_weak_column_of_decode_alone_is_seen(contexts: Artifact, tmp_path: Path) -> None:
    """By running alone: the files tell nothing of it."""
    hurt = copied(contexts, tmp_path / "run")
    hurts.weak_decode_column(hurt)
    hurt = hurts.relisted(hurt)
    assert compiled.mismatches(hurt, "npu").value == 0 and not readback.read_back(hurt, lowering.quantized()).wrong
    check = TwinCheck(hurt, lowering.quantized(), "htp")
    with open_blocks(hurt, "htp", tmp_path / "debug") as shown:
        figure = check.figure(shown, "npu")  # type: ignore[arg-type]
    assert figure.value > 1 and "decode answers otherwise" in figure.note


@requires("libatomic1")
def test_the_shipped_binary_is_said_not_to_run_here(artifact: Artifact) -> None:
    told = " ".join(structure.not_known(artifact, []))
    assert ("the shipped binary itself cannot run here" in told) == (artifact.format == "qnn-context")


@requires("libatomic1")
def test_binaries_tell_graphs_and_encodings(contexts: Artifact) -> None:
    source = source_of(contexts)
    (shared,) = binary_contents(contexts.paths("context"))
    assert shared.soc_model == 57 and contexts.given is not None and shared.compiler == contexts.given.compiler
    borders = {(graph.inputs, graph.outputs) for graph in shared.graphs}
    wanted = [onnx_border(source.path(role)) for role in ("prefill", "decode")]
    assert {name for graph, _ in borders for name in (t.name for t in graph)} >= {"hidden", "past_keys.1"}
    assert {frozenset(graph.inputs) for graph in wanted} == {frozenset(inputs) for inputs, _ in borders}
    assert {frozenset(graph.outputs) for graph in wanted} == {frozenset(outputs) for _, outputs in borders}
    ranges = Ranges.load(source.path("ranges"))
    keys = next(tensor for tensor in shared.graphs[0].outputs if tensor.name == "keys.0")
    assert keys.scale == ranges.cache_encoding("layers.0.keys").scale and keys.zero == 0


@requires("libatomic1")
def test_what_is_no_binary_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\1" * 4096)
    with pytest.raises(InputError, match="cannot read the compiled binary"):
        binary_contents([tmp_path / "a.bin"])


@requires("libatomic1")
@pytest.mark.parametrize(
    ("hurt", "told"),
    [
        (hurts.decode_names_prefill, "decode.onnx: input hidden is float32 [1, 8, 64] instead of float32 [1, 1, 64]"),
        (hurts.cut_wrapper, "not an ONNX file"),
        (hurts.prefill_alone, "does not hold the graph"),
        (hurts.other_chip, "is for chip 57 instead of 69"),
        (hurts.other_encoding, "keys.1"),
    ],
)
def test_damaged_metadata_is_named(hurt: hurts.Change, told: str, contexts: Artifact, tmp_path: Path) -> None:
    damaged = copied(contexts, tmp_path / "run")
    hurt(damaged)
    figure = compiled.mismatches(hurts.relisted(damaged), "npu")
    assert figure.value > 0 and told in figure.note


OPTIONS = {"soc_model": "57", "htp_graph_finalization_optimization_mode": "3"}


@pytest.mark.parametrize(
    ("form", "key", "value", "told"),
    [
        ("shipped", "soc_model", "57", []),
        ("shipped", "htp_graph_finalization_optimization_mode", "1",
         ["the simulator form was compiled with htp_graph_finalization_optimization_mode 3"]),
        ("simulator", "htp_arch", "73", ["the simulator form was compiled with htp_arch 73"]),
        ("shipped", "enable_htp_weight_sharing", "0",
         ["the shipped form was compiled with enable_htp_weight_sharing 0"]),
        ("simulator", "ep.share_ep_contexts", "1", ["the simulator form was compiled with ep.share_ep_contexts 1"]),
        ("shipped", "soc_model", "69",
         ["the simulator form was compiled with soc_model 57", "what ships was compiled for chip 69 instead of 57"]),
    ],
)  # fmt: skip
def test_what_ships_and_what_ran_were_compiled_alike(form: str, key: str, value: str, told: list[str]) -> None:
    """But for the sharing of weights."""
    settings = {"shipped": OPTIONS | SHARING, "simulator": dict(OPTIONS)}
    settings[form][key] = value
    assert list(compiled.option_faults(settings, 57)) == told
    assert not list(compiled.option_faults({"shipped": OPTIONS}, 57))  # an ExecuTorch program: what ships is what runs
    assert list(compiled.option_faults({}, 57)) == ["what ships was compiled for chip unknown instead of 57"]


@requires("libatomic1")
def test_other_options_of_what_ships_fail_the_artifact(contexts: Artifact) -> None:
    assert contexts.given is not None
    settings = {form: dict(told) for form, told in contexts.given.settings.items()}
    settings["shipped"]["htp_graph_finalization_optimization_mode"] = "1"
    other = contexts.model_copy(update={"given": contexts.given.model_copy(update={"settings": settings})})
    figure = compiled.mismatches(other, "npu")
    assert (figure.value, "htp_graph_finalization_optimization_mode 3" in figure.note) == (1, True)


@requires("libatomic1")
@pytest.mark.parametrize("role", ["simulator-given", "simulator-given-shipped"])
def test_both_forms_were_given_the_onnx_graphs(role: str, contexts: Artifact, tmp_path: Path) -> None:
    hurt = copied(contexts, tmp_path / "run")
    for path in hurt.paths(role)[1:]:
        graph = json.loads(path.read_text())
        graph["graph"]["nodes"]["layers.0.shares.exact"]["type"] = "Sigmoid"
        path.write_text(json.dumps(graph))
    figure = compiled.mismatches(hurts.relisted(hurt), "npu")
    assert (figure.value, "given for decode.onnx" in figure.note) == (1, True)


@requires("libatomic1")
def test_a_decode_that_is_prefill_is_named(programs: Artifact, tmp_path: Path) -> None:
    damaged = copied(programs, tmp_path / "run")
    hurts.decode_is_prefill(damaged)
    figure = compiled.mismatches(hurts.relisted(damaged), "npu")
    assert figure.value > 0 and "decode of the program: input hidden" in figure.note


@requires("libatomic1")
def test_codes_drawn_anew_in_what_ships_are_told_by_digest(artifact: Artifact, tmp_path: Path) -> None:
    """Even where artifact.json lists the changed file as it is now."""
    hurt = copied(artifact, tmp_path / "run")
    hurts.drawn_anew("context" if hurt.format == "qnn-context" else "model")(hurt)
    found = readback.differing(hurts.relisted(hurt), lowering.quantized())
    assert found == ["what the compiler was given"]


@requires("libatomic1")
def test_another_source_is_told_by_digest_and_by_its_weights(contexts: Artifact, tmp_path: Path) -> None:
    hurt = copied(contexts, tmp_path / "run")
    weights = source_of(hurt).path("weights")
    content = bytearray(weights.read_bytes())
    start = len(content) // 2
    content[start : start + 64] = bytes(byte ^ 0x11 for byte in content[start : start + 64])
    weights.write_bytes(content)
    given, *wrong = readback.differing(hurt, lowering.quantized())
    assert given == "what the compiler was given" and set(wrong) & set(linear_names(lowering.quantized()))


@requires("libatomic1")
def test_without_its_source_nothing_is_called_right(contexts: Artifact, tmp_path: Path) -> None:
    alone = copied(contexts, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "npu")
    assert compiled.mismatches(alone, "npu").value == 0
    found = readback.read_back(alone, lowering.quantized())
    assert not found.wrong and len(found.untold) > 20
    assert "is not beside it" in " ".join(found.sentences)


def dumped(artifact: Artifact) -> tuple[Path, dict[str, dict[str, dict[str, object]]]]:
    path = artifact.paths("simulator-given")[0]
    return path, json.loads(path.read_text())


@requires("libatomic1")
@pytest.mark.parametrize(
    ("table", "name", "key", "value", "told"),
    [
        ("tensors", "layers.1.up.codes", "quant_params", {"scale_offset": {"scale": 0.001, "offset": 0}}, "scale"),
        ("tensors", "layers.0.keys.codes", "data_type", 0x0416, "uint16"),
        ("tensors", "model.layers.0.mlp.up_proj.codes", "dims", [1, 1, 64, 95], "95"),
        ("nodes", "layers.1.attention_norm.unit.exact", "scalar_params", {"epsilon": {"562": 1e-2}}, "epsilon"),
        ("nodes", "layers.0.shares.exact", "type", "Sigmoid", "Sigmoid instead of Softmax"),
        ("nodes", "layers.0.gated.exact", "input_names", ["layers.0.up.codes", "layers.0.up.codes"], "works on"),
    ],
)
def test_another_graph_than_the_onnx_graph_is_named(
    table: str, name: str, key: str, value: object, told: str, contexts: Artifact, tmp_path: Path
) -> None:
    path, graph = dumped(contexts)
    source = source_of(contexts).path("prefill")
    assert not list(given_faults(path, source))
    graph["graph"][table][name] = {**graph["graph"][table][name], key: value}  # type: ignore[dict-item]
    (tmp_path / "given.json").write_text(json.dumps(graph))
    found = list(given_faults(tmp_path / "given.json", source))
    assert any(name in fault and told in fault for fault in found)


@requires("libatomic1")
@pytest.mark.parametrize("recipe", ["w8-g32", "w8-row-head4"])
def test_other_widths_and_groups_are_sound(recipe: str, tmp_path: Path) -> None:
    one = made(tmp_path, recipe=recipe)
    assert compiled.mismatches(one, "npu").value == 0
    check = TwinCheck(one, lowering.quantized(recipe), "htp")
    with open_blocks(one, "htp", tmp_path / "debug") as shown:
        assert check.figure(shown, "npu").value < 0.7  # type: ignore[arg-type]


def drawn(name: str, change: Change) -> damage.Changed:
    """The checkpoint with codes of one weight drawn anew."""

    def hurt(other: str, weight: QuantizedTensor) -> QuantizedTensor:
        if other != name:
            return weight
        generator = torch.Generator().manual_seed(0)
        codes = weight.codes.clone()
        change(codes, torch.randint(2**weight.bits, codes.shape, generator=generator).to(codes.dtype))
        return replace(weight, codes=codes)

    return damage.Changed.of(lowering.quantized(), hurt)


def one_percent(codes: torch.Tensor, new: torch.Tensor) -> None:
    where = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < 0.01
    codes[where] = new[where]


def column(index: int) -> Change:
    def change(codes: torch.Tensor, new: torch.Tensor) -> None:
        codes[:, index] = new[:, index]

    return change


@requires("libatomic1")
def test_every_column_of_every_matrix_is_seen(contexts: Artifact, tmp_path: Path) -> None:
    """In both graphs; so is one code of a hundred. The sound artifact is held against twins of changed checkpoints."""
    ranges = Ranges.load(source_of(contexts).path("ranges"))
    probes = twin_blocks.probes(contexts, ranges)
    with open_blocks(contexts, "htp", tmp_path) as shown:
        runs = {
            graph: [(feeds, shown.run(feeds)) for feeds in inputs]  # type: ignore[attr-defined]
            for graph, inputs in probes.items()
        }

    def worst(checkpoint: damage.Changed) -> dict[str, float]:
        found = twin_blocks.apart(checkpoint, ranges, contexts.context, runs)
        return {graph: max(apart.ratio for apart in found if apart.graph == graph) for graph in runs}

    names = [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS] + ["lm_head"]
    unseen: list[tuple[str, str]] = []
    for name in names:
        columns = lowering.quantized().linear(name).shape[1]
        for what, change in [
            ("1 %", one_percent),
            *((f"column {index}", column(index)) for index in range(0, columns, 16)),
        ]:
            seen = worst(drawn(name, change))
            unseen += [(name, f"{what} in {graph}: {ratio:.2g}") for graph, ratio in seen.items() if ratio < LIMIT]
    assert not unseen


@requires("libatomic1")
@pytest.mark.parametrize("kind", ["8-bit cache", "in parts", "biases", "576 wide"])
def test_other_models_and_caches_are_sound(kind: str, tmp_path: Path) -> None:
    shape = {
        "biases": {"architecture": "Qwen2ForCausalLM", "layer_norm": False},
        "576 wide": {"hidden": 576, "heads": 9, "kv_heads": 3},
    }.get(kind, {})
    quantized, ranges = lowering.quantized(**shape), lowering.ranges(**shape)
    if kind == "8-bit cache":
        ranges = ranges.model_copy(update={"cache_bits": 8})
    part_bytes = sum(onnx_npu.weight_sizes(quantized)[0]) if kind == "in parts" else None
    graphs = onnx_npu.export(
        quantized,
        ranges,
        tmp_path / "npu",
        context=lowering.CONTEXT,
        chunk=lowering.CHUNK,
        part_bytes=part_bytes,
    )
    one = find("snapdragon").compile(graphs, tmp_path / "compiled")
    assert compiled.mismatches(one, "npu").value == 0 and not readback.differing(one, quantized)
    check = TwinCheck(one, quantized, "htp")
    with open_blocks(one, "htp", tmp_path / "debug") as shown:
        assert check.figure(shown, "npu").value < 0.7  # type: ignore[arg-type]


@requires("libatomic1")
def test_an_artifact_that_answers_otherwise_than_its_graphs_is_seen(contexts: Artifact, tmp_path: Path) -> None:
    """The simulator's binaries are another checkpoint's, under the right names."""
    hurt = copied(contexts, tmp_path / "run")
    changed = drawn("lm_head", column(3))
    place = tmp_path / "changed"
    target = find("snapdragon")
    target.lower(changed, lowering.ranges(), place / "npu", context=lowering.CONTEXT, chunk=lowering.CHUNK)
    other = target.compile(Artifact.open(place / "npu"), place / "compiled")
    for role in ("simulator-prefill", "simulator-decode", "simulator-context"):
        for mine, theirs in zip(hurt.paths(role), other.paths(role), strict=True):
            shutil.copyfile(theirs, mine)
    assert excess(hurts.relisted(hurt), tmp_path / "debug") > 1
    assert binary_of(hurt.path("simulator-decode")) in hurt.paths("simulator-context")
