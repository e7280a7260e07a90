package org.bluelm.chat

import java.nio.charset.StandardCharsets
import java.text.Normalizer
import java.util.regex.Pattern
import org.json.JSONArray
import org.json.JSONObject

/** Byte-level BPE from tokenizer.json: cut by patterns, then joined by the order of its merges. */
class BytePairs(table: JSONObject) : Tokenizer {
    private val ids = HashMap<String, Int>()
    private val texts = HashMap<Int, String>()
    private val ranks = HashMap<String, Int>()
    private val whole: Boolean
    private val composed = table.optJSONObject("normalizer") != null
    private val cuts = ArrayList<Pattern>()
    private val added = HashMap<String, Int>()
    private val special = HashSet<Int>()
    private val trusted: Pattern?
    private val plain: Pattern?

    init {
        val model = table.getJSONObject("model")
        whole = model.optBoolean("ignore_merges")
        val vocabulary = model.getJSONObject("vocab")
        for (text in vocabulary.keys()) ids[text] = vocabulary.getInt(text)
        for ((text, id) in ids) texts[id] = text
        val merges = model.getJSONArray("merges")
        for (i in 0 until merges.length()) ranks[pair(merges.get(i))] = i
        table.optJSONObject("pre_tokenizer")?.let { addCuts(it) }
        val marks = table.getJSONArray("added_tokens")
        for (i in 0 until marks.length()) addMark(marks.getJSONObject(i))
        trusted = anyOf(added.keys)
        plain = anyOf(added.filterValues { it !in special }.keys)
    }

    private fun pair(merge: Any) = if (merge is JSONArray) merge.getString(0) + " " + merge.getString(1) else merge.toString()

    private fun addCuts(part: JSONObject) {
        when (part.getString("type")) {
            "Sequence" -> part.getJSONArray("pretokenizers").let { all ->
                for (i in 0 until all.length()) addCuts(all.getJSONObject(i))
            }
            "Split" -> cuts.add(pattern(part.getJSONObject("pattern").getString("Regex")))
            "Digits" -> cuts.add(pattern(DIGIT))
            else -> if (part.optBoolean("use_regex", true)) cuts.add(pattern(WORDS))
        }
    }

    private fun pattern(regex: String) = Pattern.compile(regex, Pattern.UNICODE_CHARACTER_CLASS)

    private fun addMark(mark: JSONObject) {
        val id = mark.getInt("id")
        added[mark.getString("content")] = id
        texts[id] = mark.getString("content")
        if (mark.getBoolean("special")) special.add(id)
    }

    private fun anyOf(texts: Set<String>): Pattern? {
        val longestFirst = texts.filter { it.isNotEmpty() }.sortedByDescending { it.length }
        return if (longestFirst.isEmpty()) null else Pattern.compile(longestFirst.joinToString("|") { Pattern.quote(it) })
    }

    override fun encode(parts: List<Part>): IntArray {
        val out = ArrayList<Int>()
        val held = StringBuilder()
        for (part in parts) {
            var start = 0
            val marks = (if (part.data) plain else trusted)?.matcher(part.text)
            while (marks != null && marks.find()) {
                held.append(part.text, start, marks.start())
                addWords(held, out)
                out.add(added.getValue(marks.group()))
                start = marks.end()
            }
            held.append(part.text, start, part.text.length)
        }
        addWords(held, out)
        return out.toIntArray()
    }

    /** Tokens of the text that is held since the last mark. */
    private fun addWords(held: StringBuilder, out: ArrayList<Int>) {
        if (held.isEmpty()) return
        val text = if (composed) Normalizer.normalize(held, Normalizer.Form.NFC) else held.toString()
        held.setLength(0)
        for (word in cuts.fold(listOf(text)) { words, cut -> words.flatMap { isolated(it, cut) } }) addWord(word, out)
    }

    private fun isolated(text: String, cut: Pattern): List<String> {
        val out = ArrayList<String>()
        val found = cut.matcher(text)
        var start = 0
        while (found.find()) {
            if (found.start() > start) out.add(text.substring(start, found.start()))
            if (found.end() > found.start()) out.add(found.group())
            start = found.end()
        }
        if (start < text.length) out.add(text.substring(start))
        return out
    }

    private fun addWord(word: String, out: ArrayList<Int>) {
        val spelled = word.toByteArray(StandardCharsets.UTF_8).map { CHARACTERS[it.toInt() and 255].toString() }
        if (whole) ids[spelled.joinToString("")]?.let {
            out.add(it)
            return
        }
        val symbols = spelled.toMutableList()
        while (true) {
            var best = 0
            for (i in 1 until symbols.size - 1) if (rank(symbols, i) < rank(symbols, best)) best = i
            if (rank(symbols, best) == NEVER) break
            symbols[best] = symbols[best] + symbols.removeAt(best + 1)
        }
        symbols.mapNotNullTo(out) { ids[it] }
    }

    private fun rank(symbols: List<String>, at: Int): Int =
        if (at + 1 < symbols.size) ranks[symbols[at] + " " + symbols[at + 1]] ?: NEVER else NEVER

    override fun bytes(token: Int): ByteArray {
        val text = texts[token]
        if (text == null || token in special) return ByteArray(0)
        if (text in added) return text.toByteArray(StandardCharsets.UTF_8)
        return ByteArray(text.length) { BYTES.getValue(text[it]).toByte() }
    }

    companion object {
        private const val NEVER = Int.MAX_VALUE
        private const val DIGIT = "\\p{N}"

        /** GPT-2's, which ByteLevel cuts by. */
        private const val WORDS =
            "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

        /** A character for each byte: itself where it shows, else one from 256 on. */
        private val CHARACTERS = CharArray(256).also { made ->
            var next = 256
            for (byte in 0 until 256) {
                val shows = byte in 33..126 || byte in 161..172 || byte in 174..255
                made[byte] = if (shows) byte.toChar() else (next++).toChar()
            }
        }
        private val BYTES = CHARACTERS.withIndex().associate { it.value to it.index }
    }
}
