"""Which nodes of the decoder become one XNNPACK graph: all that lie between two operators that it does not have.

ExecuTorch's own partitioners put linears with rounded inputs, and what lies between them, into delegates of their own:
some ten a block, each with its inputs and outputs in memory and a call of a microsecond. Theirs also compare every pair
of nodes, which takes minutes for a small model. Here

    embedding -> norm, q k v, rope -> cache, attention -> o, norm, gate up, down, norm, q k v, rope -> cache ... -> head
                 `-- one graph --'                        `--------------- one graph --------------'
"""

from __future__ import annotations

from collections import defaultdict

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.canonical_partitioners.config_partitioner import is_constant_data
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.infra.partitioner import Partition


class SegmentPartitioner(XnnpackPartitioner):
    """XNNPACK's rules of what it can run; one delegate for each stretch of such nodes."""

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        runs = {node for group in self.get_matched_nodes_from_configs(ep) for node in group}
        constants = {node for node in ep.graph_module.graph.nodes if is_constant_data(ep, node)}
        segments: dict[int, list[Node]] = defaultdict(list)
        for node, segment in segments_of(list(ep.graph_module.graph.nodes), runs, constants).items():
            segments[segment].append(node)
        return [Partition(id=segment, nodes=nodes) for segment, nodes in segments.items()]


def segments_of(nodes: list[Node], runs: set[Node], constants: set[Node]) -> dict[Node, int]:
    """For each node of `runs`: how many times a path from the inputs to it leaves `runs` and comes back, at most.

    No path leads from a segment out and back into it, so segments can be fused without a cycle.

    Args:
        nodes: all of the graph, in an order in which they can run.
    """
    depth: dict[Node, int] = {}
    for node in nodes:
        sources = [source for source in node.all_input_nodes if source not in constants]
        depth[node] = max(
            (depth[source] + (node in runs and source not in runs) for source in sources),
            default=0,
        )
    for node in reversed(nodes):  # what is computed from constants alone goes where it is used
        if node in runs and node.users and all(source in constants for source in node.all_input_nodes):
            depth[node] = min(depth[user] for user in node.users)
    return {node: depth[node] for node in nodes if node in runs}
