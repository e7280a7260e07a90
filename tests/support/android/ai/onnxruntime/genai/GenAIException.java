package ai.onnxruntime.genai;

public final class GenAIException extends Exception {
    public GenAIException(String message) { super(message); }
}
