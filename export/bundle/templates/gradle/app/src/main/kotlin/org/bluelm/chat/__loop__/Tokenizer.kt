package org.bluelm.chat

import java.io.ByteArrayOutputStream
import java.nio.charset.StandardCharsets
import org.json.JSONObject

/**
 * Text to tokens and back, for runtimes that know tokens alone.
 *
 * What a user types is data: marks such as `<|im_end|>` in it are spelled out in ordinary pieces.
 */
interface Tokenizer {
    /** Tokens of one text, of whose parts some are data. */
    fun encode(parts: List<Part>): IntArray

    /** Bytes that a token stands for; control tokens have none. */
    fun bytes(token: Int): ByteArray
}

fun readTokenizer(name: String, data: ByteArray): Tokenizer =
    if (name.endsWith(".model")) Pieces(data) else BytePairs(JSONObject(String(data, StandardCharsets.UTF_8)))

/** Text of tokens as they come; a UTF-8 character is held back until its last byte is there. */
class TextStream(private val tokenizer: Tokenizer) {
    private var held = ByteArrayOutputStream()

    fun push(token: Int): String {
        held.write(tokenizer.bytes(token))
        val bytes = held.toByteArray()
        val whole = completeLength(bytes)
        held = ByteArrayOutputStream()
        held.write(bytes, whole, bytes.size - whole)
        return String(bytes, 0, whole, StandardCharsets.UTF_8)
    }

    private fun completeLength(bytes: ByteArray): Int {
        for (back in 1..minOf(3, bytes.size)) {
            val byte = bytes[bytes.size - back].toInt() and 255
            if (byte and 0xC0 == 0x80) continue
            val needed = if (byte >= 0xF0) 4 else if (byte >= 0xE0) 3 else if (byte >= 0xC0) 2 else 1
            return if (needed > back) bytes.size - back else bytes.size
        }
        return bytes.size
    }
}
