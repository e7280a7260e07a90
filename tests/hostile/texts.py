"""Hostile JSON, YAML and Jinja: what a parser takes and nothing behind it expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.support.readers.templates import HOSTILE

DIGITS = "9" * 5000
DEEP = 100_000
SHOUT = "\x1b[2J\x1b]0;x\x07\r\n::error::owned\n\u202e\x9b1m"  # escape sequences, a line of GitHub's, a turn of writing


class Raw(str):
    """JSON text that goes in as it is."""


VALUES: dict[str, list[Any]] = {
    "numbers out of all bounds": [Raw(DIGITS), Raw(f"-{DIGITS}"), Raw("1e400"), Raw("-1e400"), 2**63, 2**64, -(2**31)],
    "numbers that are none": [Raw("NaN"), Raw("-Infinity"), 0, -1, 0.5, 1e-320, True],
    "other types": [None, "", "x", [], {}, [[]], [None], {"": {}}, [[1, "x"], {"a": None}]],
    "depth": [Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw("[" * DEEP)],
    "text that shouts": [SHOUT, [SHOUT], {SHOUT: SHOUT}, "\x00", "a\x00b"],
    "text that is none": [Raw('"\\ud800"'), Raw('"\\udc80x"'), Raw('{"\\ud800": 1}')],
    "names of other places": ["../../../etc/passwd", "/etc/passwd", "~/.ssh/x", "..", ".", "a/../../b", "C:\\x"],
    "size": [
        "x" * (4 << 20), Raw("[" + "0," * (1 << 20) + "0]"),
        Raw("{" + ",".join(f'"{i}":0' for i in range(1 << 17)) + "}"),
        Raw("{" + ",".join(f'"{i}":0' for i in range(90_000)) + "}"),  # as many as a record may have
    ],
}  # fmt: skip


def json_with(valid: bytes, values: list[Any]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The valid document with each value in place of each of its own, two levels deep; made when called."""
    document = json.loads(valid)
    for value in values:
        text = value if isinstance(value, Raw) else json.dumps(value)
        yield "the whole", lambda text=text: text.encode("utf-8", "surrogatepass")
        for way in _ways(document, 1 if len(text) > 1000 else 2):
            yield " ".join(map(str, way)), lambda way=way, text=text: _text(document, way, text)


def _ways(value: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """Ways to values; of long lists and tables, to the first few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) < 24 else items[:3]:
        yield (key,)
        if depth > 1:
            yield from ((key, *rest) for rest in _ways(inner, depth - 1))


def _text(document: Any, way: tuple[Any, ...], text: str) -> bytes:
    mark = "@@here@@"
    changed = json.loads(json.dumps(document))
    place = changed
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = mark
    return json.dumps(changed).replace(json.dumps(mark), text, 1).encode("utf-8", "surrogatepass")


JSON_TEXTS: dict[str, bytes] = {
    "a mark in front": b"\xef\xbb\xbf{}",
    "a key twice": b'{"a": 1, "a": 2}',
    "text behind it": b"{} {}",
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "a bracket, 20 million times": b"[" * 20_000_000,
}

YAML: dict[str, bytes] = {
    "a program": b"!!python/object/apply:os.system ['touch owned']",
    "a module": b"a: !!python/name:os.system",
    "an alias of itself": b"&a [*a]",
    "a table of itself": b"&a {b: *a}",
    "laughs": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(12)),
    "merges that multiply": b"a: &a {x: 1}\n"
    + b"".join(b"%c: &%c {<<: [%s]}\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
    "depth": b"[" * DEEP,
    "depth in blocks": b"".join(b" " * i + b"a:\n" for i in range(3000)),
    "5000 digits": f"bits: {DIGITS}".encode(),
    "5000 digits with underscores": f"bits: {'9_' * 5000}1".encode(),
    "5000 digits by sixty": f"bits: {'59:' * 5000}1".encode(),
    "an octal of 5000 digits": f"bits: 0{'7' * 5000}".encode(),
    "an impossible day": b"method: 2024-99-99",
    "a day that is no value": b"!!timestamp x",
    "an empty number": b"bits: !!int ''",
    "a truth that is none": b"symmetric: !!bool maybe",
    "bytes": b"method: !!binary AAAA",
    "a set": b"layers: !!set {a, b}",
    "pairs": b"layers: !!omap [a: 1]",
    "a list as key": b"? [a, b]\n: c",
    "a table as key": b"? {a: b}\n: c",
    "bits of 99": b"bits: 99",
    "not a number": b"bits: .nan",
    "without end": b"bits: .inf",
    "two documents": b"a: 1\n---\nb: 2\n",
    "a tab": b"a:\n\t- b",
    "a tag of its own": b"!x y",
    "a directive": b"%YAML 99.9\n---\na: 1",
    "an unknown anchor": b"a: *nowhere",
    "shouting": b"\"\\e[2J\\n::error::x\": \"\\a\"",
    "a pattern that never ends": b"layers: {'(a+)+$': {bits: 8}}",
    "itself": b"extends: [r.yaml, b.yaml]",
    "a device": b"extends: /dev/zero",
    "another place": b"extends: ../../../../etc/passwd",
}  # fmt: skip

MORE_JINJA = {
    "roles that are none": "{{ messages[0].no.such.role }}",
    "text that shouts": "{{ '"
    + SHOUT.replace("\n", "\\n").replace("\r", "\\r")
    + "' }}{{ raise_exception('\\x1b[2J') }}",
    "an error that shouts": "{{ raise_exception('\\n::error::owned') }}",
    "marks of the template": "{{ '{{' }}{{ '{%' }}",
    "a sort of a product": "{{ range(9999) | map('string') | join | list | sort | length }}",
    "filters in filters": "{{ 'x'" + " | upper" * 5000 + " }}",
    "blocks in blocks": "{% if true %}" * 500 + "{% endif %}" * 500,
    "names without end": "{{ " + "a" * (1 << 20) + " }}",
    "half a pair": "{{ '\\ud800' }}",
}
JINJA: dict[str, bytes] = {
    **{source[:60]: source.encode() for source in HOSTILE},
    **{name: source.encode() for name, source in MORE_JINJA.items()},
}


def json_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The valid document after a change of it."""

    def do(valid: bytes) -> bytes:
        document = json.loads(valid)
        change(document)
        return json.dumps(document).encode()

    return do


def in_a_config(source: bytes) -> Callable[[bytes], bytes]:
    """The template in tokenizer_config.json, in place of the one or of the named ones."""

    def change(valid: bytes) -> bytes:
        document = json.loads(valid)
        told, text = document["chat_template"], source.decode()
        document["chat_template"] = text if isinstance(told, str) else [{**row, "template": text} for row in told]
        return json.dumps(document).encode()

    return change
