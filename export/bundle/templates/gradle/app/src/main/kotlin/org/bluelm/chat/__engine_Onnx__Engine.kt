package org.bluelm.chat

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.IntBuffer

/** The two graphs of an ONNX artifact (prefill, decode) in ONNX Runtime, on the CPU or on a Snapdragon's NPU. */
class OnnxEngine(pack: ModelPack) : Engine {
    private val about = pack.artifact
    private val model = about.getJSONObject("model")
    private val npu = about.getString("format") != "onnx-cpu"
    private val chunk = about.getInt("chunk")
    private val wide = about.getString("cache") == "int16"
    private val embedding = pack.embedding()
    private val hidden = embedding.hidden
    private val environment = OrtEnvironment.getEnvironment()
    private val sessions: Map<Int, OrtSession>
    private val steps = Steps(
        model.getInt("num_layers"), model.getInt("num_kv_heads"), model.getInt("head_dim"),
        about.getInt("context"), about.getDouble("mask_value").toFloat()
    )
    override val context get() = steps.context
    override val position get() = steps.position

    init {
        // external weights and context binaries must lie beside their graphs
        for (role in listOf("weights", "context")) for (path in pack.paths(role)) beside(pack, path)
        sessions = mapOf(chunk to open(pack, "prefill"), 1 to open(pack, "decode"))
    }

    private fun beside(pack: ModelPack, path: String) {
        for (graph in listOf("prefill", "decode")) {
            val folder = pack.file(pack.path(graph)).parentFile
            val target = java.io.File(folder, path.removePrefix("artifact/"))
            if (!target.exists()) android.system.Os.symlink(pack.file(path).path, target.path)
        }
    }

    private fun open(pack: ModelPack, graph: String): OrtSession {
        val options = OrtSession.SessionOptions()
        if (npu) {
            options.addConfigEntry("session.disable_cpu_ep_fallback", "1")
            options.addQnn(mapOf("backend_path" to "libQnnHtp.so", "htp_performance_mode" to "burst"))
        }
        return environment.createSession(pack.file(pack.path(graph)).path, options)
    }

    override fun reset() = steps.reset()

    override fun advance(tokens: IntArray): FloatArray {
        var logits = FloatArray(0)
        var done = 0
        while (done < tokens.size) {
            val count = minOf(chunk, tokens.size - done)
            logits = step(tokens.copyOfRange(done, done + count), if (count == 1) 1 else chunk)
            done += count
        }
        return logits
    }

    private fun step(tokens: IntArray, width: Int): FloatArray {
        val step = steps.begin(tokens, width)
        val rows = FloatArray(width * hidden)
        step.tokens.forEachIndexed { i, token -> embedding.row(token, rows, i * hidden) }
        val feeds = HashMap<String, OnnxTensor>()
        try {
            feeds["hidden"] = floats(rows, 1, width, hidden)
            feeds["positions"] = OnnxTensor.createTensor(
                environment, IntBuffer.wrap(steps.positions(step.start, width)), longArrayOf(width.toLong())
            )
            feeds["mask"] = floats(steps.mask(step.start, width), 1, 1, width, context)
            val slots = context - width
            if (slots > 0) for (layer in 0 until steps.layers) {
                feeds["past_keys.$layer"] = cache(steps.pastKeys(layer, width), 1, steps.heads, steps.size, slots)
                feeds["past_values.$layer"] = cache(steps.pastValues(layer, width), 1, steps.heads, slots, steps.size)
            }
            sessions.getValue(width).run(feeds).use { result ->
                for (layer in 0 until steps.layers) {
                    steps.store(layer, step, width, numbers(result, "keys.$layer"), numbers(result, "values.$layer"))
                }
                steps.commit(step)
                val logits = numbers(result, "logits")
                val vocabulary = logits.size / width
                val last = step.tokens.size - 1
                return logits.copyOfRange(last * vocabulary, (last + 1) * vocabulary)
            }
        } finally {
            feeds.values.forEach { it.close() }
        }
    }

    private fun floats(data: FloatArray, vararg shape: Int): OnnxTensor =
        OnnxTensor.createTensor(environment, FloatBuffer.wrap(data), LongArray(shape.size) { shape[it].toLong() })

    /** The cache's codes are int16 on NPUs; the host only carries them, and every code is exact as a float. */
    private fun cache(data: FloatArray, vararg shape: Int): OnnxTensor {
        if (!wide) return floats(data, *shape)
        val bytes = ByteBuffer.allocateDirect(2 * data.size).order(ByteOrder.nativeOrder())
        for (value in data) bytes.putShort(value.toInt().toShort())
        bytes.rewind()
        return OnnxTensor.createTensor(
            environment, bytes, LongArray(shape.size) { shape[it].toLong() }, OnnxJavaType.INT16
        )
    }

    private fun numbers(result: OrtSession.Result, name: String): FloatArray {
        val tensor = result.get(name).get() as OnnxTensor
        if (tensor.info.type != OnnxJavaType.INT16) return tensor.floatBuffer.let { FloatArray(it.remaining()).also(it::get) }
        val codes = tensor.shortBuffer
        return FloatArray(codes.remaining()) { codes.get(it).toFloat() }
    }

    override fun close() = sessions.values.forEach { it.close() }
}

fun openEngine(pack: ModelPack): Engine = OnnxEngine(pack)
