"""`bluelm-export sweep`: runs of many methods, widths, group sizes and targets, and which are worth having.

Each variant is a run of its own, in a process of its own. Variants with the same recipe run one after another
and share what does not depend on the target: the quantized checkpoint, activation ranges and the CPU artifact
are linked from the first into the next, whose stages find them finished. A sweep that is started again takes
what is finished as it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bluelm.errors import BudgetError, InputError, InterruptedRun, OutOfMemoryError, UnavailableError
from bluelm.system.children import HEARTBEAT_S, Watch, killed, name_of
from bluelm.system.files import write_text
from bluelm.system.memory import shortage
from bluelm.system.reading import read_json
from pipeline.errors import INTERRUPTED, leave
from pipeline.options.effects import refuse_if
from pipeline.report.sweep_results import VariantRow, lines, mark_pareto, write_results
from pipeline.run import layout
from pipeline.terminal import say

if TYPE_CHECKING:
    from eval.report import Report

SHARED = (layout.QUANTIZED, layout.RANGES, layout.ONNX_CPU)
RECORDS = ".stages"  # as pipeline.run.stages names it
DONE = "sweep.json"


@dataclass(frozen=True)
class Variant:
    """One run: method, bits, group size, target."""

    method: str
    bits: str
    group_size: str
    target: str

    @property
    def recipe(self) -> tuple[str, str, str]:
        return self.method, self.bits, self.group_size

    @property
    def name(self) -> str:
        groups = "row" if self.group_size == "-1" else f"g{self.group_size}"
        return f"{self.method}-w{self.bits}-{groups}-{self.target}"

    def arguments(self, out: Path) -> list[str]:
        """Options of the run, without those that all runs share."""
        recipe = ["--method", self.method, "--bits", self.bits, "--group-size", self.group_size]
        return ["--target", self.target, *recipe, "--out", str(out), "--name", self.name]


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(sweep)


def sweep(
    context: typer.Context,
    targets: Annotated[str, typer.Option(help="Targets, e.g. snapdragon,apple.")],
    methods: Annotated[str, typer.Option(help="Methods, e.g. gptq,awq.")] = "gptq",
    bits: Annotated[str, typer.Option(help="Widths of the weights, e.g. 4,8.")] = "4",
    group_size: Annotated[str, typer.Option(help="Group sizes, e.g. 32,128; -1: one scale a row.")] = "32",
    out: Annotated[Path, typer.Option(help="Folder in which all runs are created.")] = Path("dist/sweep"),
    jobs: Annotated[int, typer.Option(min=1, help="Recipes to run in parallel.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on this Ray cluster; all machines must see the same folders. local: here."),
    ] = None,
) -> None:
    """Run many variants; print a table and plot which give the least error for their size and speed.

    Every other option is passed on to each run, e.g. --model FOLDER --eval-tokens 4096. The same command resumes an
    interrupted sweep. Exit code 3: no variant keeps within the budget.
    """

    def work() -> int:
        refuse_if(ray is not None, context, "--jobs", "the Ray cluster decides how many run at a time")
        return run_sweep(targets, methods, bits, group_size, out, jobs, ray, context.args)

    leave(work)


def run_sweep(
    targets: str,
    methods: str,
    bits: str,
    group_size: str,
    out: Path,
    jobs: int,
    ray: str | None,
    rest: Sequence[str],
) -> int:
    """Do all variants, write the results, print the table.

    Raises:
        InputError: an empty list, an unknown target or method, or an option that the sweep sets itself.
    """
    from compress.methods import entry
    from targets.registry import find

    variants = expand(methods, bits, group_size, targets)
    _check_rest(rest)
    for variant in variants:  # before the first run takes its time
        find(variant.target)
        entry(variant.method)
    work = [(group, str(out.resolve()), list(rest)) for group in grouped(variants)]
    spread = on_ray(ray) if ray else on_threads(jobs)
    with spread as run_all:
        rows = mark_pareto(itertools.chain.from_iterable(run_all(do_group, work)))
    for line in lines(rows):
        say(line)
    say(f"\nwritten: {', '.join(str(p) for p in write_results(rows, out))}")
    errors = [row for row in rows if row.exit_code not in (0, BudgetError.exit_code)]
    if errors:
        return errors[0].exit_code
    return 0 if any(row.exit_code == 0 for row in rows) else BudgetError.exit_code


def expand(methods: str, bits: str, group_size: str, targets: str) -> list[Variant]:
    """Every combination, in the order given."""
    lists = []
    for option, text in (
        ("--methods", methods),
        ("--bits", bits),
        ("--group-size", group_size),
        ("--targets", targets),
    ):
        words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
        if not words:
            raise InputError(f"{option} names nothing", fix="give names with commas between them")
        lists.append(words)
    return [Variant(*words) for words in itertools.product(*lists)]


def _check_rest(rest: Sequence[str]) -> None:
    own = {"--target", "--method", "--name", "--out", "--dry-run"}
    taken = own & {word.partition("=")[0] for word in rest}
    if taken:
        raise InputError(f"a sweep sets {', '.join(sorted(taken))} itself", fix="omit it")


def grouped(variants: Iterable[Variant]) -> list[list[Variant]]:
    """Variants of one recipe together: they share work and so run one after another."""
    groups: dict[tuple[str, str, str], list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.recipe, []).append(variant)
    return list(groups.values())


Group = tuple[list[Variant], str, list[str]]
Worker = Callable[[Group], list[VariantRow]]
RunAll = Callable[[Worker, Sequence[Group]], list[list[VariantRow]]]


@contextmanager
def on_threads(jobs: int) -> Iterator[RunAll]:
    """So many groups at a time on this machine; every run is a process, so threads are enough to wait in."""
    with ThreadPoolExecutor(jobs) as pool:

        def run_all(worker: Worker, work: Sequence[Group]) -> list[list[VariantRow]]:
            futures = [pool.submit(worker, item) for item in work]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()  # those under way hear of Ctrl-C themselves
                raise

        yield run_all


@contextmanager
def on_ray(address: str) -> Iterator[RunAll]:
    """A task a group on a Ray cluster (extra `ray`); "local" starts one here."""
    import ray
    from ray import exceptions

    try:
        _knock(address)
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        fix = "see `ray status` there, or use --jobs"
        raise UnavailableError(f"no Ray cluster answers: {error}", where=address, fix=fix) from error
    try:

        def run_all(worker: Worker, work: Sequence[Group]) -> list[list[VariantRow]]:
            task = ray.remote(num_cpus=1)(worker)
            try:
                return ray.get([task.remote(item) for item in work])
            except exceptions.RayTaskError:
                raise  # what the run itself raised
            except exceptions.OutOfMemoryError as error:
                raise shortage("a worker of Ray was killed:", address) from error
            except exceptions.RayError as error:
                fix = "give the same command again: finished runs are kept; `ray status` tells what is left"
                raise UnavailableError(f"a worker of Ray was lost: {error}", where=address, fix=fix) from error

        yield run_all
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself waits for minutes where nobody listens; an OSError says it at once."""
    host, found, port = address.rpartition("://")[2].rpartition(":")
    if found and port.isdecimal() and len(port) < 6 and int(port) < 1 << 16:
        socket.create_connection((host, int(port)), timeout=10).close()


