"""The Gradle bundle's Kotlin app on a desktop's Java.

Android's classes, and the runtimes' Java ones, are stood in for by `tests/support/android`; behind the latter the real
runtimes run the real artifact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

APP = Path("export/bundle/templates/gradle/app/src/main/kotlin/org/bluelm/chat")
STAND_INS = Path("tests/support/android")
JSON = Path("/usr/share/java/com.android.json.jar")  # Android's own org.json
KOTLIN = [Path(f"/usr/share/java/kotlin-stdlib{part}.jar") for part in ("", "-jdk7")]


@dataclass(frozen=True)
class App:
    """The compiled app."""

    classes: Path
    jar: Path

    def run(self, words: Sequence[str], lines: str, **properties: object) -> list[str]:
        """Standard output of tests/support/android/Main.kt."""
        path = ":".join(map(str, [self.jar, self.classes, JSON, *KOTLIN]))
        options = [f"-D{name}={value}" for name, value in properties.items()]
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(Path.cwd())}
        command = ["java", *options, "-cp", path, "org.bluelm.chat.MainKt", *words]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n").split("\n")  # a text may hold other ends of lines

    def answer(self, questions: Sequence[str], engine: str, pack: Path, files: Path) -> list[str]:
        """What the app answers, one conversation.

        Args:
            engine: of `export/bundle/data/runtimes.yaml`.
            pack: the payload of a bundle. files: the app's own folder.
        """
        said = self.run(["answer"], "".join(f"{q}\n" for q in questions), engine=engine, pack=pack, files=files)
        return [line.replace("\\n", "\n") for line in said]


def build(home: Path, kotlinc: Sequence[str] = ("kotlinc",)) -> App:
    """Compile every Kotlin file of the template, all engines at once."""
    classes, sources, jar = home / "classes", home / "sources", home / "app.jar"
    sources.mkdir()
    java = [str(path) for path in sorted(STAND_INS.rglob("*.java"))]
    subprocess.run(["javac", "-d", str(classes), *java], check=True, capture_output=True)
    for path in (*APP.rglob("*.kt"), *STAND_INS.rglob("*.kt")):
        text, name = path.read_text(), path.name
        if name.startswith("__engine_"):  # each is the app's only one: they differ in name here
            engine = name.split("__")[1].removeprefix("engine_")
            assert "fun openChat(" in text
            name, text = f"{engine}Engine.kt", text.replace("fun openChat(", f"fun open{engine}(")
        (sources / name).write_text(text)
    path = ":".join(map(str, [classes, JSON, *KOTLIN]))
    command = [*kotlinc, *map(str, sorted(sources.iterdir())), "-cp", path, "-d", str(jar)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return App(classes, jar)
