"""The child process that renders chat templates: what transformers gives a template, within limits.

A template comes with a checkpoint, so it is a stranger's program. jinja2's immutable sandbox keeps it from Python; that
it neither runs for ever nor takes all memory only the system can see to. This module imports nothing large.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_S, BYTES_PER_CPU_S = 0.5, 1 << 20  # of one chat, and what each byte of it adds
MEMORY, MEMORY_PER_BYTE = 256 << 20, 64
OUTPUT, OUTPUT_PER_BYTE = 1_000_000, 16  # characters
TOLD = 300  # characters of a message


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks what the model wrote, for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own protocol)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Names(Namespace):
    """jinja2's namespace without names that Python gives a meaning."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace takes no name with an underscore in front: {name}")
        super().__setitem__(name, value)


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """jinja2's own escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "namespace": Names}
    return environment.from_string(source)


def render(request: dict[str, Any], size: int) -> dict[str, str]:
    """`{"text": …}`, or `{"refused": …}` in the template's own words, or `{"fault": …}`.

    Args:
        request: `source`, `variables`, and `now`, the ISO date and time that the template may ask for.
        size: bytes of the request; limits grow with it.
    """
    now = datetime.fromisoformat(request["now"])
    most = OUTPUT + OUTPUT_PER_BYTE * size
    parts, length = [], 0
    try:
        variables = {"strftime_now": now.strftime, **request["variables"]}
        for part in _compiled(request["source"]).generate(variables):
            length += len(part)
            if length > most:
                return {"fault": f"it writes more than {most:,} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        return {"fault": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"fault": "it calls itself without an end"}
    except jinja2.TemplateSyntaxError as error:
        return {"fault": f"line {error.lineno}: {error.message}"[:TOLD]}
    except jinja2.TemplateError as error:
        kind = "refused" if type(error) is jinja2.TemplateError else "fault"
        return {kind: f"{error.message or type(error).__name__}"[:TOLD]}
    except Exception as error:  # noqa: BLE001  (a stranger's program may raise anything)
        return {"fault": f"{type(error).__name__}: {error}"[:TOLD]}


def _limit_memory(size: int) -> None:
    """As much as the process has now, and what a template may add; nothing where the system does not say (macOS)."""
    try:
        import resource

        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        most = held + MEMORY + MEMORY_PER_BYTE * size
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    except (ImportError, OSError, ValueError):
        return


def main(descriptor: int) -> None:
    """Answer until the other end closes. Who takes too long dies of SIGPROF, whatever it is doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(descriptor)
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return
        request = json.loads(data)
        _limit_memory(len(data))
        signal.setitimer(signal.ITIMER_PROF, CPU_S + len(data) / BYTES_PER_CPU_S)
        answer = json.dumps(render(request, len(data))).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
