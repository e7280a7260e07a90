"""`python -m benchmarks.faults`."""

from benchmarks.faults.command import main

if __name__ == "__main__":
    main()
