package org.bluelm.chat

/** A conversation through an engine of tokens, with a tokenizer of the app's own. */
class TokenLoop(pack: ModelPack, private val engine: Engine) : Chat {
    private val about = pack.manifest.getJSONObject("tokenizer")
    private val tokenizer = Tokenizer(pack.read(pack.tokenizer("tokenizer.model")))
    private val bos = about.getInt("bos_token_id")
    private val ends = about.getJSONArray("eos_token_ids").let { a -> (0 until a.length()).map { a.getInt(it) } }

    override fun answer(question: String, show: (String) -> Unit): String {
        var prompt = if (engine.position == 0) tokenizer.chat(question, bos) else tokenizer.turn(question)
        if (engine.position + prompt.size + RESERVE > engine.context) {
            engine.reset()
            prompt = tokenizer.chat(question, bos)
        }
        val stream = TextStream(tokenizer)
        var logits = engine.advance(prompt)
        val speed = Speed()
        var count = 0
        while (engine.position < engine.context) {
            val token = best(logits)
            logits = engine.advance(intArrayOf(token))
            if (token in ends) break
            show(stream.push(token))
            count++
        }
        return speed.tell(count)
    }

    private fun best(logits: FloatArray): Int {
        var best = 0
        for (i in logits.indices) if (logits[i] > logits[best]) best = i
        return best
    }

    override fun close() = engine.close()

    companion object {
        private const val RESERVE = 32
    }
}
