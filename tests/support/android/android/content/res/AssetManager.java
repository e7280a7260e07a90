package android.content.res;

import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;

public final class AssetManager {
    private final File home;

    public AssetManager(File home) { this.home = home; }

    public InputStream open(String name) throws IOException { return new FileInputStream(new File(home, name)); }

    public String[] list(String path) throws IOException {
        String[] names = new File(home, path).list();
        return names == null ? new String[0] : names;
    }
}
