package host;

import java.io.BufferedOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;

/** The real runtime in a Python process: tensors go there and come back (tests/support/android/server.py). */
public final class Pipe implements AutoCloseable {
    /** One tensor: name, NumPy's name of its type, shape, little-endian bytes. */
    public static final class Array {
        public final String name, type;
        public final long[] shape;
        public final ByteBuffer data;

        public Array(String name, String type, long[] shape, ByteBuffer data) {
            this.name = name;
            this.type = type;
            this.shape = shape;
            this.data = data.order(ByteOrder.LITTLE_ENDIAN);
        }

        public String text() {
            byte[] raw = new byte[data.remaining()];
            data.duplicate().get(raw);
            return new String(raw, StandardCharsets.UTF_8);
        }

        public int[] integers() {
            int[] out = new int[data.remaining() / 4];
            data.asIntBuffer().get(out);
            return out;
        }
    }

    public static Array text(String text) {
        byte[] raw = text.getBytes(StandardCharsets.UTF_8);
        return new Array("", "uint8", new long[] {raw.length}, ByteBuffer.wrap(raw));
    }

    public static Array integers(int... values) {
        ByteBuffer data = ByteBuffer.allocate(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
        data.asIntBuffer().put(values);
        return new Array("", "int32", new long[] {values.length}, data);
    }

    private final Process process;
    private final DataOutputStream out;
    private final DataInputStream in;

    public Pipe(String model) {
        try {
            ProcessBuilder builder = new ProcessBuilder(System.getenv("PYTHON"), "-m", "tests.support.android.server", model);
            process = builder.redirectError(ProcessBuilder.Redirect.INHERIT).start();
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
        out = new DataOutputStream(new BufferedOutputStream(process.getOutputStream()));
        in = new DataInputStream(process.getInputStream());
    }

    public List<Array> run(String method, List<Array> inputs) {
        try {
            out.writeUTF(method);
            out.writeInt(inputs.size());
            for (Array array : inputs) {
                out.writeUTF(array.name);
                out.writeUTF(array.type);
                out.writeInt(array.shape.length);
                for (long size : array.shape) out.writeLong(size);
                byte[] raw = new byte[array.data.remaining()];
                array.data.duplicate().get(raw);
                out.writeInt(raw.length);
                out.write(raw);
            }
            out.flush();
            List<Array> found = new ArrayList<>();
            for (int count = in.readInt(); count > 0; count--) {
                String name = in.readUTF(), type = in.readUTF();
                long[] shape = new long[in.readInt()];
                for (int i = 0; i < shape.length; i++) shape[i] = in.readLong();
                byte[] raw = new byte[in.readInt()];
                in.readFully(raw);
                found.add(new Array(name, type, shape, ByteBuffer.wrap(raw)));
            }
            return found;
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    @Override public void close() {
        process.destroy();
    }
}
