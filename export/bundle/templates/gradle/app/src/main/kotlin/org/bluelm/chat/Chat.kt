package org.bluelm.chat

/** Turns of a conversation through an engine; greedy, as the artifact was judged. */
class Chat(pack: ModelPack, private val engine: Engine) {
    private val about = pack.manifest.getJSONObject("tokenizer")
    private val tokenizer = Tokenizer(pack.read(tokenizerFile()))
    private val bos = about.getInt("bos_token_id")
    private val ends = about.getJSONArray("eos_token_ids").let { a -> (0 until a.length()).map { a.getInt(it) } }

    private fun tokenizerFile(): String {
        val files = about.getJSONArray("files")
        return (0 until files.length()).map { files.getString(it) }.first { it.endsWith("tokenizer.model") }
    }

    /** Stream the answer to `show`; returns the speed. */
    fun answer(question: String, show: (String) -> Unit): String {
        var prompt = if (engine.position == 0) tokenizer.chat(question, bos) else tokenizer.turn(question)
        if (engine.position + prompt.size + RESERVE > engine.context) {
            engine.reset()
            prompt = tokenizer.chat(question, bos)
        }
        val stream = TextStream(tokenizer)
        var logits = engine.advance(prompt)
        val started = System.nanoTime()
        var count = 0
        while (engine.position < engine.context) {
            val token = best(logits)
            logits = engine.advance(intArrayOf(token))
            if (token in ends) break
            show(stream.push(token))
            count++
        }
        return "%d tokens, %.1f tokens/s".format(count, count / ((System.nanoTime() - started) / 1e9))
    }

    private fun best(logits: FloatArray): Int {
        var best = 0
        for (i in logits.indices) if (logits[i] > logits[best]) best = i
        return best
    }

    fun close() = engine.close()

    companion object {
        private const val RESERVE = 32
    }
}
