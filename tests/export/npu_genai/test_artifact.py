"""onnx-npu-genai: it computes what onnx-npu does, its files say what genai has to be told, and no damage passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper

from bluelm.errors import InputError, TargetError
from bluelm.system.files import demo_checkpoint
from bluelm.text.tokenizer import Tokenizer
from compress.checkpoint.store import EMBED, QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.embedding import EmbeddingTable, write_embedding
from export.lowering.ranges import Ranges, calibrate
from export.npu_genai.config import padding
from export.npu_genai.export import export
from export.npu_genai.front import front
from export.onnx import npu
from export.readback import differing, items, read_back
from targets.host.cached_runtime import step_mask
from targets.registry import find
from targets.runtime import open_runtime
from tests.support.checkpoints import lowered as lowering
from tests.support.checkpoints.rounded import rounded
from tests.support.damage import again

CONTEXT, CHUNK = 64, 16
TEXT = [1, *range(4, 54)]


def calibrated(quantized: QuantizedCheckpoint) -> Ranges:
    return calibrate(quantized, torch.tensor([[1, *range(at, at + 40)] for at in (4, 50, 300, 1000)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Artifact]:
    """Two blocks of the demo."""
    place = tmp_path_factory.mktemp("npu-genai")
    quantized = rounded(place / "q", blocks=2)
    return quantized, export(quantized, calibrated(quantized), place / "a", context=CONTEXT, chunk=CHUNK)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("part_bytes", [None, 30_000])
def test_it_computes_what_the_graphs_of_a_host_do(bits: Literal[8, 16], part_bytes: int | None, tmp_path: Path) -> None:
    """Bit for bit, at every length, in one part and in several; all of it is read back."""
    quantized = lowering.quantized()
    ranges = lowering.ranges().model_copy(update={"cache_bits": bits})
    whole = npu.export(quantized, ranges, tmp_path / "npu", context=32, chunk=8)
    slid = export(quantized, ranges, tmp_path / "slid", context=32, chunk=8, part_bytes=part_bytes)
    assert len(slid.paths("prefill")) == (2 if part_bytes is None else 3)
    assert read_back(slid, quantized).wrong == () and read_back(slid, quantized).untold == ()
    tokens = lowering.tokens(32)
    with open_runtime(whole.folder, on="cpu") as one, open_runtime(slid.folder, on="cpu") as other:
        for split in (1, 8, 13, 31):
            for runtime in (one, other):
                runtime.reset()
            a, b = ([r.prefill(tokens[:split]), *(r.decode(t)[None] for t in tokens[split:])] for r in (one, other))
            assert np.array_equal(np.concatenate(a), np.concatenate(b))


def test_the_first_stage_makes_of_a_step_what_a_host_would(made: tuple[QuantizedCheckpoint, Artifact]) -> None:
    """Rows, positions and mask; the cache's slots are the last ones, of which genai's mask tells."""
    _, artifact = made
    session = onnxruntime.InferenceSession(artifact.path("front"), providers=["CPUExecutionProvider"])
    table = EmbeddingTable.open(artifact.path("embedding"))
    for held, tokens, pads in ((0, 5, 11), (16, 16, 0), (40, 1, 0), (63, 1, 0)):
        real = list(range(7, 7 + tokens))
        given = {
            "input_ids": np.array([[3] * pads + real], np.int32),
            "position_ids": np.array([[0] * pads + list(range(held, held + tokens))], np.int32),
            "attention_mask": np.array([[0] * (CONTEXT - held - tokens) + [1] * (held + tokens)], np.int32),
        }
        hidden, positions, mask = map(np.asarray, session.run(["hidden", "positions", "mask"], given))
        np.testing.assert_array_equal(hidden[0, pads:], table.rows(real))
        assert positions.tolist() == given["position_ids"][0].tolist()
        wanted = np.full((tokens, CONTEXT), artifact.mask_value, np.float32)
        for row in range(tokens):
            wanted[row, CONTEXT - held - tokens : CONTEXT - tokens + row + 1] = 0
        np.testing.assert_array_equal(mask[0, 0, pads:], wanted)
    first = step_mask(0, CHUNK, CONTEXT, artifact.mask_value)  # a whole chunk at the beginning is a host's, too
    given = {
        "input_ids": np.arange(CHUNK, dtype=np.int32)[None],
        "position_ids": np.arange(CHUNK, dtype=np.int32)[None],
        "attention_mask": np.array([[0] * (CONTEXT - CHUNK) + [1] * CHUNK], np.int32),
    }
    np.testing.assert_array_equal(np.asarray(session.run(["mask"], given)[0]), first)


Told = dict[str, Any]


def told(change: Callable[[Told], object]) -> Callable[[Artifact], None]:
    """genai_config.json otherwise."""

    def files(artifact: Artifact) -> None:
        path = artifact.path("genai")
        config = json.loads(path.read_text(encoding="utf-8"))
        change(config)
        path.write_text(json.dumps(config), encoding="utf-8")

    return files


def decoder(**values: object) -> Callable[[Artifact], None]:
    return told(lambda config: config["model"]["decoder"].update(values))


def window(**values: object) -> Callable[[Artifact], None]:
    return told(lambda config: config["model"]["decoder"]["sliding_window"].update(values))


def stages(change: Callable[[Told], Told]) -> Callable[[Artifact], None]:
    def changed(config: Told) -> None:
        (found,) = config["model"]["decoder"]["pipeline"]
        config["model"]["decoder"]["pipeline"] = [change(found)]

    return told(changed)


def stage(name: str, **values: object) -> Callable[[Artifact], None]:
    return stages(lambda found: found | {name: found[name] | values})


def graph(role: str, change: Callable[[ModelProto], object]) -> Callable[[Artifact], None]:
    """The first graph of a role otherwise."""

    def files(artifact: Artifact) -> None:
        path = artifact.path(role)
        model = onnx.load(path, load_external_data=False)
        change(model)
        onnx.save(model, path)

    return files


def swapped(inputs: str, outputs: str) -> Callable[[Artifact], None]:
    """Keys and values change places at the border."""
    names = {
        "inputs": {"past_key_names": f"past_{inputs}.%d", "past_value_names": "past_keys.%d"},
        "outputs": {"present_key_names": f"{outputs}.%d", "present_value_names": "keys.%d"},
    }

    def changed(config: Told) -> None:
        for side, values in names.items():
            config["model"]["decoder"][side].update(values)

    return told(changed)


def zero_point(model: ModelProto) -> None:
    """The cache of a layer comes in with another zero point."""
    node = next(node for node in model.graph.node if node.input[0] == "past_keys.1")
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int16), "zero.int16.3"))
    node.input[2] = "zero.int16.3"


def crossed(model: ModelProto) -> None:
    """Keys of a layer go out as its values."""
    names = {"keys.0": "values.0", "values.0": "keys.0"}
    for node in model.graph.node:
        for sides in (node.input, node.output):
            for index, name in enumerate(sides):
                sides[index] = names.get(name, name)


def elsewhere(model: ModelProto) -> None:
    """The table begins a row further."""
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == "embed.codes")
    offset = next(entry for entry in codes.external_data if entry.key == "offset")
    offset.value = str(int(offset.value) + codes.dims[1])


def shallow(model: ModelProto) -> None:
    """What hides a slot hides it less."""
    for tensor in model.graph.initializer:
        if tensor.name.startswith("scale.") and float(numpy_helper.to_array(tensor)):
            tensor.CopyFrom(numpy_helper.from_array(np.array(-1, np.float32), tensor.name))


def unhidden(model: ModelProto) -> None:
    """A token's own slot counts as one before it."""
    node = next(node for node in model.graph.node if node.op_type == "CumSum")
    del node.attribute[:]


