package org.bluelm.chat

import org.json.JSONArray
import org.json.JSONObject

fun strings(array: JSONArray): List<String> = (0 until array.length()).map { array.getString(it) }

/** The model's special tokens, which are data in what a user types. */
class Marks(manifest: JSONObject) {
    private val marks = strings(manifest.getJSONObject("tokenizer").getJSONArray("marks")).filter { it.length > 1 }

    /** A space without width makes plain text of each. */
    fun plain(text: String): String =
        marks.fold(text.trim()) { said, mark -> said.replace(mark, mark.take(1) + "\u200b" + mark.drop(1)) }
}
