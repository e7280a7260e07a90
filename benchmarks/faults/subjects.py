"""What `benchmarks.faults` does faults to: commands on tiny checkpoints, and what they leave when nothing disturbs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bluelm.errors import ExportError
from tests.support.faults import faulty
from tests.support.faults.faulty import Command, Control, Ended

LAX = """
max_perplexity_ratio: 4
max_mean_kl: 2
max_prefill_decode_kl: 0.01
min_decode_tokens_per_s: {at_least: 0.001, where: host}
max_artifact_bytes: 50 MB
max_memory_bytes: 1 GB
"""
QUICK = (
    "--samples 4 --length 32 --eval-tokens 256 --context 128 --budget lax.yaml --calibration cal.txt --eval eval.jsonl"
)
TOLD = ("report.json", "report.html", "junit.xml", "summary.md", "log.txt", ".stages/report", ".stages/lock")
"""Files of a run with clocks, speeds or memory in them, as logs have; of report.json the rest is compared."""
OF_COMPILER = ("compiled/", "judged/", "bundle/", ".stages/")  # what it wrote, and what names digests of that
NOTE = "a file of the user's"


@dataclass(frozen=True)
class Subject:
    """A command, and the folder that it fills.

    Attributes:
        few: it takes so long that few trials must do.
        children: some of its work is done by child processes.
        each: every file that it keeps is damaged once.
        compiled: what a vendor's compiler writes differs from run to run (its binaries, and digests of them): that it
            is there counts, and all figures but sizes.
    """

    name: str
    words: tuple[str, ...]
    out: str
    few: bool = False
    children: bool = False
    each: bool = False
    compiled: bool = False

    @property
    def is_run(self) -> bool:
        return self.words[0] != "quantize"


def subjects() -> list[Subject]:
    """`quantize`, and whole runs on runtimes that load their artifact in this process, or in a child."""

    def run(target: str, runtime: str, more: str = "", **about: bool) -> Subject:
        words = f"--target {target} --runtime {runtime} --name run --out dist --model run-model {QUICK} {more}"
        return Subject(runtime, tuple(words.split()), "dist/run", **about)

    return [
        Subject("quantize", ("quantize", "model", "out", "--samples", "8", "--length", "16"), "out", each=True),
        run("generic-arm64", "onnx-cpu", each=True),
        run("generic-arm64", "gguf", each=True),
        run("generic-arm64", "litert", each=True),
        run("snapdragon", "qnn-context", "--npu-tokens 256", few=True, children=True, compiled=True),
    ]


@dataclass
class Bench:
    """Where trials take place; `inputs` are the commands' own."""

    out: Path
    control: Control
    work: Path = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.out / f"work-{os.getpid()}"

    @property
    def inputs(self) -> Path:
        return self.out / "inputs"

    def fresh(self, place: Path | None = None) -> Path:
        """A folder with links to the inputs, and nothing else but a file of the user's."""
        folder = place or self.work
        if place is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for path in self.inputs.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "dist").mkdir()
        for note in (folder / "notes.txt", folder / "dist" / "notes.txt"):
            note.write_text(NOTE)
        return folder


