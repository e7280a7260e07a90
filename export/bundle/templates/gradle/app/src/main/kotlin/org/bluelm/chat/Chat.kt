package org.bluelm.chat

/** A conversation with the model; greedy, as the artifact was judged. */
interface Chat {
    /** Stream the answer to `show`; returns the speed. */
    fun answer(question: String, show: (String) -> Unit): String

    fun close()
}

/** Tokens and seconds since it was made, as a chat tells them. */
class Speed {
    private val started = System.nanoTime()

    fun tell(tokens: Int) = "%d tokens, %.1f tokens/s".format(tokens, tokens / ((System.nanoTime() - started) / 1e9))
}
