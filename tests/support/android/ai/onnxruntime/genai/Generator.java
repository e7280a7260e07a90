package ai.onnxruntime.genai;

import host.Pipe;
import java.util.List;

public final class Generator implements AutoCloseable {
    private final Pipe pipe;

    public Generator(Model model, GeneratorParams generatorParams) throws GenAIException {
        pipe = model.pipe;
        pipe.run("generator", List.of());
    }

    public boolean isDone() { return ask("done")[0] != 0; }

    public void appendTokens(int[] inputIDs) throws GenAIException { pipe.run("append", List.of(Pipe.integers(inputIDs))); }

    public long tokenCount() throws GenAIException { return ask("count")[0]; }

    public void rewindTo(long newLength) throws GenAIException { pipe.run("rewind", List.of(Pipe.integers((int) newLength))); }

    public void generateNextToken() throws GenAIException { pipe.run("next", List.of()); }

    public int[] getSequence(long sequenceIndex) throws GenAIException { return ask("sequence"); }

    public int getLastTokenInSequence(long sequenceIndex) throws GenAIException {
        int[] all = ask("sequence");
        return all[all.length - 1];
    }

    private int[] ask(String what) { return pipe.run(what, List.of()).get(0).integers(); }

    @Override public void close() {}
}
