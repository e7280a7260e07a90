package org.bluelm.chat

/** A conversation with the model; greedy, as the artifact was judged. */
interface Chat {
    /** Stream the answer to `show`; returns the speed. */
    fun answer(question: String, show: (String) -> Unit): String

    fun close()
}

/** What was said, and the seconds since this was made, as a chat tells them. */
class Speed {
    private val started = System.nanoTime()

    fun tell(count: Int, what: String = "tokens") =
        "%d %s, %.1f %s/s".format(count, what, count / ((System.nanoTime() - started) / 1e9), what)
}
