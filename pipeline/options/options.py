"""The options of the main command, each with its help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from compress import methods
from pipeline.terminal import say

WHERE, QUANTIZE, TEXT, JUDGE = "What and where", "Quantization", "Calibration text", "Judging"
TASKS = "Tasks (extra `tasks`)"
TRUST = "Where the checkpoint comes from, what leaves"


def _print_version(wanted: bool) -> None:
    if wanted:
        from bluelm.system import version

        say(f"{version.NAME} {version.told()}")
        raise typer.Exit


def _method_name(text: str) -> str:
    if text not in methods.names():
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, methods.names()))}.")
    return text


Target = Annotated[
    str | None,
    typer.Option(help="What to build for, e.g. snapdragon; `bluelm-export targets` lists them.", rich_help_panel=WHERE),
]
Soc = Annotated[
    str | None,
    typer.Option(
        help="The phone's chip, e.g. sm8650 (Snapdragon 8 Gen 3). Default: the target's own.",
        rich_help_panel=WHERE,
    ),
]
RuntimeName = Annotated[
    str | None,
    typer.Option(
        help="The runtime on the phone. Default: the first that `bluelm-export targets` lists.",
        rich_help_panel=WHERE,
    ),
]
Out = Annotated[
    Path,
    typer.Option(help="Folder in which the run's folder is created.", rich_help_panel=WHERE, file_okay=False),
]
Name = Annotated[
    str | None,
    typer.Option(help="Name of the run's folder. Default: made of model, recipe and chip.", rich_help_panel=WHERE),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace a run's folder that was made with other settings.",
        rich_help_panel=WHERE,
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        help="Hugging Face folder of a BlueLM or Llama checkpoint, float or quantized (GPTQ, AWQ, compressed-tensors: "
        "its codes are kept). Default: the small BlueLM that ships with the tool.",
        rich_help_panel=WHERE,
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        help="PEFT folder of a LoRA or QLoRA adapter, merged into the checkpoint first; several may follow, each with "
        "a weight behind a colon (style:0.5).",
        rich_help_panel=WHERE,
    ),
]
ContextLength = Annotated[
    int,
    typer.Option(
        "--context",
        help="Tokens that the KV cache holds: prompt and answer together.",
        min=2,
        rich_help_panel=WHERE,
    ),
]
Chunk = Annotated[
    int,
    typer.Option(help="Tokens of a prompt that one prefill step takes.", min=1, rich_help_panel=WHERE),
]
KvBits = Annotated[
    Literal["8", "16", "32"] | None,
    typer.Option(
        help="Bits of a value in the KV cache, if the runtime supports several.",
        rich_help_panel=WHERE,
        show_default="the runtime's",
    ),
]
ActivationBits = Annotated[
    Literal["8", "16", "32"] | None,
    typer.Option(
        help="Width of an NPU's activations, whose ranges are calibrated. 8 loses far more; masked scores and "
        "shares stay at 16. For Core ML: 16- or 32-bit floats; 32 does not run on the Neural Engine.",
        show_default="16",
        rich_help_panel=WHERE,
    ),
]
DeviceRam = Annotated[
    float | None,
    typer.Option(
        help="RAM of the phones that it must run on, in GB (4, 6, 8 …); refused at once if it cannot fit.",
        min=0.25,
        rich_help_panel=WHERE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check all input, print the plan, write nothing.", rich_help_panel=WHERE),
]

SharedOptions = Annotated[
    bool, typer.Option("--shared-options", hidden=True, help="Of many runs: warn about options without effect.")
]
Version = Annotated[
    bool,
    typer.Option("--version", help="Print version and commit, and exit.", is_eager=True, callback=_print_version),
]

RecipeName = Annotated[
    str,
    typer.Option(help="Preset or YAML file; the options below override it.", rich_help_panel=QUANTIZE),
]
Method = Annotated[
    str | None,
    typer.Option(
        help=methods.help_text(),
        parser=_method_name,
        metavar=f"<{'|'.join(methods.names())}>",
        rich_help_panel=QUANTIZE,
    ),
]
Bits = Annotated[
    Literal["4", "8", "auto"] | None,
    typer.Option(
        help="Width of the blocks' weights. auto: 4 or 8 bits, and groups, for each linear and the head by what it "
        "loses on calibration text.",
        rich_help_panel=QUANTIZE,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="With --bits auto: bytes that the quantized weights may take, e.g. 4.2GB.",
        show_default="what the recipe's own widths would take",
        rich_help_panel=QUANTIZE,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="With --bits auto, instead of --size: as small as possible within this estimated KL, in nats a token.",
        rich_help_panel=QUANTIZE,
    ),
]
GroupSize = Annotated[
    Literal["32", "64", "128", "-1"] | None,
    typer.Option(help="Weights that share a scale; -1: one scale a row.", rich_help_panel=QUANTIZE),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Zero point fixed in the middle, or one for each group.",
        rich_help_panel=QUANTIZE,
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        help="Steps of learned rounding per block, after a method that reads text; 200 lower the loss by 6 to 8 % and "
        "take five to seven times as long.",
        min=0,
        show_default="the recipe's: 0",
        rich_help_panel=QUANTIZE,
    ),
]
Rotate = Annotated[
    bool | None,
    typer.Option(
        "--rotate/--no-rotate",
        help="Fold Hadamard rotations into the weights: spreads outliers, free at run time.",
        show_default="the recipe's: all presets do",
        rich_help_panel=QUANTIZE,
    ),
]
HeadBits = Annotated[Literal["4", "8"] | None, typer.Option(help="Width of the output head.", rich_help_panel=QUANTIZE)]
EmbedBits = Annotated[
    Literal["4", "8"] | None, typer.Option(help="Width of the token embedding.", rich_help_panel=QUANTIZE)
]

Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        help=".txt, .jsonl (text, prompt/response, messages) or .parquet files; several may follow. "
        "Default: a bundled set in Chinese and English, as far as they are the model's languages.",
        rich_help_panel=TEXT,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        help="Number of windows of calibration text.", min=1, show_default="the recipe's", rich_help_panel=TEXT
    ),
]
Length = Annotated[
    int | None,
    typer.Option(help="Tokens per window.", min=2, show_default="the recipe's", rich_help_panel=TEXT),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed that chooses the windows. The same seed gives the same bytes.",
        min=0,
        show_default="the recipe's",
        rich_help_panel=TEXT,
    ),
]

Activations = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="How activations of the calibration text are kept between blocks; bfloat16 takes half the space.",
        show_default="the recipe's: float32",
        rich_help_panel=QUANTIZE,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory that the run may take, e.g. 8GB: activations of the calibration text go to disk where RAM is too "
        "small for them, and what cannot fit is refused before it begins.",
        metavar="SIZE",
        show_default="what is free",
        rich_help_panel=QUANTIZE,
    ),
]

QuantizeOn = Annotated[
    str,
    typer.Option(
        help="Where quantizing computes: cpu, cuda, or cuda:1 for one GPU of several.",
        metavar="DEVICE",
        rich_help_panel=QUANTIZE,
    ),
]

EvalText = Annotated[
    list[Path] | None,
    typer.Option(
        "--eval",
        metavar="PATH",
        help="Text to judge on, in the formats of --calibration. Default: a bundled held-out set, as far as it is in "
        "the model's languages.",
        rich_help_panel=JUDGE,
    ),
]
EvalTokens = Annotated[
    int,
    typer.Option(help="Tokens of text that the CPU artifact is judged on.", min=256, rich_help_panel=JUDGE),
]
NpuTokens = Annotated[
    int,
    typer.Option(
        help="Of these, tokens that the NPU artifact is judged on; its simulator takes seconds for 128.",
        min=256,
        rich_help_panel=JUDGE,
    ),
]
BudgetFile = Annotated[
    Path | None,
    typer.Option("--budget", help="YAML file of limits. Default: a bundled one.", rich_help_panel=JUDGE),
]

Device = Annotated[
    str | None,
    typer.Option(
        help="Serial of a connected phone to measure the speed on; `bluelm-export devices` lists them.",
        rich_help_panel=JUDGE,
    ),
]
RunnerConfig = Annotated[
    Path | None,
    typer.Option(
        "--runner-config",
        help="YAML file with the paths of the runtime's own program for the phone (docs/speed.md).",
        rich_help_panel=JUDGE,
    ),
]
AllowOtherSoc = Annotated[
    bool,
    typer.Option(
        "--allow-other-soc",
        help="Measure on a phone with another chip than the target's; the report says so.",
        rich_help_panel=JUDGE,
    ),
]
HistoryFile = Annotated[
    Path | None,
    typer.Option(
        "--history",
        help="SQLite file that the run's figures are appended to. Default: in the user's data folder.",
        rich_help_panel=JUDGE,
    ),
]

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAME",
        help="Tasks of lm-evaluation-harness by its names, for the float model and the artifact: cmmlu, "
        "ceval-valid, mmlu, gsm8k, humaneval ...; several may follow.",
        rich_help_panel=TASKS,
    ),
]
TaskData = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the tasks' data, in their original layouts. Default: the Hugging Face hub.",
        rich_help_panel=TASKS,
    ),
]
TaskLimit = Annotated[
    int | None,
    typer.Option(help="Ask only this many questions of each task, the first ones.", min=1, rich_help_panel=TASKS),
]
TaskShots = Annotated[
    int | None,
    typer.Option(
        help="Examples shown before each question.", min=0, show_default="the task's own", rich_help_panel=TASKS
    ),
]
RunCode = Annotated[
    bool,
    typer.Option(
        "--run-code",
        help="Let humaneval run the programs that the model writes: in a process with limits on time and memory, but "
        "with your network.",
        rich_help_panel=TASKS,
    ),
]

PublicKey = Annotated[
    Path | None,
    typer.Option(help="Check the signature (model.sig) of checkpoint and adapters by this key.", rich_help_panel=TRUST),
]
CertificateChain = Annotated[
    list[Path] | None,
    typer.Option(help="... or by certificates of this authority (PEM).", rich_help_panel=TRUST),
]
RequireSignature = Annotated[
    bool,
    typer.Option(
        "--require-signature", help="Refuse a checkpoint or adapter without a valid signature.", rich_help_panel=TRUST
    ),
]
SignedAt = Annotated[
    str | None,
    typer.Option(
        metavar="YYYY-MM-DD",
        help="Day on which the signer's certificate must have been valid, or a time stamp of the signature file"
        " (RFC 3161). Default: today.",
        rich_help_panel=TRUST,
        show_default=False,
    ),
]
StampAuthority = Annotated[
    list[Path] | None,
    typer.Option(
        help="PEM certificates of the authority that made the time stamp.", rich_help_panel=TRUST, show_default=False
    ),
]
Bundle = Annotated[
    bool,
    typer.Option(
        help="Make a signed bundle when the run passes; `bluelm-export bundle` takes more options.",
        rich_help_panel=TRUST,
    ),
]
