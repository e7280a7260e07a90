package org.bluelm.chat

/** What every runtime offers: tokens in, logits of the last token out; the cache is the engine's own. */
interface Engine {
    val context: Int

    /** Tokens that the cache holds. */
    val position: Int

    fun reset()

    fun advance(tokens: IntArray): FloatArray

    fun close()
}

/**
 * The cache and the mask of artifacts whose graphs take them as inputs.
 *
 * A graph of T tokens takes the first C - T slots of each layer's keys [heads, size, C] and values
 * [heads, C, size]. A chunk that would begin further on is moved back over tokens that are cached already.
 */
class Steps(
    val layers: Int,
    val heads: Int,
    val size: Int,
    val context: Int,
    private val maskValue: Float
) {
    val keys = Array(layers) { FloatArray(heads * size * context) }
    val values = Array(layers) { FloatArray(heads * context * size) }
    private val held = ArrayList<Int>()

    val position: Int get() = held.size

    fun reset() = held.clear()

    /** A step of `width` rows that ends in `tokens`: where it starts, and all its tokens. */
    fun begin(tokens: IntArray, width: Int): Step {
        require(position + tokens.size <= context) { "the context of $context tokens is full" }
        val start = minOf(position, context - width)
        val again = held.subList(start, held.size).toIntArray()
        return Step(start, again.size, again + tokens)
    }

    /** Additive mask [width, context]: `past` filled slots, empty ones, the step's own tokens. */
    fun mask(past: Int, width: Int): FloatArray {
        val mask = FloatArray(width * context) { maskValue }
        for (row in 0 until width) {
            mask.fill(0f, row * context, row * context + past)
            mask.fill(0f, row * context + context - width, row * context + context - width + row + 1)
        }
        return mask
    }

    fun positions(start: Int, width: Int): IntArray = IntArray(width) { minOf(start + it, context - 1) }

    fun pastKeys(layer: Int, width: Int): FloatArray = copyRows(keys[layer], heads * size, context, context - width)

    fun pastValues(layer: Int, width: Int): FloatArray =
        copyRows(values[layer], heads, context * size, (context - width) * size)

    private fun copyRows(from: FloatArray, rows: Int, stride: Int, length: Int): FloatArray {
        val out = FloatArray(rows * length)
        for (row in 0 until rows) System.arraycopy(from, row * stride, out, row * length, length)
        return out
    }

    /** Store what a step made: keys [heads, size, width], values [heads, width, size]. */
    fun store(layer: Int, step: Step, width: Int, newKeys: FloatArray, newValues: FloatArray) {
        val count = step.tokens.size
        for (row in 0 until heads * size) {
            System.arraycopy(newKeys, row * width, keys[layer], row * context + step.start, count)
        }
        for (head in 0 until heads) {
            val to = (head * context + step.start) * size
            System.arraycopy(newValues, head * width * size, values[layer], to, count * size)
        }
    }

    fun commit(step: Step) {
        for (i in step.again until step.tokens.size) held.add(step.tokens[i])
    }
}

/** `again`: leading tokens that were cached before and are computed again. */
class Step(val start: Int, val again: Int, val tokens: IntArray)
