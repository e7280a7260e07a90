package ai.onnxruntime;

import java.util.ArrayList;
import java.util.List;

public final class OrtEnvironment {
    private static final OrtEnvironment ONLY = new OrtEnvironment();
    private final List<OrtEpDevice> devices = new ArrayList<>();

    public static OrtEnvironment getEnvironment() { return ONLY; }

    public OrtSession createSession(String path, OrtSession.SessionOptions options) throws OrtException {
        return new OrtSession(path);
    }

    public void registerExecutionProviderLibrary(String name, String path) throws OrtException {
        devices.add(new OrtEpDevice(name));
    }

    public List<OrtEpDevice> getEpDevices() throws OrtException { return devices; }
}
