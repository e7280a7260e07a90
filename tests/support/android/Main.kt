package org.bluelm.chat

import android.content.Context
import java.io.File

/** `tokens MODEL`: each line's tokens, plain and as chat. `answer`: the app's answers to the lines. */
fun main(args: Array<String>) {
    if (args[0] == "tokens") tokens(File(args[1])) else answer()
}

fun tokens(model: File) {
    val tokenizer = Tokenizer(model.readBytes())
    for (line in generateSequence(::readLine)) {
        val text = line.replace("\\n", "\n")
        println(tokenizer.encode(text).joinToString(",") + "|" + tokenizer.chat(text, 1).joinToString(","))
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
