package org.bluelm.chat

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.charset.StandardCharsets
import org.json.JSONObject

/** Rows of the quantized embedding, straight from the mapped safetensors file: (codes - zeros) * scales. */
class EmbeddingTable(private val data: ByteBuffer, header: SafetensorsHeader) {
    private val codes = header.tensor("codes")
    private val scales = header.tensor("scales")
    private val zeros = header.tensor("zeros")
    private val bits = header.bits
    val hidden = header.hidden
    private val groups = scales.shape[1]

    init {
        data.order(ByteOrder.LITTLE_ENDIAN)
    }

    fun row(token: Int, out: FloatArray, at: Int) {
        val bytesPerRow = codes.shape[1]
        val perGroup = hidden / groups
        for (column in 0 until hidden) {
            val group = token * groups + column / perGroup
            val code = if (bits == 8) {
                data.get(codes.start + token * bytesPerRow + column).toInt() and 255
            } else {
                val pair = data.get(codes.start + token * bytesPerRow + column / 2).toInt() and 255
                if (column % 2 == 0) pair and 15 else pair shr 4
            }
            val zero = data.get(zeros.start + group).toInt() and 255
            out[at + column] = (code - zero) * half(data.getShort(scales.start + 2 * group).toInt() and 0xFFFF)
        }
    }

    companion object {
        /** IEEE half precision to float. */
        fun half(bits: Int): Float {
            val sign = if (bits and 0x8000 != 0) -1f else 1f
            val exponent = bits shr 10 and 31
            val fraction = bits and 1023
            return sign * when (exponent) {
                0 -> fraction * 5.9604645e-8f
                31 -> if (fraction == 0) Float.POSITIVE_INFINITY else Float.NaN
                else -> java.lang.Float.intBitsToFloat((exponent + 112 shl 23) or (fraction shl 13))
            }
        }
    }
}

class TensorPlace(val start: Int, val shape: IntArray)

/** Where the tensors of a small safetensors file begin; made by ModelPack from the file's JSON header. */
class SafetensorsHeader(private val tensors: Map<String, TensorPlace>, val bits: Int, val hidden: Int) {
    fun tensor(name: String): TensorPlace =
        tensors[name] ?: throw IllegalArgumentException("the embedding file lacks $name")
}

/** The artifact's embedding, mapped into memory. */
fun ModelPack.embedding(): EmbeddingTable {
    val data = map(path("embedding"))
    data.order(ByteOrder.LITTLE_ENDIAN)
    val length = data.getLong(0).toInt()
    val raw = ByteArray(length).also { bytes -> data.duplicate().apply { position(8) }.get(bytes) }
    val header = JSONObject(String(raw, StandardCharsets.UTF_8))
    val about = JSONObject(header.getJSONObject("__metadata__").getString("bluelm"))
    val places = listOf("codes", "scales", "zeros").associateWith { name ->
        val tensor = header.getJSONObject(name)
        val shape = tensor.getJSONArray("shape")
        val start = 8 + length + tensor.getJSONArray("data_offsets").getInt(0)
        TensorPlace(start, IntArray(shape.length()) { shape.getInt(it) })
    }
    return EmbeddingTable(data, SafetensorsHeader(places, about.getInt("bits"), about.getInt("hidden")))
}
