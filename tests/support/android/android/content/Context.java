package android.content;

import android.content.pm.ApplicationInfo;
import android.content.pm.PackageManager;
import android.content.res.AssetManager;
import java.io.File;

/** An app's surroundings; here, folders named by system properties: `assets`, `files`, `pack`. */
public class Context {
    private final String home;

    public Context() { this("assets"); }

    private Context(String home) { this.home = home; }

    public AssetManager getAssets() { return new AssetManager(new File(System.getProperty(home, "/nowhere"))); }
    public File getFilesDir() { return new File(System.getProperty("files")); }
    public PackageManager getPackageManager() { return new PackageManager(); }
    public ApplicationInfo getApplicationInfo() { return new ApplicationInfo(); }

    /** `org.bluelm.pack` is the installed model pack; no other package is there. */
    public Context createPackageContext(String name, int flags) {
        if (!name.equals("org.bluelm.pack")) throw new IllegalArgumentException(name);
        return new Context("pack");
    }
}
