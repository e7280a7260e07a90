package ai.onnxruntime;

import host.Pipe;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Set;

public class OrtSession implements AutoCloseable {
    private final Pipe pipe;

    OrtSession(String path) { pipe = new Pipe(path); }

    public Set<String> getInputNames() {
        Set<String> names = new LinkedHashSet<>();
        for (Pipe.Array array : pipe.run("inputs", new ArrayList<>())) names.add(array.name);
        return names;
    }

    public Result run(Map<String, ? extends OnnxTensorLike> inputs) throws OrtException {
        List<Pipe.Array> arrays = new ArrayList<>();
        inputs.forEach((name, tensor) -> arrays.add(((OnnxTensor) tensor).named(name)));
        Map<String, OnnxTensor> found = new HashMap<>();
        for (Pipe.Array array : pipe.run("", arrays)) {
            found.put(array.name, new OnnxTensor(OnnxJavaType.of(array.type), array.shape, array.data));
        }
        return new Result(found);
    }

    @Override public void close() throws OrtException { pipe.close(); }

    public static class Result implements AutoCloseable {
        private final Map<String, OnnxTensor> values;

        Result(Map<String, OnnxTensor> values) { this.values = values; }

        public Optional<OnnxValue> get(String name) { return Optional.ofNullable(values.get(name)); }

        @Override public void close() { values.values().forEach(OnnxTensor::close); }
    }

    public static class SessionOptions implements AutoCloseable {
        public void addConfigEntry(String key, String value) throws OrtException {}
        public void addExecutionProvider(List<OrtEpDevice> devices, Map<String, String> options) throws OrtException {}
        @Override public void close() {}
    }
}
