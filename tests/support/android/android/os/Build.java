package android.os;

public class Build {
    public static final String SOC_MODEL = "SM8650";

    public static class VERSION {
        public static final int SDK_INT = 34;
    }
}
