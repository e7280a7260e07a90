package org.bluelm.chat

import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** A .pte of the methods `prefill` and `decode` on an NPU; inputs and outputs are those of the ONNX graphs, in order. */
class ExecuTorchStaticEngine(pack: ModelPack) : SteppedEngine(pack) {
    private val module: Module

    init {
        pack.showHexagonLibraries()
        module = Module.load(pack.file(pack.path("model")).path)
    }

    override fun run(step: Step, width: Int, rows: FloatArray): FloatArray {
        val slots = context - width
        val inputs = arrayListOf(
            floats(rows, 1, width, hidden),
            EValue.from(Tensor.fromBlob(steps.positions(step.start, width), longArrayOf(width.toLong()))),
            floats(steps.mask(step.start, width), 1, 1, width, context)
        )
        for (layer in 0 until steps.layers) {
            inputs += floats(steps.pastKeys(layer, width), 1, steps.heads, steps.size, slots)
            inputs += floats(steps.pastValues(layer, width), 1, steps.heads, slots, steps.size)
        }
        val found = module.execute(if (width == 1) "decode" else "prefill", *inputs.toTypedArray())
        fun numbers(index: Int): FloatArray = found[index].toTensor().dataAsFloatArray
        for (layer in 0 until steps.layers) {
            steps.store(layer, step, width, numbers(1 + 2 * layer), numbers(2 + 2 * layer))
        }
        return numbers(0)
    }

    private fun floats(data: FloatArray, vararg shape: Int): EValue =
        EValue.from(Tensor.fromBlob(data, LongArray(shape.size) { shape[it].toLong() }))

    override fun close() = module.destroy()
}

fun openEngine(pack: ModelPack): Engine = ExecuTorchStaticEngine(pack)
