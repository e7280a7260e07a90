"""ExecuTorch artifacts: exact weights, logits against dequantized torch, ExecuTorch's own LLM runner, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from bluelm.errors import InputError, TargetError
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from compress.methods.grid import choose_grid
from eval.files import size_plan, structure
from export.artifacts.artifact import Artifact
from export.executorch import xnnpack as executorch
from export.executorch.partition import segments_of
from export.executorch.reader import embedding_codes, read
from targets.host.torch_runtime import TorchRuntime
from targets.runners.runner import open_runner
from targets.runtime import open_runtime
from tests.support.answers import TEXT, mean_kl
from tests.support.checkpoints.rounded import linear_names, rounded
from tests.support.checkpoints.shapes import tiny_checkpoint

CONTEXT, CHUNK = 64, 16


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """The demo model with one block: lowering time grows with the blocks."""
    return rounded(tmp_path_factory.mktemp("executorch") / "quantized", blocks=1)


@pytest.fixture(scope="module")
def artifact(block: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("executorch") / "artifact"
    return executorch.export(block, folder, context=CONTEXT, chunk=CHUNK)


def test_codes_and_scales_in_the_file_are_the_checkpoints(block: QuantizedCheckpoint, artifact: Artifact):
    contents = read(artifact.path("model"))
    found = {fingerprint(weight) for weight in contents.linears}
    assert found == {fingerprint(block.linear(name)) for name in linear_names(block)}
    assert len(contents.linears) == len(linear_names(block))
    table = block.embed()
    (codes,) = embedding_codes(contents, table.shape)
    assert np.array_equal(codes, table.signed_codes().numpy())


def fingerprint(weight: QuantizedTensor) -> tuple[bytes, bytes, int, int]:
    return weight.codes.numpy().tobytes(), weight.scales.numpy().tobytes(), weight.bits, weight.groups


def test_linears_run_in_xnnpack_and_runners_find_what_they_ask_for(artifact: Artifact):
    contents = read(artifact.path("model"))
    assert set(contents.delegates) == {"XnnpackBackend"}
    asked = {"get_vocab_size", "get_max_seq_len", "get_max_context_len", "get_bos_id", "get_eos_ids"}
    assert {"forward", "use_kv_cache", "enable_dynamic_shape"} | asked <= set(contents.methods)


def test_the_file_names_the_end_tokens_and_has_the_size_that_was_planned(
    block: QuantizedCheckpoint, artifact: Artifact
):
    parts = size_plan.planned_parts(block, artifact)
    assert parts is not None
    assert size_plan.deviation(sum(parts.values()), artifact) == 0
    with open_runtime(artifact.folder) as runtime:
        figure = structure.end_token(artifact, block.config, runtime, TEXT[:4], "cpu")
        other = structure.end_token(artifact, replace(block.config, eos_token_ids=(7,)), runtime, TEXT[:4], "cpu")
    assert figure.value == 0
    assert "model.pte says [2], the checkpoint [7]" in other.note


def test_only_embedding_cache_and_attention_lie_between_xnnpacks_graphs(artifact: Artifact):
    (plan,) = (plan for plan in read(artifact.path("model")).file.program.execution_plan if plan.name == "forward")
    assert len(plan.delegates) == artifact.model.num_layers + 1
    assert {operator.name for operator in plan.operators} == {
        "llama::custom_sdpa",
        "llama::update_cache",
        "quantized_decomposed::embedding_byte",
        *("aten::sym_size", "aten::select_copy", "aten::_local_scalar_dense", "executorch_prim::add"),  # the position
        "aten::slice_copy",  # rows of the rope table
    }


def test_no_path_leaves_a_segment_and_comes_back():
    graph = torch.fx.Graph()
    x, constant = graph.placeholder("x"), graph.placeholder("constant")
    first = graph.call_function(torch.relu, (x,))
    outside = graph.call_function(torch.sin, (first,))
    weight = graph.call_function(torch.neg, (constant,))  # of constants alone: belongs where it is used
    beside = graph.call_function(torch.relu, (first,))
    second = graph.call_function(torch.add, (outside, weight))
    last = graph.call_function(torch.add, (second, beside))
    runs = {first, weight, beside, second, last}
    found = segments_of(list(graph.nodes), runs, {constant})
    assert found == {first: 1, beside: 1, weight: 2, second: 2, last: 2}


def test_logits_agree_and_the_programs_runner_says_what_ours_says(block: QuantizedCheckpoint, artifact: Artifact):
    tokens = (TEXT * 3)[:40]
    reference = TorchRuntime(block, CONTEXT).logits(tokens)
    with open_runtime(artifact.folder) as runtime:
        assert mean_kl(reference, runtime.logits(tokens)) < 5e-3  # 8-bit activations
        runtime.reset()
        stepped = np.stack([runtime.decode(token) for token in tokens])
        assert mean_kl(reference, stepped) < 5e-3

        ids = block.tokenizer().encode("The phone is", bos=True)
        said = [int(runtime.logits(ids)[-1].argmax())]
        while len(said) < 20 and said[-1] not in artifact.model.eos_token_ids:
            said.append(int(runtime.decode(said[-1]).argmax()))
    with open_runner(artifact) as runner:
        assert list(runner.answer(ids, 20).tokens) == [
            token for token in said if token not in artifact.model.eos_token_ids
        ]


@pytest.mark.parametrize("bits", [8, 16])
def test_narrow_caches_cost_little(bits, tmp_path):
    quantized = rounded(tmp_path / "q", source=tiny_checkpoint(tmp_path / "tiny"), blocks=1)
    made = executorch.export(quantized, tmp_path / "a", context=32, chunk=1, kv_bits=bits)
    with open_runtime(made.folder) as runtime:
        assert mean_kl(TorchRuntime(quantized, 32).logits(TEXT), runtime.logits(TEXT)) < 5e-3


def weight(bits: int, group: int, symmetric: bool = True) -> QuantizedTensor:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    return choose_grid(values, bits, group, symmetric).nearest(values)


def test_what_xnnpack_cannot_hold_is_refused():
    executorch.check_weight(weight(4, 32), "fine")
    executorch.check_weight(weight(8, -1), "fine")
    for bad, why in (
        (weight(4, 32, symmetric=False), "zero points"),
        (weight(8, 32), "8-bit"),
        (weight(4, 16), "multiple of 32"),
    ):
        with pytest.raises(TargetError, match=why):
            executorch.check_weight(bad, "layer")
    exact = weight(4, 32)
    fine = QuantizedTensor(exact.codes, exact.scales * 1.001, exact.zeros, 4, 32)
    with pytest.raises(TargetError, match="bfloat16"):
        executorch.check_weight(fine, "layer")


def test_a_damaged_program_is_bad_input(artifact: Artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    path = copy / "model.pte"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match="cannot load"):
        open_runtime(copy)
