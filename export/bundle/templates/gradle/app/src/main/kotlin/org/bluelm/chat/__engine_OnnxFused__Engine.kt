package org.bluelm.chat

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.FloatBuffer
import java.nio.LongBuffer

/** The fused graph that onnxruntime-genai loads, in ONNX Runtime: present keys and values become past ones. */
class OnnxFusedEngine(pack: ModelPack) : Engine {
    private val about = pack.artifact
    private val model = about.getJSONObject("model")
    private val chunk = about.getInt("chunk")
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession
    private var last: OrtSession.Result? = null
    override val context = about.getInt("context")
    override var position = 0
        private set

    init {
        pack.paths("weights").forEach { pack.file(it) } // beside their graph
        session = environment.createSession(pack.file(pack.path("model")).path, OrtSession.SessionOptions())
    }

    override fun reset() {
        last?.close()
        last = null
        position = 0
    }

    override fun advance(tokens: IntArray): FloatArray {
        var logits = FloatArray(0)
        var done = 0
        while (done < tokens.size) {
            val count = minOf(chunk, tokens.size - done)
            logits = step(tokens.copyOfRange(done, done + count))
            done += count
        }
        return logits
    }

    /** Logits [vocabulary] of the last of `tokens`. */
    private fun step(tokens: IntArray): FloatArray {
        val total = position + tokens.size
        require(total <= context) { "the context of $context tokens is full" }
        val before = last
        val own = arrayListOf(integers(LongArray(tokens.size) { tokens[it].toLong() }), integers(LongArray(total) { 1L }))
        val feeds = hashMapOf("input_ids" to own[0], "attention_mask" to own[1])
        for (layer in 0 until model.getInt("num_layers")) for (kind in listOf("key", "value")) {
            val past = if (before == null) empty().also { own += it } else tensor(before, "present.$layer.$kind")
            feeds["past_key_values.$layer.$kind"] = past
        }
        try {
            val result = session.run(feeds)
            before?.close()
            last = result
            position = total
            val all = tensor(result, "logits").floatBuffer
            val vocabulary = all.remaining() / tokens.size
            all.position(all.limit() - vocabulary)
            return FloatArray(vocabulary).also { all.get(it) }
        } finally {
            own.forEach { it.close() }
        }
    }

    private fun tensor(result: OrtSession.Result, name: String) = result.get(name).get() as OnnxTensor

    private fun integers(data: LongArray): OnnxTensor =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(data), longArrayOf(1, data.size.toLong()))

    /** A cache [1, heads, 0, size]. */
    private fun empty(): OnnxTensor {
        val shape = longArrayOf(1, model.getLong("num_kv_heads"), 0, model.getLong("head_dim"))
        return OnnxTensor.createTensor(environment, FloatBuffer.allocate(0), shape)
    }

    override fun close() {
        reset()
        session.close()
    }
}

fun openChat(pack: ModelPack): Chat = TokenLoop(pack, OnnxFusedEngine(pack))
