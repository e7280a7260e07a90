package org.bluelm.chat

import org.json.JSONObject

/** Chats as the model's template writes them: texts in manifest.json, held against the template when it was made. */
class Turns(manifest: JSONObject) {
    private val about: JSONObject
    private val marks = Marks(manifest)

    /** Texts of the tokens that end an answer. */
    val ends: List<String>

    init {
        val tokenizer = manifest.getJSONObject("tokenizer")
        about = tokenizer.optJSONObject("chat") ?: throw IllegalStateException(tokenizer.optString("chat_note"))
        ends = strings(about.getJSONArray("ends"))
    }

    /** What stands in front of the model's answer: of a chat that begins, or of one that goes on behind an answer. */
    fun prompt(question: String, begins: Boolean): String =
        about.getString(if (begins) "first" else "next") + marks.plain(question) + about.getString("answer")
}
