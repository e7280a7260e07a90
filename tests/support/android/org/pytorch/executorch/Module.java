package org.pytorch.executorch;

import host.Pipe;
import java.util.ArrayList;
import java.util.List;

public class Module {
    private final Pipe pipe;

    private Module(String path) { pipe = new Pipe(path); }

    public static Module load(String path) { return new Module(path); }

    public EValue[] forward(EValue... inputs) { return execute("forward", inputs); }

    public EValue[] execute(String method, EValue... inputs) {
        List<Pipe.Array> arrays = new ArrayList<>();
        for (EValue input : inputs) arrays.add(input.toTensor().array);
        List<Pipe.Array> found = pipe.run(method, arrays);
        EValue[] out = new EValue[found.size()];
        for (int i = 0; i < out.length; i++) out[i] = EValue.from(new Tensor(found.get(i)));
        return out;
    }

    public void destroy() { pipe.close(); }
}
