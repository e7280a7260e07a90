package android.widget;

import android.content.Context;
import android.view.View;
import android.view.ViewGroup;

public class ScrollView extends ViewGroup {
    public static final int FOCUS_DOWN = 130;
    public ScrollView(Context context) { super(context); }
    public boolean fullScroll(int direction) { return true; }
}
