package org.bluelm.chat

import org.json.JSONArray
import org.json.JSONObject

/** Chats as the model's template writes them: texts in manifest.json, held against the template when it was made. */
class Turns(manifest: JSONObject) {
    private val about: JSONObject
    private val marks: List<String>

    /** Texts of the tokens that end an answer. */
    val ends: List<String>

    init {
        val tokenizer = manifest.getJSONObject("tokenizer")
        about = tokenizer.optJSONObject("chat") ?: throw IllegalStateException(tokenizer.optString("chat_note"))
        marks = strings(about.getJSONArray("marks")).filter { it.length > 1 }
        ends = strings(about.getJSONArray("ends"))
    }

    private fun strings(array: JSONArray) = (0 until array.length()).map { array.getString(it) }

    /** What stands in front of the model's answer: of a chat that begins, or of one that goes on behind an answer. */
    fun prompt(question: String, begins: Boolean): String =
        about.getString(if (begins) "first" else "next") + plain(question) + about.getString("answer")

    /** What a user types is data: a space without width makes plain text of the model's special tokens in it. */
    fun plain(text: String): String =
        marks.fold(text.trim()) { said, mark -> said.replace(mark, mark.take(1) + "\u200b" + mark.drop(1)) }
}
