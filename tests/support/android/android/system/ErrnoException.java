package android.system;

public final class ErrnoException extends Exception {
    public ErrnoException(String message) { super(message); }
}
