package org.bluelm.chat

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.charset.StandardCharsets
import java.util.regex.Pattern

/** One piece of a SentencePiece model; kinds as in sentencepiece_model.proto. */
class Piece(val text: String, val score: Float, val kind: Int)

/** SentencePiece BPE with byte fallback, straight from tokenizer.model. */
class Pieces(model: ByteArray) : Tokenizer {
    private val pieces = ArrayList<Piece>()
    private val ids = HashMap<String, Int>()
    private val byteIds = IntArray(256) { UNSET }
    private var dummyPrefix = true
    private var unknown = 0

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

    private val marks = anyOf(pieces.filter { it.kind == CONTROL || it.kind == USER_DEFINED }.map { it.text })

    private fun anyOf(texts: List<String>): Pattern {
        val longestFirst = texts.filter { it.isNotEmpty() }.sortedByDescending { it.length }
        return Pattern.compile(if (longestFirst.isEmpty()) "(?!)" else longestFirst.joinToString("|") { Pattern.quote(it) })
    }

    /** Control tokens divide a text, and what is behind one begins as a text does; marks of the template are part of one. */
    override fun encode(parts: List<Part>): IntArray {
        val out = ArrayList<Int>()
        val held = StringBuilder()
        var begins = dummyPrefix
        fun add() {
            if (begins && held.isNotEmpty()) held.insert(0, ' ')
            addText(held.toString(), out)
            if (held.isNotEmpty()) begins = false
            held.setLength(0)
        }
        for (part in parts) {
            var start = 0
            val found = if (part.data) null else marks.matcher(part.text)
            while (found != null && found.find()) {
                val id = ids.getValue(found.group())
                held.append(part.text, start, found.start())
                if (begins && pieces[id].kind == USER_DEFINED && held.isEmpty()) addText(" ", out)
                add()
                out.add(id)
                begins = dummyPrefix && pieces[id].kind == CONTROL
                start = found.end()
            }
            held.append(part.text, start, part.text.length)
        }
        add()
        return out.toIntArray()
    }

    private fun addText(text: String, out: ArrayList<Int>) {
        val spaced = text.replace(' ', SPACE)
        val symbols = ArrayList<String>()
        var at = 0
        while (at < spaced.length) {
            val next = spaced.offsetByCodePoints(at, 1)
            symbols.add(spaced.substring(at, next))
            at = next
        }
        merge(symbols)
        for (symbol in symbols) emit(symbol, out)
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

    /** Bytes that a token stands for; control tokens have none. */
    override fun bytes(token: Int): ByteArray {
        val piece = pieces.getOrNull(token) ?: return ByteArray(0)
        return when (piece.kind) {
            CONTROL, UNKNOWN -> ByteArray(0)
            BYTE -> byteArrayOf(piece.text.substring(3, 5).toInt(16).toByte())
            else -> piece.text.replace(SPACE, ' ').toByteArray(StandardCharsets.UTF_8)
        }
    }

    companion object {
        private const val SPACE = '\u2581'
        private const val UNSET = -1
        private const val NORMAL = 1
        private const val UNKNOWN = 2
        private const val CONTROL = 3
        private const val USER_DEFINED = 4
        private const val BYTE = 6
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
