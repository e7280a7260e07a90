"""`python -m benchmarks.gate`."""

from benchmarks.gate.command import main

if __name__ == "__main__":
    main()
