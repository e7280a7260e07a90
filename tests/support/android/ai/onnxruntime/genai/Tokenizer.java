package ai.onnxruntime.genai;

import host.Pipe;
import java.util.List;

public class Tokenizer implements AutoCloseable {
    private final Pipe pipe;

    public Tokenizer(Model model) throws GenAIException { pipe = model.pipe; }

    public Sequences encode(String string) throws GenAIException {
        return new Sequences(pipe.run("encode", List.of(Pipe.text(string))).get(0).integers());
    }

    public String applyChatTemplate(String templateStr, String messages, String tools, boolean addGenerationPrompt)
            throws GenAIException {
        if (templateStr == null || tools != null || !addGenerationPrompt) throw new GenAIException("not tried here");
        return pipe.run("template", List.of(Pipe.text(templateStr), Pipe.text(messages))).get(0).text();
    }

    public TokenizerStream createStream() throws GenAIException { return new TokenizerStream(pipe); }

    @Override public void close() {}
}
