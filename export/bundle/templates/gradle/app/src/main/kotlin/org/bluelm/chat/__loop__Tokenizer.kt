package org.bluelm.chat

import java.io.ByteArrayOutputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.charset.StandardCharsets

/** One piece of a SentencePiece model; kinds as in sentencepiece_model.proto. */
class Piece(val text: String, val score: Float, val kind: Int)

/**
 * SentencePiece BPE with byte fallback, straight from tokenizer.model, and BlueLM's chat template.
 *
 * What a user types is data: marks such as `[|AI|]:` in it are spelled out in ordinary pieces.
 */
class Tokenizer(model: ByteArray) {
    private val pieces = ArrayList<Piece>()
    private val ids = HashMap<String, Int>()
    private val byteIds = IntArray(256) { UNSET }
    private var dummyPrefix = true
    private var unknown = 0

    val size: Int get() = pieces.size

    init {
        val reader = ProtoReader(model)
        while (reader.next()) {
            when (reader.field) {
                1 -> addPiece(ProtoReader(reader.bytes()))
                3 -> readNormalizer(ProtoReader(reader.bytes()))
                else -> reader.skip()
            }
        }
    }

    private fun addPiece(reader: ProtoReader) {
        var text = ""
        var score = 0f
        var kind = NORMAL
        while (reader.next()) {
            when (reader.field) {
                1 -> text = String(reader.bytes(), StandardCharsets.UTF_8)
                2 -> score = reader.float()
                3 -> kind = reader.varint().toInt()
                else -> reader.skip()
            }
        }
        val id = pieces.size
        pieces.add(Piece(text, score, kind))
        when (kind) {
            BYTE -> byteIds[text.substring(3, 5).toInt(16)] = id
            UNKNOWN -> unknown = id
            else -> ids[text] = id
        }
    }

    private fun readNormalizer(reader: ProtoReader) {
        while (reader.next()) {
            when (reader.field) {
                2 -> require(reader.bytes().isEmpty()) { "this tokenizer normalizes text, which the app cannot" }
                3 -> dummyPrefix = reader.varint() != 0L
                else -> reader.skip()
            }
        }
    }

    fun id(text: String): Int? = ids[text]

    /** Tokens of plain text; a piece that is a mark of the template is never used. */
    fun encode(text: String, prefix: Boolean = dummyPrefix): IntArray {
        if (text.isEmpty()) return IntArray(0)
        val spaced = (if (prefix) " $text" else text).replace(' ', SPACE)
        val symbols = ArrayList<String>()
        var at = 0
        while (at < spaced.length) {
            val next = spaced.offsetByCodePoints(at, 1)
            symbols.add(spaced.substring(at, next))
            at = next
        }
        merge(symbols)
        val out = ArrayList<Int>()
        for (symbol in symbols) emit(symbol, out)
        return out.toIntArray()
    }

    /** Join the neighbours whose piece has the best score, the leftmost first, until none is a piece. */
    private fun merge(symbols: ArrayList<String>) {
        while (true) {
            var best = UNSET
            var score = Float.NEGATIVE_INFINITY
            for (i in 0 until symbols.size - 1) {
                val id = ids[symbols[i] + symbols[i + 1]] ?: continue
                if (pieces[id].kind == NORMAL && pieces[id].score > score) {
                    best = i
                    score = pieces[id].score
                }
            }
            if (best == UNSET) return
            symbols[best] = symbols[best] + symbols[best + 1]
            symbols.removeAt(best + 1)
        }
    }

    private fun emit(symbol: String, out: ArrayList<Int>) {
        val id = ids[symbol]
        if (id != null && pieces[id].kind == NORMAL) {
            out.add(id)
            return
        }
        for (byte in symbol.toByteArray(StandardCharsets.UTF_8)) {
            val spelled = byteIds[byte.toInt() and 255]
            out.add(if (spelled == UNSET) unknown else spelled)
        }
    }

    /** `<s>[|Human|]:…[|AI|]:` for the question, ready for the model to answer. */
    fun chat(question: String, bos: Int): IntArray = intArrayOf(bos) + turn(question)

    /** `[|Human|]:…[|AI|]:`: a turn. A mark that is one piece is its token, else it is spelled out. */
    fun turn(question: String): IntArray {
        val human = mark(HUMAN)
        val ai = mark(AI)
        if (human == null || ai == null) return encode(HUMAN + question + AI)
        val lead = if (dummyPrefix) encode("") else IntArray(0)
        return lead + human + encode(question, false) + ai
    }

    private fun mark(text: String): Int? {
        val id = ids[text] ?: return null
        return if (pieces[id].kind == USER_DEFINED) id else null
    }

    /** Bytes that a token stands for; control tokens have none. */
    fun bytes(token: Int): ByteArray {
        val piece = pieces.getOrNull(token) ?: return ByteArray(0)
        return when (piece.kind) {
            CONTROL, UNKNOWN -> ByteArray(0)
            BYTE -> byteArrayOf(piece.text.substring(3, 5).toInt(16).toByte())
            else -> piece.text.replace(SPACE, ' ').toByteArray(StandardCharsets.UTF_8)
        }
    }

    companion object {
        const val HUMAN = "[|Human|]:"
        const val AI = "[|AI|]:"
        const val SPACE = '\u2581'
        private const val UNSET = -1
        private const val NORMAL = 1
        private const val UNKNOWN = 2
        private const val CONTROL = 3
        private const val USER_DEFINED = 4
        private const val BYTE = 6
    }
}

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

/** A reader of protocol buffers' wire format, enough for tokenizer.model. */
private class ProtoReader(private val data: ByteArray) {
    private var at = 0
    private var wire = 0
    var field = 0

    fun next(): Boolean {
        if (at >= data.size) return false
        val key = varint().toInt()
        field = key ushr 3
        wire = key and 7
        return true
    }

    fun varint(): Long {
        var value = 0L
        var shift = 0
        while (true) {
            val byte = data[at++].toInt()
            value = value or ((byte and 127).toLong() shl shift)
            if (byte and 128 == 0) return value
            shift += 7
        }
    }

    fun bytes(): ByteArray {
        val length = varint().toInt()
        at += length
        return data.copyOfRange(at - length, at)
    }

    fun float(): Float {
        at += 4
        return ByteBuffer.wrap(data, at - 4, 4).order(ByteOrder.LITTLE_ENDIAN).float
    }

    fun skip() {
        when (wire) {
            0 -> varint()
            1 -> at += 8
            2 -> bytes()
            5 -> at += 4
            else -> throw IllegalArgumentException("tokenizer.model is damaged")
        }
    }
}
