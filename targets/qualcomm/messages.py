"""Messages between the tool and the child process that holds Qualcomm's libraries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHARING = {"enable_htp_weight_sharing": "1", "ep.share_ep_contexts": "1"}
"""Settings of the form that ships alone: both graphs in one binary, which holds the weights once."""


@dataclass(frozen=True)
class Chip:
    """Which NPU to compile for or to simulate."""

    soc_model: int
    hexagon_arch: int


@dataclass(frozen=True)
class Compile:
    """Compile the graph `source` to an EPContext wrapper `target` and a binary beside it. Answer: `Compiled`.

    Attributes:
        share: this graph's weights join the binary of the other graphs of this child that share.
        last: it is the last of those.
        severity: of onnxruntime's log, 0 (all) to 3 (errors).
        dump: where to write the graph that the compiler is given, as JSON; None: nowhere.
    """

    source: str
    target: str
    chip: Chip
    share: bool = False
    last: bool = False
    severity: int = 2
    dump: str | None = None


@dataclass(frozen=True)
class Compiled:
    """Nodes that the NPU took, by operation, and the settings that the compiler was given."""

    kinds: dict[str, int]
    settings: dict[str, str]


@dataclass(frozen=True)
class LoadGraphs:
    """Open a graph, ONNX or EPContext, for running under a name. Answer: `GraphsLoaded`."""

    name: str
    source: str
    chip: Chip


@dataclass(frozen=True)
class GraphsLoaded:
    """Names of the graph's inputs and outputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class RunGraph:
    """Run a loaded graph. Answer: `GraphRan`."""

    name: str
    inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class GraphRan:
    """Outputs by name."""

    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Describe:
    """What does the compiled binary `path` say of itself? Answer: `BinaryContents`."""

    path: str


@dataclass(frozen=True)
class TensorBorder:
    """An input or output of a compiled graph; value = (code - zero) * scale. `scale` None: it holds no codes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero: int = 0


@dataclass(frozen=True)
class GraphBorder:
    """A compiled graph as it is seen from outside."""

    name: str
    inputs: tuple[TensorBorder, ...]
    outputs: tuple[TensorBorder, ...]


@dataclass(frozen=True)
class BinaryContents:
    """A compiled binary: the compiler that wrote it, Qualcomm's number of the chip, the graphs."""

    compiler: str
    soc_model: int
    graphs: tuple[GraphBorder, ...]


Message = Compile | LoadGraphs | RunGraph | Describe
