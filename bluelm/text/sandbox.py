"""The child process that renders chat templates: Jinja from untrusted files, bounded in time, memory and output.

A program of its own (`python -m bluelm.text.sandbox`), because only a process can be stopped in the middle of
`'a' * 10**9` or of a loop without an end. It imports jinja2 alone, reads a request a line and answers a line, both
JSON. A render that takes too much processor time ends the process by SIGPROF; the caller (`bluelm.text.rendering`)
says so and starts another.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_SECONDS = 0.4
MEMORY_BYTES = 512 << 20
MOST_REASON = 300  # characters


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote; here it stands for its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """As transformers has it: no attribute that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no attribute {name!r}")


class Refused(jinja2.TemplateError):
    """What a template says of a chat that it does not take, by `raise_exception`."""


def _raise(message: object) -> NoReturn:
    raise Refused(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """Plain JSON, no HTML escapes as in Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def environment() -> jinja2.Environment:
    """What transformers gives templates (utils/chat_template_utils.py)."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControls])
    made.filters["tojson"] = _tojson
    given: dict[str, Any] = {
        "raise_exception": _raise, "dict": _dict, "namespace": _Namespace,
    }  # fmt: skip
    made.globals.update(given)
    return made


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def rendered(source: str, variables: Mapping[str, Any], most: int) -> str:
    """The template's text.

    Raises:
        jinja2.exceptions.TemplateError: what the template raises.
        OverflowError: more than `most` characters.
    """
    parts, length = [], 0
    for part in _compiled(source).generate(**variables):
        length += len(part)
        if length > most:
            raise OverflowError(f"it writes more than {most} characters")
        parts.append(part)
    return "".join(parts)


def _reason(error: BaseException) -> str:
    """Why a render failed, in one line."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY_BYTES >> 20} MiB"
    if isinstance(error, RecursionError):
        return "it calls itself without an end, or is nested too deeply"
    text = " ".join(str(error).split())[:MOST_REASON]
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    known = isinstance(error, (jinja2.TemplateError, OverflowError)) and text
    return text + line if known else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Ends the process when what is inside takes more processor time; a handler would wait for C code to return."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(request: Mapping[str, Any], limited: Callable[[], contextlib.AbstractContextManager[None]]) -> str:
    """A line of JSON: {"text": …}, {"refused": …} or {"error": …}."""
    try:
        with limited():
            now = datetime.fromisoformat(request["now"])
            variables = {"strftime_now": now.strftime, **request["variables"]}
            return json.dumps({"text": rendered(request["template"], variables, request["most"])})
    except Refused as error:
        return json.dumps({"refused": " ".join(str(error).split())[:MOST_REASON]})
    except Exception as error:  # noqa: BLE001  (whatever a template provokes is the template's fault, in words)
        return json.dumps({"error": _reason(error)})


def main() -> None:
    """Answer requests until standard input ends."""
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of the former
            resource.setrlimit(limit, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        print(answer(json.loads(line), _limited), flush=True)


if __name__ == "__main__":
    main()
