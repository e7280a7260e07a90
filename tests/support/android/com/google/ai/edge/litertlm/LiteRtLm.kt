package com.google.ai.edge.litertlm

import host.Pipe

/** The classes and methods of LiteRT-LM's Kotlin API that the app calls; behind them is its Python one of the same library. */
sealed class Backend(val name: String) {
    data class CPU(val threadCount: Int? = null) : Backend("CPU")
}

data class EngineConfig(val modelPath: String, val backend: Backend = Backend.CPU())

data class SamplerConfig(val topK: Int, val topP: Double, val temperature: Double, val seed: Int = 0)

data class ConversationConfig(val samplerConfig: SamplerConfig? = null)

class Message(private val text: String) {
    override fun toString() = text
}

interface MessageCallback {
    fun onMessage(message: Message)

    fun onDone()

    fun onError(throwable: Throwable)
}

class Engine(val engineConfig: EngineConfig) : AutoCloseable {
    private var pipe: Pipe? = null

    fun initialize() {
        pipe = Pipe(engineConfig.modelPath)
    }

    fun createConversation(conversationConfig: ConversationConfig = ConversationConfig()): Conversation {
        val sampler = conversationConfig.samplerConfig ?: throw IllegalArgumentException("not tried here")
        val own = pipe ?: throw IllegalStateException("Engine is not initialized.")
        own.run("begin", listOf(Pipe.integers(sampler.topK), Pipe.text("${sampler.topP}"), Pipe.text("${sampler.temperature}")))
        return Conversation(own)
    }

    override fun close() {
        pipe?.close()
    }
}

class Conversation(private val pipe: Pipe) : AutoCloseable {
    fun getTokenCount(): Int = pipe.run("count", listOf())[0].integers()[0]

    /** Pieces of text, and behind them an error or "". */
    fun sendMessageAsync(text: String, callback: MessageCallback) {
        Thread {
            val said = pipe.run("send", listOf(Pipe.text(text))).map { it.text() }
            for (piece in said.dropLast(1)) callback.onMessage(Message(piece))
            if (said.last() == "") callback.onDone() else callback.onError(IllegalStateException(said.last()))
        }.start()
    }

    override fun close() {
        pipe.run("end", listOf())
    }
}
