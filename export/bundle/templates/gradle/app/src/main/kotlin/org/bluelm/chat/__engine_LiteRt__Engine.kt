package org.bluelm.chat

import android.util.Half
import java.nio.ByteBuffer
import org.tensorflow.lite.Interpreter

/** A .tflite with the signatures `prefill` (a chunk of tokens) and `decode` (one token); inputs as in ONNX. */
class LiteRtEngine(pack: ModelPack) : SteppedEngine(pack), Border<Any> {
    private val half = about.getString("cache") == "float16"
    private val interpreter = Interpreter(pack.file(pack.path("model")), Interpreter.Options().setNumThreads(4))

    override fun run(step: Step, width: Int, rows: FloatArray): FloatArray {
        val signature = if (width == 1) "decode" else "prefill"
        val outputs = HashMap<String, Any>()
        for (name in interpreter.getSignatureOutputs(signature)) {
            outputs[name] = direct(interpreter.getOutputTensorFromSignature(name, signature).numBytes())
        }
        interpreter.runSignature(inputs(step, width, rows, this), outputs, signature)
        store(step, width) { cached(outputs[it]) }
        return read(outputs["logits"])
    }

    override fun ints(data: IntArray): ByteBuffer = direct(4 * data.size).apply { asIntBuffer().put(data) }

    override fun floats(data: FloatArray, vararg shape: Int): ByteBuffer = direct(4 * data.size).apply { asFloatBuffer().put(data) }

    override fun cache(data: FloatArray, vararg shape: Int): ByteBuffer {
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

fun openChat(pack: ModelPack): Chat = TokenLoop(pack, LiteRtEngine(pack))
