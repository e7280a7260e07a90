"""Headless Chromium as a judge of a page: what it draws, and the sizes that it lays out."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.packages import PACKAGES, find, need
from tests.support.limits import HANG_S

# reads the framed page once it is laid out; the page itself may run no script
PROBE = """<!DOCTYPE html><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="found"></pre><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const box = (element) => element.getBoundingClientRect();
  const scale = (text) => box(text.ownerSVGElement).width / text.ownerSVGElement.viewBox.baseVal.width;
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    headings: [...page.querySelectorAll(".verdict, h2")].map((e) => [e.textContent, box(e).top]),
    plots: [...page.querySelectorAll("svg")].map((e) => [box(e).left, box(e).right, box(e).height]),
    smallest: Math.min(...[...page.querySelectorAll("svg text")].map(
      (e) => parseFloat(getComputedStyle(e).fontSize) * scale(e))),
    outside: [...page.querySelectorAll("svg text")].filter((e) => {{
      const frame = box(e.ownerSVGElement), own = box(e);
      return own.left < frame.left - 2 || own.right > frame.right + 2 || own.bottom > frame.bottom + 2;
    }}).map((e) => e.textContent),
  }});
}});</script></body>"""


@dataclass(frozen=True)
class Laid:
    """A page as the browser laid it out.

    Attributes:
        width: of all content, in CSS pixels. headings: text, place from above. plots: left, right, height.
        smallest: size of the smallest text in a plot. outside: texts that leave their plot.
    """

    width: float
    headings: list[tuple[str, float]]
    plots: list[tuple[float, float, float]]
    smallest: float
    outside: list[str]


def lay_out(page: Path, width: int) -> Laid:
    """The page in a window of `width` CSS pixels."""
    probe = page.with_name("probe.html")
    probe.write_text(PROBE.format(page=page.name, width=width), encoding="utf-8")
    found = _chromium(page.parent, "--hide-scrollbars", "--allow-file-access-from-files", "--dump-dom", probe.as_uri())
    match = re.search(r'<pre id="found">(.*?)</pre>', found, re.DOTALL)
    assert match is not None
    assert match[1], found[:2000]
    content: dict[str, Any] = json.loads(html.unescape(match[1]))
    return Laid(**content)


def picture(page: Path, width: int, height: int) -> Image.Image:
    """The page as it is drawn, RGB."""
    path = page.with_name(f"{page.stem}-{width}.png")
    _chromium(
        page.parent, "--hide-scrollbars", f"--window-size={width},{height}", f"--screenshot={path}", page.as_uri()
    )
    return Image.open(path).convert("RGB")


def _chromium(home: Path, *arguments: str) -> str:
    need("chromium")
    program = str(find(*PACKAGES["chromium"]))
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", *arguments]
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
