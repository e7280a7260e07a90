package org.bluelm.chat

import org.json.JSONObject

/** A part of a text; marks in data are text. */
class Part(val text: String, val data: Boolean)

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

    /** The same in parts, for a tokenizer that knows data. */
    fun parts(question: String, begins: Boolean): List<Part> = listOf(
        Part(about.getString(if (begins) "first" else "next"), false),
        Part(question.trim(), true),
        Part(about.getString("answer"), false)
    )

    /** What stands in front of the model's answer: of a chat that begins, or of one that goes on behind an answer. */
    fun prompt(question: String, begins: Boolean): String =
        about.getString(if (begins) "first" else "next") + marks.plain(question) + about.getString("answer")
}
