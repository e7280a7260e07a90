package org.bluelm.chat

import android.util.Half
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.tensorflow.lite.Interpreter

/** A .tflite with the signatures `prefill` (a chunk of tokens) and `decode` (one token); inputs as in ONNX. */
class LiteRtEngine(pack: ModelPack) : Engine {
    private val about = pack.artifact
    private val model = about.getJSONObject("model")
    private val chunk = about.getInt("chunk")
    private val half = about.getString("cache") == "float16"
    private val embedding = pack.embedding()
    private val hidden = embedding.hidden
    private val interpreter = Interpreter(pack.file(pack.path("model")), Interpreter.Options().setNumThreads(4))
    private val steps = Steps(
        model.getInt("num_layers"), model.getInt("num_kv_heads"), model.getInt("head_dim"),
        about.getInt("context"), about.getDouble("mask_value").toFloat()
    )
    override val context get() = steps.context
    override val position get() = steps.position

    override fun reset() = steps.reset()

    override fun advance(tokens: IntArray): FloatArray {
        var logits = FloatArray(0)
        var done = 0
        while (done < tokens.size) {
            val count = minOf(chunk, tokens.size - done)
            logits = step(tokens.copyOfRange(done, done + count), if (count == 1) "decode" else "prefill")
            done += count
        }
        return logits
    }

    private fun step(tokens: IntArray, signature: String): FloatArray {
        val width = if (signature == "decode") 1 else chunk
        val step = steps.begin(tokens, width)
        val inputs = HashMap<String, Any>()
        val outputs = HashMap<String, Any>()
        val rows = FloatArray(width * hidden)
        step.tokens.forEachIndexed { i, token -> embedding.row(token, rows, i * hidden) }
        inputs["hidden"] = floats(rows)
        inputs["positions"] = ints(steps.positions(step.start, width))
        inputs["mask"] = floats(steps.mask(step.start, width))
        for (layer in 0 until steps.layers) {
            inputs["past_keys.$layer"] = cache(steps.pastKeys(layer, width))
            inputs["past_values.$layer"] = cache(steps.pastValues(layer, width))
        }
        for (name in interpreter.getSignatureOutputs(signature)) {
            val bytes = interpreter.getOutputTensorFromSignature(name, signature).numBytes()
            outputs[name] = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())
        }
        interpreter.runSignature(inputs, outputs, signature)
        for (layer in 0 until steps.layers) {
            steps.store(layer, step, width, cached(outputs["keys.$layer"]), cached(outputs["values.$layer"]))
        }
        steps.commit(step)
        val logits = read(outputs["logits"])
        val vocabulary = logits.size / width
        val last = step.tokens.size - 1
        return logits.copyOfRange(last * vocabulary, (last + 1) * vocabulary)
    }

    private fun ints(data: IntArray): ByteBuffer =
        ByteBuffer.allocateDirect(4 * data.size).order(ByteOrder.nativeOrder()).apply { asIntBuffer().put(data) }

    private fun floats(data: FloatArray): ByteBuffer =
        ByteBuffer.allocateDirect(4 * data.size).order(ByteOrder.nativeOrder()).apply { asFloatBuffer().put(data) }

    private fun cache(data: FloatArray): ByteBuffer {
        if (!half) return floats(data)
        val bytes = ByteBuffer.allocateDirect(2 * data.size).order(ByteOrder.nativeOrder())
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
