"""Pre-tokenizers of a byte-level tokenizer.json, rewritten as onnxruntime-genai applies them.

Of a sequence it applies only the parts that split by a pattern; a last ByteLevel part counts only where it is alone.
So single digits, and ByteLevel's own pattern, are written as such parts.
"""

from __future__ import annotations

from typing import Any

from bluelm.errors import TargetError

DIGIT = r"\p{N}"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's, which ByteLevel cuts by (openai/gpt-2, encoder.py)."""


def respelled(cuts: Any) -> dict[str, Any] | None:
    """A `pre_tokenizer` that cuts as `cuts` does, and that genai follows; None where it follows `cuts` as it is.

    Raises:
        TargetError: it has no words for a part.
    """
    if not isinstance(cuts, dict) or cuts.get("type") != "Sequence":
        return None
    parts = [new for part in cuts.get("pretokenizers", ()) for new in _part(part)]
    return None if parts == cuts["pretokenizers"] else {**cuts, "pretokenizers": parts}


def _part(part: dict[str, Any]) -> list[dict[str, Any]]:
    match part:
        case {"type": "Split", "pattern": {"Regex": _}, "behavior": "Isolated", "invert": False}:
            return [part]
        case {"type": "Digits", "individual_digits": True}:
            return [_split(DIGIT)]
        case {"type": "ByteLevel", "use_regex": True}:
            return [_split(WORDS), {**part, "use_regex": False}]
        case {"type": "ByteLevel"}:
            return [part]
        case _:
            kind = part.get("type") if isinstance(part, dict) else part
            raise TargetError(
                f"onnxruntime-genai cuts no text as the tokenizer's {kind} does", fix="use the runtime onnx-cpu"
            )


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
