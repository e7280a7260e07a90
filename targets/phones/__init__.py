"""Phones on a cable, by adb and devicectl."""
