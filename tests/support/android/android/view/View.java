package android.view;

import android.content.Context;

public class View {
    public interface OnClickListener { void onClick(View view); }
    public View(Context context) {}
    public void setOnClickListener(OnClickListener listener) {}
    public void setPadding(int left, int top, int right, int bottom) {}
    public void setEnabled(boolean enabled) {}
    public boolean isEnabled() { return true; }
    public void setFitsSystemWindows(boolean fits) {}
    public boolean getFitsSystemWindows() { return true; }
    public boolean post(Runnable action) { action.run(); return true; }
}
