package ai.onnxruntime;

public enum OnnxJavaType {
    FLOAT("float32"), INT16("int16"), INT32("int32"), INT64("int64");

    final String numpy;

    OnnxJavaType(String numpy) { this.numpy = numpy; }

    static OnnxJavaType of(String numpy) {
        for (OnnxJavaType type : values()) if (type.numpy.equals(numpy)) return type;
        throw new IllegalArgumentException(numpy);
    }
}
