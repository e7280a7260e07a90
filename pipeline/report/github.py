"""GitHub's workflow commands: lines on standard output that become annotations.

https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

import os

from bluelm.text.clean import visible


def annotation(kind: str, title: str, message: str) -> str:
    """One workflow command; what would end a property or the line is escaped as GitHub asks for."""
    message, title = visible(message), visible(title)
    message = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    title = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A").replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={title}::{message}"


def in_github() -> bool:
    """Whether this process runs in a job of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"
