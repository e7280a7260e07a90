package org.bluelm.chat

import android.util.Half
import java.nio.ByteBuffer
import org.tensorflow.lite.Interpreter

/** A .tflite with the signatures `prefill` (a chunk of tokens) and `decode` (one token); inputs as in ONNX. */
class LiteRtEngine(pack: ModelPack) : SteppedEngine(pack) {
    private val half = about.getString("cache") == "float16"
    private val interpreter = Interpreter(pack.file(pack.path("model")), Interpreter.Options().setNumThreads(4))

    override fun run(step: Step, width: Int, rows: FloatArray): FloatArray {
        val signature = if (width == 1) "decode" else "prefill"
        val inputs = HashMap<String, Any>()
        val outputs = HashMap<String, Any>()
        inputs["hidden"] = floats(rows)
        inputs["positions"] = ints(steps.positions(step.start, width))
        inputs["mask"] = floats(steps.mask(step.start, width))
        for (layer in 0 until steps.layers) {
            inputs["past_keys.$layer"] = cache(steps.pastKeys(layer, width))
            inputs["past_values.$layer"] = cache(steps.pastValues(layer, width))
        }
        for (name in interpreter.getSignatureOutputs(signature)) {
            outputs[name] = direct(interpreter.getOutputTensorFromSignature(name, signature).numBytes())
        }
        interpreter.runSignature(inputs, outputs, signature)
        for (layer in 0 until steps.layers) {
            steps.store(layer, step, width, cached(outputs["keys.$layer"]), cached(outputs["values.$layer"]))
        }
        return read(outputs["logits"])
    }

    private fun ints(data: IntArray): ByteBuffer = direct(4 * data.size).apply { asIntBuffer().put(data) }

    private fun floats(data: FloatArray): ByteBuffer = direct(4 * data.size).apply { asFloatBuffer().put(data) }

    private fun cache(data: FloatArray): ByteBuffer {
        if (!half) return floats(data)
        val bytes = direct(2 * data.size)
        for (value in data) bytes.putShort(Half.toHalf(value))
        bytes.rewind()
        return bytes
    }

    private fun cached(buffer: Any?): FloatArray {
        if (!half) return read(buffer)
        val codes = (buffer as ByteBuffer).apply { rewind() }.asShortBuffer()
        return FloatArray(codes.remaining()) { Half.toFloat(codes.get(it)) }
    }

    private fun read(buffer: Any?): FloatArray {
        val floats = (buffer as ByteBuffer).apply { rewind() }.asFloatBuffer()
        return FloatArray(floats.remaining()).also { floats.get(it) }
    }

    override fun close() = interpreter.close()
}

fun openEngine(pack: ModelPack): Engine = LiteRtEngine(pack)
