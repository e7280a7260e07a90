"""A block of a program followed backwards, from what it gives to what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    return stream_of(block, {block.stream[-1]: behind}, inputs, alike)


def stream_of(
    block: Block,
    made: Mapping[str, NodeT],
    inputs: Callable[[Step, NodeT], Sequence[NodeT]],
    alike: Callable[[NodeT, NodeT, str], None],
) -> NodeT:
    """The stream before a block, from some of its values by name; steps that none of them needs are left out."""
    values = dict(made)
    for step in reversed(block.steps):
        if step.makes in values:
            for name, found in zip(step.inputs, inputs(step, values[step.makes]), strict=True):
                alike(found, values.setdefault(name, found), f"{name}, read by what makes {step.makes},")
    return values[STREAM]
