"""Chat templates of the field's other models, and tokens that a checkpoint's class adds without saying so in a file.

BlueLM's own template is in `bluelm/text/tokenizer.py`. Contents are data here too: a mark in a user's text is spelled
out and ends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from bluelm.text.added_tokens import AddedToken

# THUDM's ChatGLMTokenizer puts these behind the pieces of tokenizer.model, in this order (tokenization_chatglm.py)
CHATGLM_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip


class Pieces(Protocol):
    """What a template asks of a tokenizer's pieces."""

    def id(self, text: str) -> int | None: ...
    def encode(self, text: str, trusted: bool, behind_mark: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Turn:
    """One role: `mark` (trusted), then `lead` and the content (data), then `end` (trusted)."""

    mark: str
    lead: str = ""
    end: str = ""


@dataclass(frozen=True)
class Template:
    """A chat as tokens.

    Attributes:
        begin: trusted text in front of everything.
        turns: by role.
        answer: trusted text behind which the model answers.
        apart: lead and content are encoded each on its own, as ChatGLM does, not as one text.
        system: what a chat without a system message begins with; None for nothing.
    """

    begin: str
    turns: Mapping[str, Turn]
    answer: str
    apart: bool = False
    system: str | None = None

    def encode(self, pieces: Pieces, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, content) pairs, ending so that the model answers, or behind a last answer."""
        if self.system is not None and messages[0][0] != "system":
            messages = [("system", self.system), *messages]
        tokens = pieces.encode(self.begin, trusted=True) if self.begin else []
        for role, content in messages:
            turn = self.turns[role]
            tokens += pieces.encode(turn.mark, trusted=True)
            texts = [turn.lead, content] if self.apart else [turn.lead + content]
            for text in texts:
                tokens += pieces.encode(text, trusted=False, behind_mark=not self.apart)
            tokens += pieces.encode(turn.end, trusted=True, behind_mark=True) if turn.end else []
        if messages[-1][0] != "assistant":
            tokens += pieces.encode(self.answer, trusted=True)
        return tokens


def _same(mark: str, lead: str, end: str, roles: Sequence[str]) -> Mapping[str, Turn]:
    """Turns that differ in the role's name alone."""
    return MappingProxyType({role: Turn(mark, lead.format(role=role), end) for role in roles})


CHATML = Template(  # Qwen2
    "", _same("<|im_start|>", "{role}\n", "<|im_end|>\n", ("system", "user", "assistant")),
    "<|im_start|>assistant\n", system="You are a helpful assistant.",
)  # fmt: skip
LLAMA3 = Template(
    "<|begin_of_text|>",
    MappingProxyType({
        role: Turn(f"<|start_header_id|>{role}<|end_header_id|>", "\n\n", "<|eot_id|>")
        for role in ("system", "user", "assistant")
    }),
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)  # fmt: skip
BAICHUAN2 = Template(
    "",
    MappingProxyType({"system": Turn(""), "user": Turn("<reserved_106>"), "assistant": Turn("<reserved_107>")}),
    "<reserved_107>",
)
CHATGLM3 = Template(
    "[gMASK]sop",
    MappingProxyType({role: Turn(f"<|{role}|>", "\n") for role in ("system", "user", "assistant", "observation")}),
    "<|assistant|>",
    apart=True,
)
# the token that tells a template, in the order in which they are looked for
TOLD_BY = {
    "<|start_header_id|>": LLAMA3, "<|im_start|>": CHATML, "<reserved_106>": BAICHUAN2, "<|assistant|>": CHATGLM3,
}  # fmt: skip


def find_template(pieces: Pieces, blue: bool) -> Template | None:
    """The template that the tokenizer's own tokens tell; None for BlueLM's, and where none is told."""
    if blue:
        return None
    return next((template for token, template in TOLD_BY.items() if pieces.id(token) is not None), None)


def chatglm_tokens(pieces: int, added: Sequence[AddedToken]) -> list[AddedToken]:
    """The tokens that ChatGLM's class adds behind `pieces` pieces, where the folder's files do not name them."""
    known = {token.text for token in added}
    return [AddedToken(text, pieces + index) for index, text in enumerate(CHATGLM_TOKENS) if text not in known]
