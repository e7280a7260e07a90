package android.content.pm;

import java.util.Collections;
import java.util.List;

public class PackageManager {
    public List<PackageInfo> getInstalledPackages(int flags) {
        if (System.getProperty("pack") == null) return Collections.emptyList();
        PackageInfo info = new PackageInfo();
        info.packageName = "org.bluelm.pack";
        return Collections.singletonList(info);
    }
}
