"""Hostile chat templates, and what refuses each."""

from __future__ import annotations

HOSTILE = {
    "{% for a in range(10**9) %}{% endfor %}": "Range too big",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "runs without an end",
    "{{ 'a' * 10**10 }}": "more than 512 MiB",
    "{{ 10 ** (10**8) }}": "runs without an end|digits",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__.os }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ '{0.__class__.__mro__}'.format(1) }}": "unsafe",
    "{{ namespace(__init__=1) }}": "no attribute",
    "{% set n = namespace(a=1) %}{% set n._x = 1 %}": "no attribute",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "calls itself",
    "{{" + "(" * 5000 + ")" * 5000 + "}}": "nested too deeply",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "writes more than",
    "{{ '%1000000000d' | format(3) }}": "more than 512 MiB",
    "{{ '{:999999999}'.format(1) }}": "more than 512 MiB",
    "{{ 'a'.ljust(999999999) | center(999999999) }}": "more than 512 MiB",
    "{% set n = namespace(t='x') %}{% for a in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}": "MiB|without an",
    "{% if %}": r"line 1",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ raise_exception('only\n users') }}": "takes no such chat: only users",
    "{{ nothing.at.all }}": "undefined",
    "{{ '\\ud800' }}": "half a character",
}