def make_inputs(folder: Path) -> None:
    """Two tiny checkpoints, texts and a budget."""
    from bluelm.system.files import demo_checkpoint
    from tests.support.checkpoints.shapes import tiny_checkpoint, write_checkpoint

    if folder.exists():
        return
    begun = folder.with_name("inputs.begun")
    shutil.rmtree(begun, ignore_errors=True)
    write_checkpoint(begun / "model", layers=3)
    tiny_checkpoint(begun / "run-model")
    text = (demo_checkpoint() / "README.md").read_text(encoding="utf-8").split("\n\n")
    (begun / "cal.txt").write_text("\n\n".join(text[::2]), encoding="utf-8")
    records = [json.dumps({"text": part[:150]}, ensure_ascii=False) for part in text[1::2]]
    (begun / "eval.jsonl").write_text("\n".join(records), encoding="utf-8")
    (begun / "lax.yaml").write_text(LAX)
    begun.rename(folder)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run of a subject.

    Attributes:
        files: digest by name of all that is compared.
        writes, reads: operations on its files, and on those of its inputs, that the shim sees.
        clocks: how often it reads the wall clock.
        workers: child processes of the tool's own.
    """

    code: int
    seconds: float
    files: dict[str, str]
    writes: int
    reads: int
    clocks: int
    workers: int


def undisturbed(bench: Bench, subject: Subject) -> Whole:
    """The run that others are held against; done twice, the second with its reads counted: they agree."""
    found: list[tuple[Ended, dict[str, str], int]] = []
    clocks, workers = 0, set[int]()
    for kinds, under in ((faulty.WRITE, bench.work), (faulty.READ, bench.inputs)):
        folder = bench.fresh()
        bench.control.set(under, kinds=kinds, clock_at=1 << 62)
        command, workers = Command(subject.words, folder), set[int]()
        ended = command.wait(lambda _, begun=command, met=workers: met.update(p.pid for p in workers_of(begun)))
        found.append((ended, content(folder / subject.out, subject.compiled), bench.control.seen))
        clocks = bench.control.clock_seen
    (first, files, writes), (second, again, reads) = found
    assert first.code in (0, 3) and first.code == second.code, first.said
    assert files == again, f"{subject.name}: two undisturbed runs differ in {differing(files, again)}"
    return Whole(first.code, min(first.seconds, second.seconds), files, writes, reads, clocks, len(workers))


def workers_of(command: Command) -> list[psutil.Process]:
    """Its children that are the tool itself, at work in a module of its own."""
    found = []
    for child in command.children():
        with suppress(psutil.Error):
            words = child.cmdline()
            if "-m" in words and words[words.index("-m") + 1].startswith(("targets.", "pipeline.")):
                found.append(child)
    return found


def content(folder: Path, compiled: bool = False) -> dict[str, str]:
    """Digests of all files by name; of a report, of what no clock decides; of a bundle, that it is whole."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("previous/"):
            continue
        data = path.read_bytes()
        if name == "report.json":
            data = json.dumps(steady(json.loads(data), compiled), sort_keys=True).encode()
        elif name in TOLD or path.suffix == ".log" or (compiled and name.startswith(OF_COMPILER)):
            data = b"there"
        elif name.startswith("bundle/") and path.suffix == ".apk":
            from export.bundle import build

            try:
                made = build.verify(path).manifest  # the measured speed stands in it
                data = json.dumps({name: file.sha256 for name, file in made.files.items()}, sort_keys=True).encode()
            except ExportError as error:
                data = f"damaged: {error}".encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def steady(report: dict[str, Any], compiled: bool = False) -> dict[str, Any]:
    """A report without what clocks, the machine's load and, for `compiled`, a vendor's compiler decide."""
    kept = {key: value for key, value in report.items() if key not in ("stages", "measurements", "checks")}
    figures = [m for m in report["measurements"] if m["subject"] not in ("host", "run")]
    checks = [(check["name"], check["outcome"]) for check in report["checks"]]
    if compiled:
        kept = {key: kept[key] for key in ("passed", "title", "target", "configuration", "budget")}
        figures = [m for m in figures if "bytes" not in m["name"]]
    return {**kept, "measurements": figures, "checks": checks}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def kept_files(folder: Path) -> list[Path]:
    """Files that a command left, finished or half-way; none that is empty."""
    places = [*folder.glob("out"), *folder.glob("out.partial"), *folder.glob("dist/run")]
    return sorted(p for place in places for p in place.rglob("*") if p.is_file() and p.stat().st_size)


def finished(folder: Path, subject: Subject) -> dict[str, int]:
    """Finished pieces (with their digest) and files of finished stages, by their inode: nothing of them may be lost."""
    if not subject.is_run:
        place = folder / f"{subject.out}.partial"
        notes = place.glob("*.sha256")
        paths = [note.with_suffix("") for note in notes] + list((folder / subject.out).glob("*.safetensors"))
        return {path.name: path.stat().st_ino for path in paths if path.is_file()}
    run = folder / subject.out
    stages = [record.stem for record in (run / ".stages").glob("*.json")]
    files = [path for stage in stages for path in (run / stage).rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path.stat().st_ino for path in files}
