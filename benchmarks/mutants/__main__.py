"""`python -m benchmarks.mutants`."""

from benchmarks.mutants.campaign import main

if __name__ == "__main__":
    main()
