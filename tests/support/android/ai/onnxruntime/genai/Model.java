package ai.onnxruntime.genai;

import host.Pipe;

/** Behind the classes of this package, with the constructors and methods of 0.16 that the app calls, is the library itself. */
public final class Model implements AutoCloseable {
    final Pipe pipe;

    public Model(String modelPath) throws GenAIException { pipe = new Pipe(modelPath); }

    @Override public void close() { pipe.close(); }
}
