"""Hostile input for everything that reads foreign bytes, made by scripts: what is read, and what is done to it.

`python -m tests.hostile [READER ...]` reads each in a process of its own with limits of time and memory
(`tests/hostile/judged.py`). Readers and their valid input are those of `tests/support/readers`.
"""