def do_group(work: Group) -> list[VariantRow]:
    """Runs of one recipe; each later one begins with what the one before left."""
    variants, out, rest = work
    rows: list[VariantRow] = []
    for before, variant in zip([None, *variants], variants, strict=False):
        folder = Path(out) / variant.name
        if before is not None:
            share(Path(out) / before.name, folder)
        rows.append(do_variant(variant, Path(out), rest))
    return rows


def do_variant(variant: Variant, out: Path, rest: Sequence[str]) -> VariantRow:
    """Run one variant, or take it as an earlier sweep left it."""
    arguments = [*variant.arguments(out), "--no-bundle", "--shared-options", *rest]
    record = out / variant.name / DONE
    wanted = {"arguments": arguments, "code": code_digest()}
    found = _read(record)
    if found is not None and type(found.get("exit_code")) is int and {k: found.get(k) for k in wanted} == wanted:
        return _row(variant, out, found["exit_code"], "")
    process = subprocess.Popen(
        [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    watch = Watch(process.pid, f"the run of {variant.name}")
    try:
        while True:
            try:
                _, said = process.communicate(timeout=HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                watch.look()
    except BaseException:
        process.terminate()  # the run ends as on Ctrl-C and can be resumed
        process.wait()
        raise
    ended = killed("the run", process.returncode)
    if process.returncode == INTERRUPTED or isinstance(ended, InterruptedRun):
        raise KeyboardInterrupt
    if ended is not None or process.returncode < 0:  # the others may still fit, or run
        problem = ended.problem if ended is not None else f"the run died ({name_of(process.returncode)})"
        return _row(variant, out, OutOfMemoryError.exit_code if ended is not None else 1, problem)
    if process.returncode in (0, BudgetError.exit_code):
        write_text(record, json.dumps({**wanted, "exit_code": process.returncode}, indent=1))
        return _row(variant, out, process.returncode, "")
    return _row(variant, out, process.returncode, _last_words(said))


def _last_words(said: str) -> str:
    """The sentence behind the last "error: " that a run wrote; of a box of wrong usage, what stands in it."""
    _, found, words = said.rpartition("error: ")
    if found:
        return " ".join(words.split("\n")[0].split())
    boxed = [line.strip("│ ") for line in said.splitlines() if line.startswith("│")]
    return " ".join(" ".join(boxed).split()) or said.strip()[-200:]


def _read(path: Path) -> dict | None:
    try:
        return read_json(path)
    except InputError:
        return None


def code_digest() -> str:
    """Of this tool's version: another one's results are not taken over."""
    from importlib.metadata import version

    packages = ("bluelm-export", "torch", "onnx", "onnxruntime")
    return hashlib.sha256(repr([version(p) for p in packages]).encode()).hexdigest()[:16]


def share(source: Path, folder: Path) -> None:
    """Hard-link finished stages of a run into another that lacks them, with their records.

    Whether they fit is for the run itself to say: a stage whose input differs is done again, and replaced as
    a whole, so the other run's files do not change.
    """
    for name in SHARED:
        record, new_record = source / RECORDS / f"{name}.json", folder / RECORDS / f"{name}.json"
        if record.is_file() and not (folder / name).exists() and not new_record.exists():
            new_record.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(record, new_record)  # first: what a kill leaves behind it is known as ours
            shutil.copytree(source / name, folder / name, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _row(variant: Variant, out: Path, exit_code: int, problem: str) -> VariantRow:
    from eval.report import Report

    if problem:
        return VariantRow(variant.name, *asdict(variant).values(), exit_code=exit_code, problem=problem)
    report = Report.open(out / variant.name)
    size = _figure(report, "artifact_bytes", ("files",))
    alone = len(report.artifacts) == 1  # else this machine runs another artifact than the one that ships
    speed = _figure(report, "decode_tokens_per_s", ("soc", "host") if alone else ("soc",))
    kl = _figure(report, "mean_kl", ("npu", "cpu"))
    ratio = _figure(report, "perplexity_ratio", ("npu", "cpu"))
    return VariantRow(
        variant.name,
        *asdict(variant).values(),
        exit_code=exit_code,
        size_bytes=size and size.value,
        decode_tokens_s=speed and speed.value,
        how=f"{speed.how} on {speed.subject}" if speed else "",
        mean_kl=kl and kl.value,
        perplexity_ratio=ratio and ratio.value,
        emulated_by=kl.by if kl and kl.how == "emulated" else "",
    )


def _figure(report: Report, name: str, subjects: Sequence[str]):
    found = {m.subject: m for m in report.measurements if m.name == name}
    return next((found[s] for s in subjects if s in found), None)
