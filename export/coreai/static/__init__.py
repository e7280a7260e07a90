"""The form of a Core AI program that Apple's engine for the Neural Engine opens: functions for fixed lengths."""
