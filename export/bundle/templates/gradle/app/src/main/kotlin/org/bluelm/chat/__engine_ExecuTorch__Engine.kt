package org.bluelm.chat

import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** A .pte with `forward(tokens int64 [1, T], input_pos int64 [1]) -> logits [1, T, vocab]`; its cache is inside. */
class ExecuTorchEngine(pack: ModelPack) : Engine {
    private val module = Module.load(pack.file(pack.path("model")).path)
    private val chunk = pack.artifact.getInt("chunk")
    override val context = pack.artifact.getInt("context")
    override var position = 0
        private set

    override fun reset() {
        position = 0
    }

    override fun advance(tokens: IntArray): FloatArray {
        var logits = FloatArray(0)
        var done = 0
        while (done < tokens.size) {
            val count = minOf(chunk, tokens.size - done)
            require(position + count <= context) { "the context of $context tokens is full" }
            val ids = LongArray(count) { tokens[done + it].toLong() }
            val all = module.forward(
                EValue.from(Tensor.fromBlob(ids, longArrayOf(1, count.toLong()))),
                EValue.from(Tensor.fromBlob(longArrayOf(position.toLong()), longArrayOf(1)))
            )[0].toTensor().dataAsFloatArray
            val vocabulary = all.size / count
            logits = all.copyOfRange(all.size - vocabulary, all.size)
            position += count
            done += count
        }
        return logits
    }

    override fun close() = module.destroy()
}

fun openEngine(pack: ModelPack): Engine = ExecuTorchEngine(pack)
