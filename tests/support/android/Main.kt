package org.bluelm.chat

import android.content.Context
import java.io.File

/** `tokens FILE FIRST ANSWER`: each line's tokens, as data alone and between the two texts. `answer`: the app's answers to the lines. */
fun main(args: Array<String>) {
    if (args[0] == "tokens") tokens(File(args[1]), args[2], args[3]) else answer()
}

fun tokens(file: File, first: String, answer: String) {
    val tokenizer = readTokenizer(file.name, file.readBytes())
    for (line in generateSequence(::readLine)) {
        val data = Part(line.replace("\\n", "\n"), true)
        val chat = tokenizer.encode(listOf(Part(first, false), data, Part(answer, false)))
        println(tokenizer.encode(listOf(data)).joinToString(",") + "|" + chat.joinToString(","))
    }
}

fun answer() {
    val pack = ModelPack(Context())
    pack.objection()?.let { throw IllegalStateException(it) }
    val chat = openChat(pack)
    for (line in generateSequence(::readLine)) {
        val out = StringBuilder()
        chat.answer(line) { out.append(it) }
        println(out.toString().replace("\n", "\\n"))
    }
    chat.close()
}

/** The app has one of these; the test renames each after its engine. */
fun openChat(pack: ModelPack): Chat = when (System.getProperty("engine")) {
    "Onnx" -> openOnnx(pack)
    "GenAi" -> openGenAi(pack)
    "LiteRtLm" -> openLiteRtLm(pack)
    "ExecuTorch" -> openExecuTorch(pack)
    "ExecuTorchStatic" -> openExecuTorchStatic(pack)
    else -> openLiteRt(pack)
}
