package ai.onnxruntime;

public abstract class OnnxTensorLike implements OnnxValue {
    boolean closed;

    public abstract TensorInfo getInfo();

    @Override public void close() { closed = true; }
}
