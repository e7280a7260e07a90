package org.bluelm.chat

import java.nio.charset.StandardCharsets
import org.json.JSONObject
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

/** ExecuTorch's LlmModule: its tokenizer, its loop and its cache; the app gives it the text of each turn. */
class ExecuTorchChat(pack: ModelPack) : Chat {
    private val turns = Turns(pack.manifest)
    private val context = pack.artifact.getInt("context")
    private val module: LlmModule
    private var held = 0 // tokens in its cache

    /** The runner bounds an answer by the whole context where a prompt may be longer than its chunk. */
    private val chunked = pack.artifact.getInt("chunk") < context

    init {
        val tokenizer = pack.file(pack.tokenizer("tokenizer.json", "tokenizer.model")).path
        module = LlmModule(pack.file(pack.path("model")).path, tokenizer, 0f)
        module.load()
    }

    override fun answer(question: String, show: (String) -> Unit): String {
        var prompt = turns.prompt(question, held == 0)
        if (held > 0 && room(prompt) < RESERVE) {
            forget()
            prompt = turns.prompt(question, true)
        }
        val room = room(prompt)
        check(room > 0) { "the question does not fit into the context of $context tokens" }
        val answer = Answer(show)
        module.generate(prompt, if (chunked) room else context, answer, false)
        held += answer.tokens
        if (answer.endsAtOnce) forget()
        return answer.speed.tell(answer.said)
    }

    /** Tokens that surely fit behind a prompt, whose tokens the runner counts only afterwards: at most one a byte. */
    private fun room(prompt: String) = context - held - prompt.toByteArray(StandardCharsets.UTF_8).size - 1

    private fun forget() {
        module.resetContext()
        held = 0
    }

    override fun close() = module.close()

    /** What the runner says, without the text of the end token, which it says as well. */
    private inner class Answer(private val show: (String) -> Unit) : LlmCallback {
        lateinit var speed: Speed
        var said = 0
        var tokens = 0
        private var ended = false

        /** It does not look at its first token, and would go on behind an end there. */
        var endsAtOnce = false

        override fun onResult(result: String) {
            if (!::speed.isInitialized) speed = Speed()
            if (ended) {
                endsAtOnce = true
                module.stop()
            } else if (result in turns.ends) {
                ended = true
            } else {
                show(result)
                said++
            }
        }

        override fun onStats(stats: String) {
            val counts = JSONObject(stats)
            tokens = counts.getInt("prompt_tokens") + counts.getInt("generated_tokens")
        }
    }

    companion object {
        private const val RESERVE = 32
    }
}

fun openChat(pack: ModelPack): Chat = ExecuTorchChat(pack)
