"""Stages of a run: each a folder, done once for the same input and reused afterwards.

A stage's record holds its inputs and the digest of every file, so that a copied folder is reused, a changed byte is
found, and nothing is removed that this tool did not write.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bluelm.errors import ExportError, InputError
from bluelm.system.files import removed_meanwhile, sha256, write_text
from bluelm.system.reading import MOST_TABLE_BYTES, read_json, read_note
from eval.report import ReportStage
from pipeline.run.layout import LOG

RECORDS = ".stages"
PARTIAL = ".partial"
PREVIOUS = "previous"  # what told of an artifact that is being made again
REPORTS = ("report.json", "report.html", "junit.xml", "summary.md")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BUNDLE, BUNDLES = "bundle", (".apk", "-apks", ".ipa", "-folder", "-gradle", "-xcode")
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")  # of `bluelm.system.files`
log = logging.getLogger("bluelm_export")


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a stage's result, given as JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@cache
def code(*packages: str) -> str:
    """SHA-256 over what the sources of our own packages do: a stage made by other code is made again.

    Comments, docstrings and layout do not count.
    """
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(p for package in packages for p in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n{_meaning_of(path)}\n".encode())
    return digest.hexdigest()


@cache
def _meaning_of(path: Path) -> str:
    """SHA-256 of a source's `meaning`: parsing takes seconds for all of them, and several stages ask."""
    return hashlib.sha256(meaning(path.read_text(encoding="utf-8")).encode()).hexdigest()


