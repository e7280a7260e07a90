package org.bluelm.chat

import com.google.ai.edge.litertlm.Backend
import com.google.ai.edge.litertlm.Conversation
import com.google.ai.edge.litertlm.ConversationConfig
import com.google.ai.edge.litertlm.Engine
import com.google.ai.edge.litertlm.EngineConfig
import com.google.ai.edge.litertlm.Message
import com.google.ai.edge.litertlm.MessageCallback
import com.google.ai.edge.litertlm.SamplerConfig
import java.nio.charset.StandardCharsets
import java.util.concurrent.CountDownLatch

/** LiteRT-LM: a .litertlm with its tokenizer and template, and a conversation that LiteRT-LM keeps. */
class LiteRtLmChat(pack: ModelPack) : Chat {
    private val marks = Marks(pack.manifest)
    private val context = pack.artifact.getInt("context")
    private val engine = Engine(EngineConfig(modelPath = pack.file(pack.path("model")).path, backend = Backend.CPU()))
    private var conversation: Conversation

    init {
        engine.initialize()
        conversation = begin()
    }

    private fun begin(): Conversation {
        val likeliest = SamplerConfig(topK = 1, topP = 1.0, temperature = 1.0)
        return engine.createConversation(ConversationConfig(samplerConfig = likeliest))
    }

    override fun answer(question: String, show: (String) -> Unit): String {
        val asked = marks.plain(question)
        val tokens = asked.toByteArray(StandardCharsets.UTF_8).size // at most
        if (conversation.getTokenCount() + tokens + RESERVE > context) forget()
        val answer = Answer(show)
        conversation.sendMessageAsync(asked, answer)
        answer.end.await()
        answer.error?.let {
            forget() // it is of no use behind an answer that failed
            throw IllegalStateException(it)
        }
        return answer.speed.tell(answer.pieces, "pieces")
    }

    private fun forget() {
        conversation.close()
        conversation = begin()
    }

    override fun close() {
        conversation.close()
        engine.close()
    }

    /** It tells pieces of text from a thread of its own. */
    private class Answer(private val show: (String) -> Unit) : MessageCallback {
        val end = CountDownLatch(1)
        var speed = Speed()
        var pieces = 0
        var error: Throwable? = null

        override fun onMessage(message: Message) {
            if (pieces++ == 0) speed = Speed()
            show(message.toString())
        }

        override fun onDone() = end.countDown()

        override fun onError(throwable: Throwable) {
            error = throwable
            end.countDown()
        }
    }

    companion object {
        private const val RESERVE = 32
    }
}

fun openChat(pack: ModelPack): Chat = LiteRtLmChat(pack)
