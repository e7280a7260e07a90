package android.util;

public final class Half {
    public static float toFloat(short half) { throw new UnsupportedOperationException(); }
    public static short toHalf(float value) { throw new UnsupportedOperationException(); }
}
