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

    /** float16 by its bits. */
    public static Tensor fromBlob(short[] data, long[] shape) {
        ByteBuffer bytes = bytes(2 * data.length);
        bytes.asShortBuffer().put(data);
        return new Tensor(new Pipe.Array("", "float16", shape, bytes));
    }

    public static Tensor fromBlob(byte[] data, long[] shape) {
        return new Tensor(new Pipe.Array("", "int8", shape, ByteBuffer.wrap(data)));
    }

    public short[] getDataAsShortArray() {
        short[] out = new short[array.data.remaining() / 2];
        array.data.asShortBuffer().get(out);
        return out;
    }

    public byte[] getDataAsByteArray() {
        byte[] out = new byte[array.data.remaining()];
        array.data.duplicate().get(out);
        return out;
    }

    public float[] getDataAsFloatArray() {
        float[] out = new float[array.data.remaining() / 4];
        array.data.asFloatBuffer().get(out);
        return out;
    }
}
