"""A block of a program followed backwards, from what it gives to what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from bluelm.block import STREAM, Block, Step

NodeT = TypeVar("NodeT")


def stream_before(
    block: Block,
    behind: NodeT,
    inputs: Callable[[Step, NodeT], Sequence[NodeT]],
    alike: Callable[[NodeT, NodeT, str], None],
) -> NodeT:
    """The stream before a block, from that behind it: its steps, the last one first.

    Args:
        inputs: what a step that makes a node is made of, in the order of `Step.inputs`.
        alike: raises unless two nodes, which are to be the same value, are; the last argument says of which.
    """
    values = {block.stream[-1]: behind}
    for step in reversed(block.steps):
        for name, found in zip(step.inputs, inputs(step, values[step.makes]), strict=True):
            alike(found, values.setdefault(name, found), f"{name}, read by what makes {step.makes},")
    return values[STREAM]
