package ai.onnxruntime.genai;

import host.Pipe;
import java.util.List;

public class TokenizerStream implements AutoCloseable {
    private final Pipe pipe;

    TokenizerStream(Pipe pipe) {
        this.pipe = pipe;
        pipe.run("stream", List.of());
    }

    public String decode(int token) throws GenAIException {
        return pipe.run("decode", List.of(Pipe.integers(token))).get(0).text();
    }

    @Override public void close() {}
}
