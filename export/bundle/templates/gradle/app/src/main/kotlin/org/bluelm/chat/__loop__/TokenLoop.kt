package org.bluelm.chat

/** A conversation through an engine of tokens, with a tokenizer of the app's own. */
class TokenLoop(pack: ModelPack, private val engine: Engine) : Chat {
    private val about = pack.manifest.getJSONObject("tokenizer")
    private val file = pack.tokenizer(if (about.getString("kind") == "sentencepiece") "tokenizer.model" else "tokenizer.json")
    private val tokenizer = readTokenizer(file, pack.read(file))
    private val turns = Turns(pack.manifest)
    private val ends = about.getJSONArray("eos_token_ids").let { a -> (0 until a.length()).map { a.getInt(it) } }

    override fun answer(question: String, show: (String) -> Unit): String {
        var prompt = tokenizer.encode(turns.parts(question, engine.position == 0))
        if (engine.position > 0 && engine.position + prompt.size + RESERVE > engine.context) {
            engine.reset()
            prompt = tokenizer.encode(turns.parts(question, true))
        }
        val stream = TextStream(tokenizer)
        var logits = engine.advance(prompt)
        val speed = Speed()
        var count = 0
        while (engine.position < engine.context) {
            val token = best(logits)
            if (token in ends) break // the next turn begins with the text of one
            logits = engine.advance(intArrayOf(token))
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
