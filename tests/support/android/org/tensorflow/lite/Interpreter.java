package org.tensorflow.lite;

import host.Pipe;
import java.io.File;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;

public final class Interpreter implements AutoCloseable {
    public static class Options {
        public Options setNumThreads(int count) { return this; }
    }

    private final Pipe pipe;

    public Interpreter(File model, Options options) { pipe = new Pipe(model.getPath()); }

    /** Outputs of a signature, each with its size in bytes as its shape. */
    private List<Pipe.Array> outputs(String signature) {
        return pipe.run("outputs of " + signature, Collections.emptyList());
    }

    public String[] getSignatureOutputs(String signature) {
        return outputs(signature).stream().map(array -> array.name).toArray(String[]::new);
    }

    public Tensor getOutputTensorFromSignature(String name, String signature) {
        for (Pipe.Array array : outputs(signature)) {
            if (array.name.equals(name)) return () -> (int) array.shape[0];
        }
        throw new IllegalArgumentException(name);
    }

    public void runSignature(Map<String, Object> inputs, Map<String, Object> outputs, String signature) {
        List<Pipe.Array> arrays = new ArrayList<>();
        inputs.forEach((name, data) -> arrays.add(new Pipe.Array(name, "uint8", new long[0], (ByteBuffer) data)));
        for (Pipe.Array array : pipe.run(signature, arrays)) {
            ByteBuffer target = (ByteBuffer) outputs.get(array.name);
            target.put(array.data);
        }
    }

    @Override public void close() { pipe.close(); }
}