DAMAGES: dict[str, tuple[str, Callable[[Artifact], None]]] = {
    "a stage that is not there": (items.TELLS, stage("decode_1", filename="decode_3.onnx")),
    "a stage less": (items.TELLS, stages(lambda s: {n: v for n, v in s.items() if n != "decode_2"})),
    "prefill for decode": (items.TELLS, stage("decode_1", filename="prefill_1.onnx")),
    "decode on prompts, too": (items.TELLS, stage("decode_1", run_on_prompt=True)),
    "another order": (items.TELLS, stages(lambda s: dict(reversed(s.items())))),
    "no mask goes in": (items.TELLS, stage("front", inputs=["input_ids", "position_ids"])),
    "a head for each window": (items.TELLS, stage("prefill_2", is_lm_head=False)),
    "a provider": (items.TELLS, stage("decode_1", session_options={"provider_options": [{"QNN": {}}]})),
    "another window": (items.TELLS, window(window_size=CHUNK // 2)),
    "filled up behind": (items.TELLS, window(alignment="left")),
    "genai slides as well": (items.TELLS, window(slide_key_value_cache=True)),
    "another value of empty slots": (items.TELLS, window(pad_value=128)),
    "filled up with the begin token": (items.TELLS, told(lambda config: config["model"].update(pad_token_id=1))),
    "a longer context": (items.TELLS, told(lambda config: config["model"].update(context_length=128))),
    "another end token": (items.TELLS, told(lambda config: config["model"].update(eos_token_id=7))),
    "drawn": (items.TELLS, told(lambda config: config["search"].update(do_sample=True))),
    "no buffer for both": (items.TELLS, told(lambda config: config["search"].update(past_present_share_buffer=False))),
    "other heads": (items.TELLS, decoder(num_key_value_heads=2)),
    "caches swapped in the config": (items.TELLS, swapped("values", "values")),
    "caches swapped in a graph": (items.GRAPH, graph("decode", crossed)),
    "another zero point": (items.ENCODINGS, graph("decode", zero_point)),
    "rows of other tokens": (EMBED, graph("front", elsewhere)),
    "a mask that hides little": (items.GRAPH, graph("front", shallow)),
    "a mask that shows one slot too few": (items.GRAPH, graph("front", unhidden)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, made: tuple[QuantizedCheckpoint, Artifact], tmp_path: Path) -> None:
    quantized, artifact = made
    item, change = DAMAGES[damage]
    hurt = Artifact.open(Path(shutil.copytree(artifact.folder, tmp_path / "a")))
    change(hurt)
    assert item in differing(again(hurt), quantized)


def test_nothing_is_wrong_without_damage(made: tuple[QuantizedCheckpoint, Artifact]) -> None:
    quantized, artifact = made
    assert differing(artifact, quantized) == [] and read_back(artifact, quantized).sentences == []


def test_what_genai_cannot_window_is_refused_before_any_work() -> None:
    target = find("snapdragon", runtime="qnn-genai")
    config = lowering.checkpoint().config
    recipe = lowering.quantized().recipe
    for context, chunk in ((32, 32), (32, 12), (32, 1)):
        with pytest.raises(InputError, match="not two or more chunks"):
            target.check(config, recipe, context, chunk)
        with pytest.raises(InputError, match="not two or more chunks"):
            export(lowering.quantized(), lowering.ranges(), Path("never"), context=context, chunk=chunk)
    target.check(config, recipe, 32, 8)


def test_an_embedding_that_the_first_stage_cannot_hold_is_refused(tmp_path: Path) -> None:
    table = rounded(tmp_path / "q", blocks=1).embed()
    write_embedding(tmp_path / "embedding.safetensors", table)
    front(table, tmp_path / "embedding.safetensors", CONTEXT, -100.0)
    with pytest.raises(TargetError, match="one scale a row"):
        front(replace(table, zeros=table.zeros + 1), tmp_path / "embedding.safetensors", CONTEXT, -100.0)


def test_a_prompt_is_filled_up_with_a_token_that_no_prompt_needs(tmp_path: Path) -> None:
    tokenizer, config = Tokenizer.from_folder(demo_checkpoint()), rounded(tmp_path / "q", blocks=1).config
    own = json.loads((demo_checkpoint() / "config.json").read_text(encoding="utf-8"))["pad_token_id"]
    assert padding(tokenizer, config) == own == 3
    other = padding(tokenizer, replace(config, pad_token_id=config.eos_token_ids[0]))
    assert other not in {*config.eos_token_ids, config.bos_token_id, 4, 5}  # 4 and 5: whose turn it is
    with pytest.raises(TargetError, match="every mark of this vocabulary is needed"):
        padding(replace(tokenizer, pad=None), replace(config, pad_token_id=None, eos_token_ids=(0, 2, 3)))
