"""Cutting a decoder into parts by its blocks, for targets whose programs may hold only so much.

    tokens -> [part 1: blocks 0 to 7] -> [part 2: blocks 8 to 15] -> ... -> [last part: ..., head] -> logits

Hidden states go from a part to the next as they would inside one program, so the logits are those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from bluelm.errors import TargetError


@dataclass(frozen=True)
class Part:
    """What one program holds: the embedding (or embedded tokens as input), some blocks, the head."""

    embeds: bool
    first: int
    last: int  # one behind
    heads: bool

    @property
    def layers(self) -> range:
        """Blocks of this part."""
        return range(self.first, self.last)


def whole(blocks: int) -> Part:
    """The one part of a model that is not cut."""
    return Part(True, 0, blocks, True)


def split(embedding: int, blocks: list[int], head_bytes: int, limit: int) -> list[Part]:
    """Parts of at most `limit` bytes, blocks in order; embedding and head join a part where they fit.

    Raises:
        TargetError: one block, the embedding or the head alone exceeds the limit.
    """
    for name, size in [("the embedding", embedding), ("the head", head_bytes), ("a block", max(blocks))]:
        if size > limit:
            raise TargetError(
                f"{name} takes {size:,} bytes, one program may hold {limit:,}",
                fix="use fewer bits for it, or raise the limit of a program",
            )
    parts: list[Part] = []
    embeds, first, held = True, 0, embedding
    for layer, size in enumerate(blocks):
        if held + size > limit:
            parts.append(Part(embeds, first, layer, heads=False))
            embeds, first, held = False, layer, 0
        held += size
    if held + head_bytes <= limit:
        return [*parts, Part(embeds, first, len(blocks), heads=True)]
    return [*parts, Part(embeds, first, len(blocks), False), Part(False, len(blocks), len(blocks), True)]
