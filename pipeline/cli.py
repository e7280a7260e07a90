"""The command line: `bluelm-export --target snapdragon --out dist`, and commands on a finished run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.main import get_command

from bluelm.errors import InputError
from bluelm.system import interrupt
from bluelm.system.memory import is_shortage
from pipeline.commands import bisect as bisect_commands
from pipeline.commands import bundle as bundle_commands
from pipeline.commands import compare as compare_commands
from pipeline.commands import devices as device_commands
from pipeline.commands import doctor as target_commands
from pipeline.commands import evaluate, quantize, sweep
from pipeline.commands import history as history_commands
from pipeline.commands import report as report_commands
from pipeline.commands import speed as speed_commands
from pipeline.errors import INTERRUPTED, crash, leave, tell_shortage
from pipeline.options import options as o
from pipeline.options.bounds import hold_to_bounds
from pipeline.options.effects import given_options, refuse_if
from pipeline.options.recipe import number, recipe_values
from pipeline.terminal import console, say, show_warnings

if TYPE_CHECKING:
    from eval.tasks.tasks import TaskRequest

app = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 passed, 1 internal error, 2 bad input, 3 a budget failed, 4 the target cannot hold "
    "the model, 5 a device or SDK is missing, 6 interrupted (the same command resumes).",
)
# options that take several values behind one another: --calibration a.txt b.txt
LISTS = ("--calibration", "--eval", "--tasks", "--adapter")

RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run, e.g. dist/bluelm-demo-gptq-w4-g32-sm8650.")]


@app.callback()
def export(
    context: typer.Context,
    target: o.Target = None,
    soc: o.Soc = None,
    runtime: o.RuntimeName = None,
    out: o.Out = Path("dist"),
    name: o.Name = None,
    overwrite: o.Overwrite = False,
    model: o.Model = None,
    adapter: o.Adapter = None,
    context_length: o.ContextLength = 512,
    chunk: o.Chunk = 128,
    kv_bits: o.KvBits = None,
    activation_bits: o.ActivationBits = None,
    device_ram: o.DeviceRam = None,
    dry_run: o.DryRun = False,
    recipe: o.RecipeName = "w4-g32",
    method: o.Method = None,
    bits: o.Bits = None,
    size: o.Size = None,
    max_kl: o.MaxKl = None,
    group_size: o.GroupSize = None,
    symmetric: o.Symmetric = None,
    refine: o.Refine = None,
    rotate: o.Rotate = None,
    head_bits: o.HeadBits = None,
    embed_bits: o.EmbedBits = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    seed: o.Seed = None,
    eval_text: o.EvalText = None,
    eval_tokens: o.EvalTokens = 16384,
    npu_tokens: o.NpuTokens = 4096,
    budget: o.BudgetFile = None,
    device: o.Device = None,
    runner_config: o.RunnerConfig = None,
    allow_other_soc: o.AllowOtherSoc = False,
    history: o.HistoryFile = None,
    tasks: o.Tasks = None,
    task_data: o.TaskData = None,
    task_limit: o.TaskLimit = None,
    task_shots: o.TaskShots = None,
    run_code: o.RunCode = False,
    public_key: o.PublicKey = None,
    certificate_chain: o.CertificateChain = None,
    signed_at: o.SignedAt = None,
    stamp_authority: o.StampAuthority = None,
    require_signature: o.RequireSignature = False,
    bundle: o.Bundle = True,
    activations: o.Activations = None,
    max_memory: o.MaxMemory = None,
    quantize_on: o.QuantizeOn = "cpu",
    version: o.Version = False,
    shared_options: o.SharedOptions = False,
) -> None:
    """Quantize a BlueLM checkpoint, lower it to a phone, compile it, and judge the artifact itself.

    Everything goes into one folder below --out: the quantized checkpoint, the artifacts, report.json. What an
    earlier run with the same input finished is reused.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return

    def work() -> int:
        from bluelm.adapters import parse_adapter
        from compress.recipe import Recipe
        from pipeline.run.run import Request, run

        if target is None:
            raise InputError("no target is given", fix="add --target snapdragon, or see: bluelm-export targets")
        chosen = recipe_values(context.params)
        request = Request(
            target=target,
            soc=soc,
            runtime=runtime,
            model=model,
            out=out,
            name=name,
            overwrite=overwrite,
            recipe=Recipe.load(recipe, **chosen),
            calibration=tuple(calibration or ()),
            context=context_length,
            chunk=chunk,
            kv_bits=number(kv_bits),
            activation_bits=number(activation_bits),
            device_ram=device_ram,
            eval_texts=tuple(eval_text or ()),
            eval_tokens=eval_tokens,
            npu_tokens=npu_tokens,
            budget=budget,
            device=device,
            runner_config=runner_config,
            allow_other_soc=allow_other_soc,
            history=history,
            tasks=_task_request(tasks, task_data, task_limit, task_shots, run_code),
            public_key=public_key,
            certificate_chain=tuple(certificate_chain or ()),
            signed_at=signed_at,
            stamp_authority=tuple(stamp_authority or ()),
            require_signature=require_signature,
            bundle=bundle,
            adapters=tuple(map(parse_adapter, adapter or ())),
            chosen=frozenset(chosen),
            max_memory=max_memory,
            quantize_on=quantize_on,
            given=given_options(context),
            shared_options=shared_options,
        )
        return run(request, dry_run=dry_run, output=console(), messages=console(error=True))

    leave(work)


def _plan(context: typer.Context, **options: Any) -> None:
    """What a run would take, before it begins: memory, disk, time, size of the artifact; nothing is written.

    Takes the options of a run. The same as `--dry-run`; the run says afterwards how far off the plan was.
    """
    export(context, **{**options, "dry_run": True})


