"""Plain lines of progress: nothing is silent for more than ten seconds, and nothing is told oftener."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.progress import PlainProgress, show_progress, working


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def words() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(clock: Clock, words: io.StringIO) -> PlainProgress:
    return PlainProgress(Console(file=words, width=200), clock)


def test_a_long_step_is_told_each_ten_seconds(plain: PlainProgress, clock: Clock, words: io.StringIO) -> None:
    with plain.task("quantize", 3) as task:
        clock.now += 8
        task.advance(note="embedding")
        for _ in range(35):
            clock.now += 1
            plain.remind()
    assert words.getvalue().splitlines() == [
        "quantize ...",
        "quantize: 1/3, about 14 s left, embedding",  # 8 s a step, 2 s behind the first
        "quantize: 1/3, about 4 s left, embedding",
        "quantize: 1/3, under way for 30 s, embedding",
        "quantize: 1/3, under way for 40 s, embedding",
        "done quantize 43.0 s",
    ]


def test_nothing_is_known_of_the_first_step(plain: PlainProgress, clock: Clock, words: io.StringIO) -> None:
    with plain.task("judge", 2):
        clock.now += 10
        plain.remind()
    assert words.getvalue().splitlines()[1] == "judge: 0/2, under way for 10 s"


def test_steps_tell_the_time_left_and_reminders_wait_for_them(
    plain: PlainProgress, clock: Clock, words: io.StringIO
) -> None:
    with plain.task("judge", 8) as task:
        for _ in range(7):
            clock.now += 6
            task.advance(note="window")
            plain.remind()
    told = words.getvalue().splitlines()[1:-1]
    assert told == [f"judge: {done}/8, about {6 * (8 - done)} s left, window" for done in (2, 4, 6)]


def test_what_lies_between_tasks_is_not_silent(plain: PlainProgress, clock: Clock, words: io.StringIO) -> None:
    plain.remind()
    with plain.task("judge", 1):
        pass
    clock.now += 9
    plain.remind()
    assert "under way" not in words.getvalue()
    clock.now += 1
    plain.remind()
    assert words.getvalue().splitlines()[-1] == "what follows judge: under way"


def test_a_failed_task_is_not_told_done(plain: PlainProgress, words: io.StringIO) -> None:
    with pytest.raises(ValueError, match="broken"), plain.task("judge", 1):
        raise ValueError("broken")
    assert words.getvalue() == "judge ...\n"


def test_lines_where_there_is_no_terminal(words: io.StringIO) -> None:
    console = Console(file=words, width=200)
    with show_progress(console) as progress:
        assert isinstance(progress, PlainProgress)
    with working(console, "read the texts"):
        pass
    assert words.getvalue().startswith("read the texts ...\ndone read the texts ")
