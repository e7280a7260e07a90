package ai.onnxruntime;

import host.Pipe;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.IntBuffer;
import java.nio.LongBuffer;
import java.nio.ShortBuffer;

public class OnnxTensor extends OnnxTensorLike {
    private final OnnxJavaType type;
    private final long[] shape;
    private final ByteBuffer data;

    OnnxTensor(OnnxJavaType type, long[] shape, ByteBuffer data) {
        this.type = type;
        this.shape = shape;
        this.data = data;
        long count = 1;
        for (long size : shape) count *= size;
        int width = type == OnnxJavaType.INT16 ? 2 : type == OnnxJavaType.INT64 ? 8 : 4;
        if (count * width != data.remaining()) throw new IllegalArgumentException("shape and data differ");
    }

    public static OnnxTensor createTensor(OrtEnvironment environment, FloatBuffer data, long[] shape) throws OrtException {
        ByteBuffer bytes = bytes(4 * data.remaining());
        bytes.asFloatBuffer().put(data.duplicate());
        return new OnnxTensor(OnnxJavaType.FLOAT, shape, bytes);
    }

    public static OnnxTensor createTensor(OrtEnvironment environment, IntBuffer data, long[] shape) throws OrtException {
        ByteBuffer bytes = bytes(4 * data.remaining());
        bytes.asIntBuffer().put(data.duplicate());
        return new OnnxTensor(OnnxJavaType.INT32, shape, bytes);
    }

    public static OnnxTensor createTensor(OrtEnvironment environment, LongBuffer data, long[] shape) throws OrtException {
        ByteBuffer bytes = bytes(8 * data.remaining());
        bytes.asLongBuffer().put(data.duplicate());
        return new OnnxTensor(OnnxJavaType.INT64, shape, bytes);
    }

    public static OnnxTensor createTensor(OrtEnvironment environment, ByteBuffer data, long[] shape, OnnxJavaType type)
            throws OrtException {
        return new OnnxTensor(type, shape, data.duplicate());
    }

    private static ByteBuffer bytes(int size) { return ByteBuffer.allocate(size).order(ByteOrder.LITTLE_ENDIAN); }

    @Override public TensorInfo getInfo() { return new TensorInfo(type); }

    public FloatBuffer getFloatBuffer() { return open().asFloatBuffer(); }

    public ShortBuffer getShortBuffer() { return open().asShortBuffer(); }

    private ByteBuffer open() {
        if (closed) throw new IllegalStateException("the tensor is closed");
        return data.duplicate().order(ByteOrder.LITTLE_ENDIAN);
    }

    Pipe.Array named(String name) { return new Pipe.Array(name, type.numpy, shape, open()); }
}