def _options_of(command: Callable[..., None], without: tuple[str, ...]) -> inspect.Signature:
    """A command's options, but for some."""
    whole = inspect.signature(command, eval_str=True)
    return whole.replace(parameters=[p for name, p in whole.parameters.items() if name not in without])


_plan.__signature__ = _options_of(export, ("dry_run", "version"))  # pyright: ignore[reportFunctionMemberAccess]
_plan.__annotations__ = {name: p.annotation for name, p in inspect.signature(_plan).parameters.items()}
app.command("plan")(_plan)


@app.command()
def generate(
    context: typer.Context,
    run: RunFolder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say to the model; - reads standard input.")],
    on: Annotated[
        Literal["cpu", "htp", "interpreter", "gpu", "ane"],
        typer.Option(
            help="cpu: ONNX Runtime. htp: the simulator of Snapdragon's NPU, seconds for each token. "
            "interpreter: of Core ML packages; on a Mac also gpu and ane."
        ),
    ] = "cpu",
    runner: Annotated[
        str | None,
        typer.Option(
            "--with",
            help="Answer through the program that users open it with, by its tokenizer and template, e.g. llama.cpp.",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed, for temperatures above 0.")] = 0,
) -> None:
    """Let a finished artifact answer a prompt; the text is streamed."""

    def work() -> int:
        from pipeline.commands.generate import answer, answer_through

        refuse_if(temperature == 0, context, "--seed", "the likeliest token is always taken", "add --temperature 0.7")
        refuse_if(runner is not None, context, "--on", "the runner runs on the CPU", "omit --on or --with")
        text = _standard_input() if prompt == "-" else prompt
        if runner is not None:
            answer_through(run, text, runner, chat=not raw, max_tokens=max_tokens, temperature=temperature, seed=seed)
            return 0
        answer(run, text, on=on, chat=not raw, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return 0

    leave(work)


@app.command()
def check(
    run: RunFolder,
    budget: Annotated[
        Path | None,
        typer.Option(help="YAML file of limits. Default: those that the run was judged by.", show_default=False),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="An earlier run or its report.json: a figure that is worse beyond its error fails.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the reports with this verdict into this folder.", show_default=False),
    ] = None,
) -> None:
    """Compare the figures of a finished run with a budget and an earlier run; nothing is built or run."""

    def work() -> int:
        from pipeline.commands.check import check as hold

        return hold(run, budget, baseline, report, console())

    leave(work)


@app.command()
def targets() -> None:
    """List the targets, and the runtimes and chips of each."""

    def work() -> int:
        from pipeline.commands.listing import show_targets

        show_targets(console())
        return 0

    leave(work)


for commands in (
    bisect_commands,
    bundle_commands,
    compare_commands,
    device_commands,
    evaluate,
    speed_commands,
    history_commands,
    quantize,
    report_commands,
    sweep,
    target_commands,
):
    commands.register(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    sys.excepthook = crash
    try:
        _run(arguments)
    except KeyboardInterrupt:  # before a command began, or behind its end
        say("\nerror: interrupted", error=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not is_shortage(error):
            raise
        sys.exit(tell_shortage(error))


def _run(arguments: Sequence[str] | None) -> NoReturn:
    show_warnings()
    interrupt.listen()  # CI cancels with SIGTERM: end as on Ctrl-C
    try:
        Path.cwd()
    except FileNotFoundError:  # libraries in C would end the process in words of their own
        say("\nerror: the folder that this was called in was removed\n  fix:   change into another one", error=True)
        sys.exit(InputError.exit_code)
    given = list(sys.argv[1:] if arguments is None else arguments)
    for argument in given:
        if not _is_text(argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            say(f"\nerror: not text in UTF-8: {shown}\n  fix:   write the argument in UTF-8", error=True)
            sys.exit(InputError.exit_code)
    try:
        sys.exit(hold_to_bounds(get_command(app))(spread_lists(given), prog_name="bluelm-export"))
    except SystemExit as leaving:  # 130: typer's own answer to Ctrl-C before a command begins
        sys.exit(INTERRUPTED if leaving.code == 130 else leaving.code)


def _is_text(argument: str) -> bool:
    """Whether it can be written: bytes that are not UTF-8 come as lone surrogates (PEP 383)."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def spread_lists(arguments: Sequence[str]) -> list[str]:
    """Repeat an option before each of its values: `--eval a b` becomes `--eval a --eval b`."""
    spread: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument in LISTS:
            option = argument
        elif argument.startswith("-") and argument != "-":
            option = None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _task_request(
    names: Sequence[str] | None, data: Path | None, limit: int | None, shots: int | None, run_code: bool
) -> TaskRequest | None:
    """What the options on tasks ask for.

    Raises:
        InputError: options on tasks, but no tasks.
    """
    from eval.tasks.tasks import TaskRequest

    if names:
        return TaskRequest(tuple(dict.fromkeys(names)), data, limit, shots, run_code)
    if data is not None or limit is not None or shots is not None or run_code:
        raise InputError("no tasks are named", fix="add --tasks NAME, e.g. --tasks gsm8k")
    return None


def _refuse_options_before(context: typer.Context) -> None:
    """`bluelm-export --bits 4 generate …` would silently drop --bits."""
    given = given_options(context)
    if given:
        command = context.invoked_subcommand
        say(f"error: {', '.join(sorted(given))} cannot stand before the command {command}", error=True)
        raise typer.Exit(InputError.exit_code)


def _standard_input() -> str:
    """All of it, as text; the locale's own encoding does not count."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fix = "convert it, for example: iconv -f gb18030 -t utf-8"
        raise InputError(f"not text in UTF-8 (byte {error.start})", where="standard input", fix=fix) from None


if __name__ == "__main__":
    main()
