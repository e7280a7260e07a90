"""AWQ's scales in front of GPTQ's codes: for models with outlier channels."""

from __future__ import annotations

from dataclasses import replace

from compress.methods.awq import fold_searched
from compress.methods.gptq import Gptq, GptqOptions
from compress.methods.protocol import FloatBlock, Folded, Statistics


class AwqGptq(Gptq):
    """GPTQ, of a block whose channels are scaled; its options are GPTQ's."""

    def statistics(self, options: GptqOptions) -> Statistics:
        return replace(super().statistics(options), float_block=True)

    def fold(self, block: FloatBlock, options: GptqOptions) -> Folded:
        return fold_searched(block, clip=False)  # GPTQ moves errors on: it judges spans by itself


METHOD = AwqGptq()
