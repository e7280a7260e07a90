"""The runtimes' own benchmark programs on a device: what to push, how to call them, how to read their output."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bluelm.errors import InputError, UnavailableError
from bluelm.system.reading import parse_json
from bluelm.system.yamlfiles import read_yaml

DEFAULTS = Path(__file__).parents[1] / "data" / "device_programs.yaml"
Says = Literal["onnxruntime_perf_test", "llama_main", "benchmark_model"]


@dataclass(frozen=True)
class Figures:
    """What one call of a program reported; None where it does not report it. Rates in tokens/s, memory in bytes."""

    prefill_tokens_s: float | None = None
    first_token_s: float | None = None
    decode_tokens_s: float | None = None
    peak_bytes: float | None = None


class DeviceProgram(BaseModel):
    """How to call one runtime's program.

    In `prefill`, `decode` and `environment` these names stand for remote paths or numbers: {folder} {binary}
    {model} {tokenizer} {prompt} {decode_tokens}. An empty `prefill`: the decode call tells both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    says: Says
    binary: Path | None = None
    bundle: str = ""  # on Apple's devices: the app's identifier, in place of the binary
    libraries: tuple[Path, ...] = ()
    remote_folder: str = "/data/local/tmp/bluelm-export"
    environment: Mapping[str, str] = {}
    prefill: str = ""
    decode: str = ""
    silence_limit_s: float = 600
    where_to_get_it: str = ""

    def files(self) -> list[Path]:
        """Local files of the program.

        Raises:
            UnavailableError: not configured, or not there.
        """
        if self.bundle:
            return []
        if self.binary is None:
            fix = f"give its path in --runner-config; {self.where_to_get_it}"
            raise UnavailableError(f"no arm64 build of {self.says} is configured", fix=fix)
        for path in (self.binary, *self.libraries):
            if not path.is_file():
                raise UnavailableError("the program's file does not exist", where=path, fix="correct its path")
        return [self.binary, *self.libraries]


def load_program(name: str, path: Path | None = None) -> DeviceProgram:
    """The benchmark program of a runtime, defaults first, then the user's file of the same layout.

    Raises:
        InputError: unknown runtime, not YAML, an unknown key.
    """
    content = _read(DEFAULTS)
    own = _read(path) if path else {}
    if name not in content:
        raise InputError(f"no benchmark program is known for {name!r}", fix=f"known: {', '.join(content)}")
    try:
        return DeviceProgram.model_validate({**content[name], **own.get(name, {})})
    except (ValidationError, TypeError) as error:
        raise InputError(f"the program's configuration is wrong: {error}", where=path, fix="correct it") from error


def _read(path: Path) -> dict:
    content = read_yaml(path, "the program's configuration")
    if not isinstance(content, dict):
        raise InputError("the program's configuration is not a table by runtime", where=path, fix="correct it")
    return content


def read_figures(program: DeviceProgram, phase: Literal["prefill", "decode"], text: str, tokens: int) -> Figures:
    """What the program said, as figures; `tokens` is how many one of its steps handled.

    Raises:
        UnavailableError: it did not say what it should have: no figure, never a guess.
    """
    figures = _READERS[program.says](text, phase, tokens)
    rates = (figures.prefill_tokens_s, figures.decode_tokens_s)
    if not any(rate is not None and 0 < rate < 1e6 for rate in rates):
        tail = "".join(c if c.isprintable() or c == "\n" else "?" for c in text[-300:]).strip() or "nothing"
        raise UnavailableError(f"{program.says} gave no speed; it said: {tail}", fix="run it by hand on the device")
    return figures


def in_turn(parts: Sequence[Figures]) -> Figures:
    """Figures of a model whose parts run one behind the other: seconds a token add up.

    Memory is not told: each part was in memory alone.
    """
    if len(parts) == 1:
        return parts[0]

    def rate(rates: list[float | None]) -> float | None:
        told = [value for value in rates if value]
        return 1 / sum(1 / value for value in told) if len(told) == len(parts) else None

    firsts = [part.first_token_s for part in parts if part.first_token_s is not None]
    return Figures(
        prefill_tokens_s=rate([part.prefill_tokens_s for part in parts]),
        first_token_s=sum(firsts) if len(firsts) == len(parts) else None,
        decode_tokens_s=rate([part.decode_tokens_s for part in parts]),
    )


def _seconds(value: float, phase: str, tokens: int, peak: float | None) -> Figures:
    if value <= 0:
        return Figures()
    if phase == "prefill":
        return Figures(prefill_tokens_s=tokens / value, first_token_s=value, peak_bytes=peak)
    return Figures(decode_tokens_s=tokens / value, peak_bytes=peak)


def _number(pattern: str, text: str) -> float | None:
    found = re.search(pattern + r"\s*([\d.]+(?:[eE][-+]?\d+)?)", text)
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None


def _perf_test(text: str, phase: str, tokens: int) -> Figures:
    """ONNX Runtime's onnxruntime_perf_test: seconds of one inference, bytes of the peak working set."""
    median = _number(r"P50 Latency:", text)
    average = _number(r"Average inference time cost:", text)
    seconds = median if median is not None else (average or 0) / 1000
    return _seconds(seconds, phase, tokens, _number(r"Peak working set size:", text))


def _benchmark_model(text: str, phase: str, tokens: int) -> Figures:
    """LiteRT's benchmark_model: microseconds of one inference, MB of the peak footprint."""
    average = _number(r"Inference \(avg\):", text)
    peak = _number(r"[Oo]verall peak memory footprint \(MB\)[^:]*:", text)
    if peak is None:
        peak = _number(r"Memory footprint delta.*overall=", text)
    return _seconds((average or 0) / 1e6, phase, tokens, peak * 2**20 if peak is not None else None)


def _llama_main(text: str, phase: str, tokens: int) -> Figures:
    """ExecuTorch's llama_main: one JSON line of milliseconds behind "PyTorchObserver"; RSS in MiB."""
    lines = re.findall(r"PyTorchObserver (\{.*\})", text)
    try:
        told = parse_json(lines[-1], "what the program said")
        unit = float(told.get("SCALING_FACTOR_UNITS_PER_SECOND", 1000))
        start, prompt_end, end, first = (
            float(told[k]) / unit
            for k in ("inference_start_ms", "prompt_eval_end_ms", "inference_end_ms", "first_token_ms")
        )
        prompt, generated = float(told["prompt_tokens"]), float(told["generated_tokens"])
    except (InputError, IndexError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return Figures()
    if not start < prompt_end < end:
        return Figures()
    rss = _number(r"RSS after finishing text generation:", text)
    return Figures(
        prefill_tokens_s=prompt / (prompt_end - start),
        first_token_s=first - start,
        decode_tokens_s=generated / (end - prompt_end),
        peak_bytes=rss * 2**20 if rss else None,
    )


_READERS: Mapping[Says, Callable[[str, str, int], Figures]] = {
    "onnxruntime_perf_test": _perf_test,
    "benchmark_model": _benchmark_model,
    "llama_main": _llama_main,
}
