package org.bluelm.chat

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtEpDevice
import ai.onnxruntime.OrtSession
import java.nio.FloatBuffer
import java.nio.IntBuffer

/**
 * The graphs of an ONNX artifact (prefill, decode) in ONNX Runtime, on the CPU or on a Snapdragon's NPU.
 *
 * A large model is cut into parts: each takes its inputs from the step, or from what the parts before it gave.
 */
class OnnxEngine(pack: ModelPack) : SteppedEngine(pack), Border<OnnxTensor> {
    private val npu = about.getString("format") != "onnx-cpu"
    private val wide = about.getString("cache") == "int16"
    private val environment = OrtEnvironment.getEnvironment()
    private val sessions: Map<Int, List<OrtSession>>

    init {
        for (role in listOf("weights", "context")) pack.paths(role).forEach { pack.file(it) } // beside their graphs
        if (npu) pack.showHexagonLibraries()
        sessions = mapOf(chunk to open("prefill"), 1 to open("decode"))
    }

    private fun open(graph: String): List<OrtSession> = pack.paths(graph).map { path ->
        val options = OrtSession.SessionOptions()
        if (npu) {
            options.addConfigEntry("session.disable_cpu_ep_fallback", "1")
            val wanted = mapOf("backend_path" to "libQnnHtp.so", "htp_performance_mode" to "burst")
            options.addExecutionProvider(npuDevices(), wanted)
        }
        environment.createSession(pack.file(path).path, options)
    }

    /** QNN is a plug-in: a library of its own, which the environment is told of once. */
    private fun npuDevices(): List<OrtEpDevice> {
        fun found() = environment.epDevices.filter { it.epName == PROVIDER }
        if (found().isEmpty()) environment.registerExecutionProviderLibrary(PROVIDER, pack.library(PLUGIN).path)
        return found().also { check(it.isNotEmpty()) { "ONNX Runtime finds no NPU on this phone" } }
    }

    override fun run(step: Step, width: Int, rows: FloatArray): FloatArray {
        val feeds = inputs(step, width, rows, this)
        val made = ArrayList<OrtSession.Result>()
        try {
            for (session in sessions.getValue(width)) {
                made += session.run(session.inputNames.associateWith { feeds[it] ?: output(made, it) })
            }
            store(step, width) { numbers(made, it) }
            return numbers(made, "logits")
        } finally {
            feeds.values.forEach { it.close() }
            made.forEach { it.close() }
        }
    }

    private fun output(made: List<OrtSession.Result>, name: String): OnnxTensor =
        made.asReversed().first { it.get(name).isPresent }.get(name).get() as OnnxTensor

    override fun ints(data: IntArray): OnnxTensor =
        OnnxTensor.createTensor(environment, IntBuffer.wrap(data), longArrayOf(data.size.toLong()))

    override fun floats(data: FloatArray, vararg shape: Int): OnnxTensor =
        OnnxTensor.createTensor(environment, FloatBuffer.wrap(data), LongArray(shape.size) { shape[it].toLong() })

    /** The cache's codes are int16 on NPUs; the host only carries them, and every code is exact as a float. */
    override fun cache(data: FloatArray, vararg shape: Int): OnnxTensor {
        if (!wide) return floats(data, *shape)
        val bytes = direct(2 * data.size)
        for (value in data) bytes.putShort(value.toInt().toShort())
        bytes.rewind()
        return OnnxTensor.createTensor(
            environment, bytes, LongArray(shape.size) { shape[it].toLong() }, OnnxJavaType.INT16
        )
    }

    private fun numbers(made: List<OrtSession.Result>, name: String): FloatArray {
        val tensor = output(made, name)
        if (tensor.info.type != OnnxJavaType.INT16) {
            val floats = tensor.floatBuffer
            return FloatArray(floats.remaining()).also { floats.get(it) }
        }
        val codes = tensor.shortBuffer
        return FloatArray(codes.remaining()) { codes.get(it).toFloat() }
    }

    override fun close() = sessions.values.forEach { parts -> parts.forEach { it.close() } }

    companion object {
        private const val PROVIDER = "QNNExecutionProvider"
        private const val PLUGIN = "libonnxruntime_providers_qnn.so"
    }
}

fun openChat(pack: ModelPack): Chat = TokenLoop(pack, OnnxEngine(pack))
