package org.bluelm.chat

import java.nio.ByteBuffer
import java.nio.ByteOrder

/** How a runtime's inputs are made of arrays. */
interface Border<T> {
    fun floats(data: FloatArray, vararg shape: Int): T

    fun ints(data: IntArray): T

    /** Cached numbers, of the type that the graphs have them in. */
    fun cache(data: FloatArray, vararg shape: Int): T
}

/** An engine whose graphs, `prefill` of a chunk of tokens and `decode` of one, take the cache as inputs. */
abstract class SteppedEngine(protected val pack: ModelPack) : Engine {
    protected val about = pack.artifact
    protected val chunk = about.getInt("chunk")
    protected val hidden: Int
    protected val steps: Steps
    private val embedding = pack.embedding()
    override val context get() = steps.context
    override val position get() = steps.position

    init {
        val model = about.getJSONObject("model")
        hidden = embedding.hidden
        steps = Steps(
            model.getInt("num_layers"), model.getInt("num_kv_heads"), model.getInt("head_dim"),
            about.getInt("context"), about.getDouble("mask_value").toFloat()
        )
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

    /** Logits [vocabulary] of the last of `tokens`, through the graph of `width` rows. */
    private fun step(tokens: IntArray, width: Int): FloatArray {
        val step = steps.begin(tokens, width)
        val rows = FloatArray(width * hidden)
        step.tokens.forEachIndexed { i, token -> embedding.row(token, rows, i * hidden) }
        val logits = run(step, width, rows)
        steps.commit(step)
        val vocabulary = logits.size / width
        val last = step.tokens.size - 1
        return logits.copyOfRange(last * vocabulary, (last + 1) * vocabulary)
    }

    /** Inputs of a step by the graphs' names. */
    protected fun <T> inputs(step: Step, width: Int, rows: FloatArray, border: Border<T>): HashMap<String, T> {
        val inputs = HashMap<String, T>()
        inputs["hidden"] = border.floats(rows, 1, width, hidden)
        inputs["positions"] = border.ints(steps.positions(step.start, width))
        inputs["mask"] = border.floats(steps.mask(step.start, width), 1, 1, width, context)
        val slots = context - width
        if (slots > 0) for (layer in 0 until steps.layers) {
            inputs["past_keys.$layer"] = border.cache(steps.pastKeys(layer, width), 1, steps.heads, steps.size, slots)
            inputs["past_values.$layer"] = border.cache(steps.pastValues(layer, width), 1, steps.heads, slots, steps.size)
        }
        return inputs
    }

    /** Store the step's own keys and values, found by their names. */
    protected fun store(step: Step, width: Int, found: (String) -> FloatArray) {
        for (layer in 0 until steps.layers) {
            steps.store(layer, step, width, found("keys.$layer"), found("values.$layer"))
        }
    }

    /** Run the graph of `width` rows on embeddings [width, hidden], store its keys and values; logits of all rows. */
    protected abstract fun run(step: Step, width: Int, rows: FloatArray): FloatArray

    protected fun direct(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())
}
