package ai.onnxruntime.genai;

public final class Sequences implements AutoCloseable {
    private final int[] only;

    Sequences(int[] only) { this.only = only; }

    public long numSequences() { return 1; }

    public int[] getSequence(long sequenceIndex) {
        if (sequenceIndex != 0) throw new IllegalArgumentException("there is one sequence");
        return only;
    }

    @Override public void close() {}
}
