package org.bluelm.chat

import android.app.Activity
import android.os.Bundle
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.view.ViewGroup.LayoutParams.WRAP_CONTENT
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.util.concurrent.Executors

/** A chat with the bundle's model: one line to type, the answer streamed, tokens a second at its end. */
class MainActivity : Activity() {
    private val work = Executors.newSingleThreadExecutor()
    private lateinit var talk: TextView
    private lateinit var scroll: ScrollView
    private lateinit var send: Button
    private var chat: Chat? = null

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        talk = TextView(this).apply { setPadding(24, 24, 24, 24); setTextIsSelectable(true) }
        scroll = ScrollView(this).apply { addView(talk) }
        val input = EditText(this)
        send = Button(this).apply { text = "➤"; isEnabled = false }
        val line = LinearLayout(this).apply {
            addView(input, LinearLayout.LayoutParams(0, WRAP_CONTENT, 1f))
            addView(send)
        }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            addView(scroll, LinearLayout.LayoutParams(MATCH_PARENT, 0, 1f))
            addView(line)
        })
        send.setOnClickListener {
            val question = input.text.toString()
            input.text.clear()
            if (question.isNotBlank()) ask(question)
        }
        work.execute { attempt { load() } }
    }

    private fun load() {
        val pack = ModelPack(this)
        pack.objection()?.let { throw IllegalStateException(it) }
        show("${pack.manifest.getString("name")}: loading…\n")
        chat = openChat(pack)
        show("ready\n")
        runOnUiThread { send.isEnabled = true }
    }

    private fun ask(question: String) {
        send.isEnabled = false
        show("\n▶ $question\n")
        work.execute {
            attempt { chat?.answer(question) { piece -> show(piece) }?.let { show("\n($it)\n") } }
            runOnUiThread { send.isEnabled = true }
        }
    }

    /** Whatever goes wrong with a model or a runtime is told in the chat. */
    private fun attempt(step: () -> Unit) {
        try {
            step()
        } catch (error: Exception) {
            show("\n${error.message ?: error.toString()}\n")
        } catch (error: UnsatisfiedLinkError) {
            show("\nthe runtime's library does not load: ${error.message}\n")
        }
    }

    private fun show(text: String) = runOnUiThread {
        talk.append(text)
        scroll.post { scroll.fullScroll(ScrollView.FOCUS_DOWN) }
    }

    override fun onDestroy() {
        super.onDestroy()
        work.execute { chat?.close() }
        work.shutdown()
    }
}
