package org.pytorch.executorch;

import host.Pipe;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;

public final class Tensor {
    final Pipe.Array array;

    Tensor(Pipe.Array array) { this.array = array; }

    private static ByteBuffer bytes(int size) { return ByteBuffer.allocate(size).order(ByteOrder.LITTLE_ENDIAN); }

    public static Tensor fromBlob(float[] data, long[] shape) {
        ByteBuffer bytes = bytes(4 * data.length);
        bytes.asFloatBuffer().put(data);
        return new Tensor(new Pipe.Array("", "float32", shape, bytes));
    }

    public static Tensor fromBlob(int[] data, long[] shape) {
        ByteBuffer bytes = bytes(4 * data.length);
        bytes.asIntBuffer().put(data);
        return new Tensor(new Pipe.Array("", "int32", shape, bytes));
    }

    public static Tensor fromBlob(long[] data, long[] shape) {
        ByteBuffer bytes = bytes(8 * data.length);
        bytes.asLongBuffer().put(data);
        return new Tensor(new Pipe.Array("", "int64", shape, bytes));
    }

    public float[] getDataAsFloatArray() {
        float[] out = new float[array.data.remaining() / 4];
        array.data.asFloatBuffer().get(out);
        return out;
    }
}
