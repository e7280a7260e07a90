package org.pytorch.executorch.extension.llm;

import host.Pipe;
import java.io.Closeable;
import java.util.List;

/** The constructors and methods of 1.4.1 that the app calls; behind them is its C++ runner. */
public class LlmModule implements Closeable {
    private final Pipe pipe;
    private final String tokenizer;
    private final float temperature;
    private boolean stopped;

    public LlmModule(String modulePath, String tokenizerPath, float temperature) {
        pipe = new Pipe(modulePath);
        tokenizer = tokenizerPath;
        this.temperature = temperature;
    }

    public void load() { pipe.run("load", List.of(Pipe.text(tokenizer))); }

    public void generate(String prompt, int seqLen, LlmCallback callback, boolean echo) {
        Pipe.Array heat = Pipe.text(Float.toString(temperature));
        List<Pipe.Array> said =
                pipe.run(echo ? "echo" : "generate", List.of(Pipe.text(prompt), Pipe.integers(seqLen), heat));
        stopped = false;
        for (Pipe.Array piece : said.subList(1, said.size())) if (!stopped) callback.onResult(piece.text());
        callback.onStats(said.get(0).text());
    }

    public void stop() { stopped = true; }

    public void resetContext() { pipe.run("reset", List.of()); }

    @Override public void close() { pipe.close(); }
}
