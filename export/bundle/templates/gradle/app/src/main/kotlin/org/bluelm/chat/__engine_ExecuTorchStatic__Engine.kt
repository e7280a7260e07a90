package org.bluelm.chat

import org.json.JSONArray
import org.json.JSONObject
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * A .pte whose methods are compiled graphs for an NPU; methods.json names them, their inputs and their outputs.
 *
 * A large model is cut into parts: each takes its inputs from the step, or from what the parts before it gave.
 */
class ExecuTorchStaticEngine(pack: ModelPack) : SteppedEngine(pack), Border<EValue> {
    private class Method(val name: String, val inputs: List<String>, val outputs: List<String>)

    private val wide = about.getString("cache") == "int16"
    private val methods: Map<Int, List<Method>>
    private val module: Module

    init {
        val told = JSONObject(pack.file(pack.path("methods")).readText())
        methods = mapOf(chunk to methods(told.getJSONArray("prefill")), 1 to methods(told.getJSONArray("decode")))
        pack.showHexagonLibraries()
        module = Module.load(pack.file(pack.path("model")).path)
    }

    private fun methods(told: JSONArray): List<Method> = (0 until told.length()).map { index ->
        val method = told.getJSONObject(index)
        Method(method.getString("name"), names(method.getJSONArray("inputs")), names(method.getJSONArray("outputs")))
    }

    private fun names(told: JSONArray): List<String> = (0 until told.length()).map { told.getString(it) }

    override fun run(step: Step, width: Int, rows: FloatArray): FloatArray {
        val values = inputs(step, width, rows, this)
        for (method in methods.getValue(width)) {
            val found = module.execute(method.name, *method.inputs.map { values.getValue(it) }.toTypedArray())
            method.outputs.forEachIndexed { index, name -> values[name] = found[index] }
        }
        store(step, width) { codes(values, it) }
        return values.getValue("logits").toTensor().dataAsFloatArray
    }

    override fun floats(data: FloatArray, vararg shape: Int): EValue = EValue.from(Tensor.fromBlob(data, longs(shape)))

    override fun ints(data: IntArray): EValue = EValue.from(Tensor.fromBlob(data, longArrayOf(data.size.toLong())))

    private fun longs(shape: IntArray) = LongArray(shape.size) { shape[it].toLong() }

    /** The cache's codes are int16 (ExecuTorch's Java knows none: float16 carries their bits) or int8; exact as floats. */
    override fun cache(data: FloatArray, vararg shape: Int): EValue = EValue.from(
        if (wide) Tensor.fromBlob(ShortArray(data.size) { data[it].toInt().toShort() }, longs(shape))
        else Tensor.fromBlob(ByteArray(data.size) { data[it].toInt().toByte() }, longs(shape))
    )

    private fun codes(values: Map<String, EValue>, name: String): FloatArray {
        val tensor = values.getValue(name).toTensor()
        if (wide) return tensor.dataAsShortArray.let { codes -> FloatArray(codes.size) { codes[it].toFloat() } }
        return tensor.dataAsByteArray.let { codes -> FloatArray(codes.size) { codes[it].toFloat() } }
    }

    override fun close() = module.destroy()
}

fun openChat(pack: ModelPack): Chat = TokenLoop(pack, ExecuTorchStaticEngine(pack))
