"""The arm64 user-mode emulator: its file system, its guests, instruction counts."""
