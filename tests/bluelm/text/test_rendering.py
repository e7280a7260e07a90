"""Templates are strangers' programs: what they may not do, and that the next one is rendered all the same."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bluelm.errors import InputError
from bluelm.text.rendering import _worker, render
from bluelm.text.templates import THEN

LONG = "{% for i in range(90000) %}{% for j in range(90000) %}{% set x = i * j %}{% endfor %}{% endfor %}"


def shown(source: str, **variables: Any) -> str:
    return render(source, variables, THEN, "chat_template.jinja")


@pytest.mark.parametrize(("source", "said"), [
    (LONG, "takes too long"),
    ("{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}", "more than 1,00.,... char"),
    ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "calls itself without an end"),
    ("{{ range(10 ** 9) | list }}", "Range too big"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    ("{{ 'a' * 10 ** 9 }}", "more than 256 MiB"),
    ("{{ [0] * 10 ** 9 }}", "more than 256 MiB"),
    ("{{ '%999999999d' % 1 }}", "more than 256 MiB"),
    ("{{ '{:999999999}'.format(1) }}", "more than 256 MiB"),
    ("{{ 'a'.ljust(999999999) }}", "more than 256 MiB"),
    ("{{ 'a' | center(999999999) }}", "more than 256 MiB"),
    ("{{ 10 ** (10 ** 9) }}", "takes too long|MiB"),
    ("{% set ns = namespace(t='x' * 999) %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}", "MiB"),
    ("{{ ''.__class__ }}", "writes nothing"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ '{0.__class__}'.format(1) }}", "writes nothing"),
    ("{{ raise_exception.__globals__ }}", "writes nothing"),
    ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    ("{{ messages.append(1) }}", "append"),
    ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
    ("{% include 'x' %}", "no loader"),
    ("{% if %}", "line 1"),
    ("a\n{{ b", "line 2"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "calls itself|line 1|breaks"),
])  # fmt: skip
def test_hostile_templates_end_in_words(source: str, said: str) -> None:
    with pytest.raises(InputError, match=f"the chat template .*({said})") as caught:
        shown(source, messages=[])
    assert "chat_template.jinja" in str(caught.value) and len(str(caught.value)) < 700
    assert shown("{{ a }} {{ strftime_now('%Y') }}", a=1) == "1 2024"


def test_what_is_allowed_grows_with_the_chat() -> None:
    text = "a" * 3_000_000
    assert shown("{{ a }}", a=text) == text


def test_a_child_that_was_ended_is_started_again() -> None:
    assert shown("a") == "a"
    process = _worker(os.getpid())._process
    assert process is not None
    process.kill()
    process.wait()
    assert shown("b") == "b"
