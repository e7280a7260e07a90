package org.pytorch.executorch.extension.llm;

import host.Pipe;
import java.io.Closeable;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
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

    public void load() { pipe.run("load", List.of(text(tokenizer))); }

    public void generate(String prompt, int seqLen, LlmCallback callback, boolean echo) {
        Pipe.Array length = new Pipe.Array("", "int32", new long[] {1}, number().putInt(0, seqLen));
        Pipe.Array heat = new Pipe.Array("", "float32", new long[] {1}, number().putFloat(0, temperature));
        List<Pipe.Array> said = pipe.run(echo ? "echo" : "generate", List.of(text(prompt), length, heat));
        stopped = false;
        for (Pipe.Array piece : said.subList(1, said.size())) if (!stopped) callback.onResult(text(piece));
        callback.onStats(text(said.get(0)));
    }

    public void stop() { stopped = true; }

    public void resetContext() { pipe.run("reset", List.of()); }

    @Override public void close() { pipe.close(); }

    private static ByteBuffer number() { return ByteBuffer.allocate(4).order(ByteOrder.LITTLE_ENDIAN); }

    private static Pipe.Array text(String text) {
        byte[] raw = text.getBytes(StandardCharsets.UTF_8);
        return new Pipe.Array("", "uint8", new long[] {raw.length}, ByteBuffer.wrap(raw));
    }

    private static String text(Pipe.Array array) {
        byte[] raw = new byte[array.data.remaining()];
        array.data.duplicate().get(raw);
        return new String(raw, StandardCharsets.UTF_8);
    }
}
