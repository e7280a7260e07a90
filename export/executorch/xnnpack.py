"""ExecuTorch: one .pte for XNNPACK, the CPU kernels of every arm64 phone, that ExecuTorch's own LLM
runners load.

    torch module -> torch.export -> all but embedding, cache and attention to XNNPACK -> .pte

Codes and scales are buffers of the module and reach the file as they are; nothing is requantized. Both are read
when their delegate is written (`export/executorch/memory.py`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch.export import Dim, ExportedProgram

from bluelm.config import ModelConfig
from bluelm.errors import TargetError
from bluelm.system.files import atomic_folder
from bluelm.system.progress import Progress, Silent
from compress.checkpoint.quantized import QuantizedTensor
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.artifacts.debug import DEBUG_NOTE
from export.artifacts.mobile import KvBits, complete
from export.executorch.memory import shared_weights, stand_in, weights_when_serialized
from export.executorch.model import ExecutorchDecoder, parts
from export.executorch.partition import SegmentPartitioner
from export.tokenizer.llm_runner import write_tokenizer

MODEL = "model.pte"


def export(
    quantized: QuantizedCheckpoint,
    folder: Path,
    *,
    context: int = 512,
    chunk: int = 128,
    kv_bits: KvBits = 32,
    debug: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact `folder`: model.pte and the tokenizer's files, also as TextLLMRunner reads them.

    Args:
        context: tokens that the cache holds.
        chunk: most tokens that one call takes.
        debug: the program gives the output of each block as well.
        kv_bits: width of the cache's numbers.

    Raises:
        TargetError: XNNPACK has no kernel for a weight, or TextLLMRunner cannot read the tokenizer; says which.
    """
    with atomic_folder(folder) as temporary:
        write(
            quantized,
            temporary / MODEL,
            context=context,
            chunk=chunk,
            kv_bits=kv_bits,
            debug=debug,
            progress=progress,
        )
        complete(
            temporary,
            "executorch-xnnpack",
            quantized,
            {MODEL: "model"} | write_tokenizer(temporary, quantized.folder, context),
            context=context,
            chunk=chunk,
            kv_bits=kv_bits,
            producers={"executorch": version("executorch"), "torch": version("torch")},
            notes=(DEBUG_NOTE,) if debug else (),
        )
    return Artifact.open(folder)


def write(
    quantized: QuantizedCheckpoint,
    path: Path,
    *,
    context: int,
    chunk: int,
    kv_bits: KvBits,
    debug: bool = False,
    progress: Progress | None = None,
) -> None:
    """Lower the model into the file `path`."""
    with (progress or Silent()).task("lower to ExecuTorch", 3) as task, quiet():
        task.advance(note="torch.export")
        program, sources = _trace(quantized, context, chunk, kv_bits, debug)
        task.advance(note="XNNPACK")
        with shared_weights(), weights_when_serialized(sources):
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[SegmentPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods=metadata(quantized.config, context, chunk),
            )
        del program
        task.advance(note="memory plan")
        settings = ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
        with path.open("wb") as file:
            edge.to_executorch(settings).write_to_file(file)


def metadata(config: ModelConfig, context: int, chunk: int) -> dict[str, object]:
    """What ExecuTorch's LLM runners ask a program, as methods without inputs; `get_max_seq_len` is a step's most."""
    ends = list(config.eos_token_ids)
    return {
        "get_vocab_size": config.vocab_size,
        "get_max_seq_len": chunk,
        "get_max_context_len": context,
        "get_bos_id": config.bos_token_id if config.bos_token_id is not None else -1,
        "get_eos_ids": ends,
        "get_n_layers": config.num_layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def check_weight(weight: QuantizedTensor, name: str) -> None:
    """TargetError unless XNNPACK holds this weight exactly: symmetric; 4 bits in groups of a multiple
    of 32, their scales exact in bfloat16; or one scale a row."""
    problem = fix = ""
    if not weight.symmetric:
        problem, fix = "XNNPACK has no zero points for weights", "use a symmetric recipe"
    elif weight.groups == 1:
        return
    elif weight.bits == 8:
        problem, fix = (
            "XNNPACK has no groups for 8-bit weights",
            "use one scale a row (group size -1) for 8 bits",
        )
    elif weight.columns_per_group % 32:
        problem, fix = "XNNPACK wants groups of a multiple of 32", "use --group-size 32, 64 or 128"
    elif not bool((weight.scales.bfloat16() == weight.scales).all()):
        problem = "XNNPACK stores bfloat16 scales, and these have more digits"
        fix = "quantize with bluelm-export, whose scales are exact in float16 and bfloat16"
    if problem:
        raise TargetError(problem, where=name, fix=fix)


def _trace(
    quantized: QuantizedCheckpoint, context: int, chunk: int, kv_bits: KvBits, debug: bool
) -> tuple[ExportedProgram, dict[str, Callable[[], dict[str, torch.Tensor]]]]:
    """The program with stand-ins for weights, and what reads these."""
    model = ExecutorchDecoder(
        quantized, context=context, kv_bits=kv_bits, check=check_weight, debug=debug, hold=stand_in
    ).eval()
    tokens = Dim("tokens", min=1, max=chunk) if chunk > 1 else None
    example = (torch.zeros(1, min(chunk, 7), dtype=torch.long), torch.tensor([0]))
    shapes = ({1: tokens}, {}) if tokens is not None else None
    sources = {path: partial(_read, quantized, name) for path, name in model.sources().items()}
    with torch.inference_mode():
        return torch.export.export(model, example, dynamic_shapes=shapes, strict=False), sources


def _read(quantized: QuantizedCheckpoint, name: str) -> dict[str, torch.Tensor]:
    return parts(quantized.linear(name))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's and ExecuTorch's notes on their own future out of ours."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
