"""`python -m pipeline …` is the command line, so that torchrun can start it too."""

from pipeline.cli import main

main()
