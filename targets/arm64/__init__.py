"""CPU runtimes, on this machine and in the arm64 emulator."""
