package ai.onnxruntime.genai;

import host.Pipe;
import java.util.List;

public final class GeneratorParams implements AutoCloseable {
    private final Pipe pipe;

    public GeneratorParams(Model model) throws GenAIException { pipe = model.pipe; }

    public void setSearchOption(String optionName, double value) throws GenAIException {
        pipe.run("number", List.of(Pipe.text(optionName), Pipe.text(Double.toString(value))));
    }

    public void setSearchOption(String optionName, boolean value) throws GenAIException {
        pipe.run("truth", List.of(Pipe.text(optionName), Pipe.integers(value ? 1 : 0)));
    }

    @Override public void close() {}
}
