"""This machine: files, memory, child processes, interrupts, progress."""
