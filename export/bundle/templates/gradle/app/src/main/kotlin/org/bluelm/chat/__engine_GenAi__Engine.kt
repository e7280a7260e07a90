package org.bluelm.chat

import ai.onnxruntime.genai.Generator
import ai.onnxruntime.genai.GeneratorParams
import ai.onnxruntime.genai.Model
import ai.onnxruntime.genai.Tokenizer
import org.json.JSONArray
import org.json.JSONObject

/** onnxruntime-genai: its tokenizer, the model's template rendered by it, its loop and its cache. */
class GenAiChat(pack: ModelPack) : Chat {
    private val marks = Marks(pack.manifest)
    private val context = pack.artifact.getInt("context")
    private val template = pack.manifest.getJSONObject("tokenizer").getString("template")
    private val model = Model(pack.folder("artifact").path)
    private val tokenizer = Tokenizer(model)
    private val parameters = GeneratorParams(model)
    private val generator: Generator
    private var messages = JSONArray()

    init {
        parameters.setSearchOption("do_sample", false)
        parameters.setSearchOption("max_length", context.toDouble())
        generator = Generator(model, parameters)
    }

    override fun answer(question: String, show: (String) -> Unit): String {
        say("user", marks.plain(question))
        var prompt = prompt()
        if (messages.length() > 1 && prompt.size + RESERVE > context) {
            messages = JSONArray()
            say("user", marks.plain(question))
            prompt = prompt()
        }
        check(prompt.size < context) { "the question does not fit into the context of $context tokens" }
        append(prompt)
        val speed = Speed()
        val answer = StringBuilder()
        var count = 0
        tokenizer.createStream().use { stream ->
            while (!generator.isDone) {
                val held = generator.tokenCount()
                generator.generateNextToken()
                if (generator.tokenCount() == held) break // an end token is not part of its sequence
                val piece = stream.decode(generator.getLastTokenInSequence(0))
                answer.append(piece)
                show(piece)
                count++
            }
        }
        say("assistant", answer.toString())
        return speed.tell(count)
    }

    private fun say(role: String, text: String) {
        messages.put(JSONObject().put("role", role).put("content", text))
    }

    private fun prompt(): IntArray {
        val text = tokenizer.applyChatTemplate(template, messages.toString(), null, true)
        return tokenizer.encode(text).use { it.getSequence(0) }
    }

    /** The whole chat, of which its cache keeps what it holds already; at least one token is computed again. */
    private fun append(prompt: IntArray) {
        val count = generator.tokenCount().toInt()
        val held = if (count > 0) generator.getSequence(0) else IntArray(0)
        var same = 0
        while (same < minOf(held.size, prompt.size - 1) && held[same] == prompt[same]) same++
        if (same < count) generator.rewindTo(same.toLong())
        generator.appendTokens(prompt.copyOfRange(same, prompt.size))
    }

    override fun close() {
        generator.close()
        parameters.close()
        tokenizer.close()
        model.close()
    }

    companion object {
        private const val RESERVE = 32
    }
}

fun openChat(pack: ModelPack): Chat = GenAiChat(pack)
