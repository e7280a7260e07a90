"""Every architecture through Qualcomm's compiler: nothing that lies in a sound artifact is called wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.files import compiled
from export.readback import items, read_back
from targets.registry import find
from tests.export.readback.test_architectures import EXPORTERS, MODELS, source
from tests.packages import requires

RUNTIMES = {
    "qnn-context": [name for name in MODELS if name != "inner_172"],  # HTP takes no row of 172
    "executorch-qnn": ["qwen3", "glm", "tied"],  # packs the same compiler's binaries: where the blocks differ most
}
CASES = [(model, runtime) for runtime, models in RUNTIMES.items() for model in models]


@requires("libatomic1")
@pytest.mark.parametrize(("model", "runtime"), CASES)
def test_a_sound_artifact_has_no_fault(model: str, runtime: str, tmp_path: Path) -> None:
    held = source(model, "w8-row", True)  # one block
    graphs = EXPORTERS["onnx-npu"](held, tmp_path / "npu")
    artifact = find("snapdragon", runtime=runtime).compile(graphs, tmp_path / "compiled")
    assert not compiled.mismatches(artifact, "npu").note
    found = read_back(artifact, held)
    assert not [str(finding) for finding in found.wrong]
    told = {finding.item for finding in found.untold}
    assert told >= {*items.linear_names(held), *items.vector_names(held), items.ROPE, items.GRAPH}