def meaning(source: str) -> str:
    """A module's syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


class Stages:
    """The stages of one run folder, in the order in which they are asked for."""

    def __init__(self, folder: Path, tell: Callable[[str], object] = log.info) -> None:
        self.folder = folder
        self._tell = tell
        self.done: list[ReportStage] = []

    def is_done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether an earlier run finished this stage from this input and its files are as it left them."""
        record = self._read(name)
        return bool(record) and not self._differs(name, record, inputs)

    def check(self, names: Iterable[str]) -> None:
        """See, before any work, that nothing of a user's lies where these stages will.

        Raises:
            InputError: it does.
        """
        if not (self.folder / RECORDS).is_dir():
            there = [name for name in (*REPORTS, PREVIOUS, LOG) if os.path.lexists(self.folder / name)]
            if there:
                problem = f"the run's folder holds what no run of ours wrote there: {', '.join(there[:3])}"
                raise InputError(problem, where=self.folder, fix="move it elsewhere, or give another --name")
        for name in names:
            self._refuse_foreign(name, self._read(name))

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[Path], object],
        clear: Callable[[Path], object] = lambda partial: None,
    ) -> Path:
        """Do a stage, or take an earlier run's result.

        Where the stage is made again, the run's report is moved away first: it tells of what was there before.

        Args:
            name: of the stage and its folder.
            inputs: all that decides the result.
            work: writes the folder that it is given, which does not exist yet. It may keep what a broken-off
                run can go on from in `<folder>.partial`.
            clear: removes from there what a run of other input left, and refuses what is none of its files.

        Returns:
            the stage's folder.

        Raises:
            InputError: the folder holds what this tool did not write.
        """
        folder, record = self.folder / name, self._read(name)
        why = self._differs(name, record, inputs) if record else ""
        if record and not why:
            self._tell(f"{name}: unchanged, taken from an earlier run")
            self._mend_notes(name, inputs, record["files"])
            self.done.append(ReportStage(name=name, seconds=0, reused=True))
            return folder
        if why:
            self._tell(f"{name}: made again, {why}")
        self._refuse_foreign(name, record)
        started = time.monotonic()
        begun = self._begun(name)
        if read_note(begun) != fingerprint(inputs) and self._partial(name).is_dir():
            clear(self._partial(name))
        retire_reports(self.folder)
        write_text(begun, fingerprint(inputs))
        self._record(name).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        work(folder)
        write_text(self._record(name), _record_text(inputs, digests(folder)))
        self.done.append(ReportStage(name=name, seconds=round(time.monotonic() - started, 2), reused=False))
        return folder

    def _mend_notes(self, name: str, inputs: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Notes of a finished stage as they were, where a byte is another that decided nothing now but might later."""
        if read_note(self._begun(name)) != fingerprint(inputs):
            write_text(self._begun(name), fingerprint(inputs))
        record, wanted = self._record(name), _record_text(inputs, files)
        if record.read_bytes() != wanted.encode():
            write_text(record, wanted)

    def _record(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name}.json"

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}{PARTIAL}"

    def _begun(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name}.begun"

    def _read(self, name: str) -> dict[str, Any]:
        """The record of a finished stage; empty if there is none, or none that can be read."""
        try:
            found = read_json(self._record(name), MOST_TABLE_BYTES)
        except InputError:
            return {}
        return found if isinstance(found.get("files"), dict) else {}

    def _differs(self, name: str, record: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
        """What is not as the record says, in words; empty if nothing."""
        if record.get("fingerprint") != fingerprint(inputs):
            before, now = record.get("inputs"), json.loads(json.dumps(inputs))
            before = before if isinstance(before, dict) else {}
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            return f"other input: {', '.join(sorted(keys))}" if keys else "other input"
        files = {path: size for path, (size, _) in _entries(record).items()}
        there = {path: (self.folder / name / path).stat().st_size for path in _paths(self.folder / name)}
        odd = sorted({*files.items()} ^ {*there.items()})
        if not odd:
            found = digests(self.folder / name)
            odd = sorted((path, size) for path, (size, _) in found.items() if found[path] != record["files"][path])
        return f"{odd[0][0]} is not as it was left" if odd else ""

    def _refuse_foreign(self, name: str, record: Mapping[str, Any]) -> None:
        """Nothing is removed that this tool cannot prove to have written."""
        folder, partial, begun = self.folder / name, self._partial(name), self._begun(name).is_file()
        foreign: list[str] = []
        if partial.exists() and not begun:
            foreign = [partial.name]
        elif folder.exists() and (record or not begun):  # else begun by us and broken off
            ours = set(record.get("files", {}))
            foreign = sorted(set(_there(folder)) - ours) if folder.is_dir() else [name]
            foreign += ["an empty folder"] if not record and not foreign else []
        if foreign:
            raise InputError(
                "the stage has to be made again, but its folder holds what bluelm-export did not write: "
                + ", ".join(foreign[:3]),
                where=partial if foreign == [partial.name] else folder,
                fix="move it elsewhere, or give another --name",
            )


def _record_text(inputs: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    content = {"fingerprint": fingerprint(inputs), "inputs": inputs, "files": files}
    return json.dumps(content, indent=1, sort_keys=True)


def clear_temporaries(run: Path) -> None:
    """Remove what a killed run was writing: `.NAME.PID.tmp` of a stage, a report or a note. Of a locked run."""
    notes = run / RECORDS
    ours = {path.stem for path in notes.glob("*.begun")} | {*REPORTS}
    for path in (path for place in (run, notes, run / BUNDLE) for path in place.glob(".*.tmp")):
        found = TEMPORARY.fullmatch(path.name)
        if found and (path.parent == notes or found["name"] in ours or found["name"].endswith(BUNDLES)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def retire_reports(run: Path) -> None:
    """Move the reports of what lay in a run's folder before into a folder of their own."""
    there = [run / name for name in REPORTS if (run / name).is_file()]
    if there:
        (run / PREVIOUS).mkdir(exist_ok=True)
        for path in there:
            path.replace(run / PREVIOUS / path.name)


def digests(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file of a stage."""
    return {path: [(folder / path).stat().st_size, sha256(folder / path)] for path in _paths(folder)}


def _paths(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _there(folder: Path) -> list[str]:
    """All that would be lost with a folder: files, pipes and links."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _entries(record: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The record's files; of another version's record, none that any file could equal."""
    return {
        path: (entry[0], entry[1])
        if isinstance(entry, list) and [type(part) for part in entry] == [int, str]
        else (-1, "")
        for path, entry in record["files"].items()
    }


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """Make and lock a run's folder; where an error or Ctrl-C leaves a new one without results, it is removed.

    Raises:
        InputError: it is a file, another run is writing into it now, or it was removed meanwhile.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    if folder.exists() and not folder.is_dir():
        raise InputError("the run's folder is a file", where=folder, fix="give another --out or --name")
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    try:
        with (folder / RECORDS / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = "wait for it to end, or give another --name"
                raise InputError("another run is writing into this folder", where=folder, fix=fix) from error
            clear_temporaries(folder)
            with removed_meanwhile(folder):
                yield folder
    except (ExportError, KeyboardInterrupt):
        if made and folder.is_dir() and not _holds_results(folder):
            shutil.rmtree(folder)
            for parent in made[1:]:
                if not any(parent.iterdir()):
                    parent.rmdir()
        raise


def _holds_results(folder: Path) -> bool:
    """Whether a stage is finished, or begun in earnest."""
    begun = any(p.suffix == PARTIAL and any(p.iterdir()) for p in folder.iterdir())
    return begun or any(p.suffix == ".json" for p in (folder / RECORDS).iterdir())
