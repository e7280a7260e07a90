"""The child process that loads a bundle's artifact, within limits that its own children inherit."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from pipeline.bundles.bundle_check import Ask, generate
from targets.host.child import serve


def handle(message: Ask) -> str:
    """Load the artifact and let it answer."""
    for limit, value in ((resource.RLIMIT_CPU, message.seconds), (resource.RLIMIT_DATA, message.memory)):
        _, most = resource.getrlimit(limit)
        lowest = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (lowest, lowest))
    return generate(Path(message.folder), message.on)


if __name__ == "__main__":
    serve(handle, sys.argv)
