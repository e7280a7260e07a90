"""A chat of questions and answers as three texts, for programs that have no Jinja: `turns_of(template)`.

    first question answer [answer's text] next question answer [answer's text] next question answer …

They are read off the rendered template, and held against it on chats of one to four questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bluelm.errors import InputError, TargetError
from bluelm.text.templates import ChatTemplate

_QUESTIONS = ("qzx1", "qzx2")  # words that stand in no template
_ANSWER = "azx1"
_FIX = "use --format folder: all but the app"
_CHATS = (
    ("Hello.",),
    ("你好，世界", "Hi!", "1 + 2 = 3\n\nand {{ braces }}"),
    ("a", "b", "c", "d", "e"),
    ("def f(x):\n    return x", "It's <b>fine</b> & 'done'.", "🦄", "An answer: [1, 2]", "/think?", "No.", "Why"),
)
"""Questions and answers by turns. Blanks around them are left out: many templates take them off."""


@dataclass(frozen=True)
class Turns:
    """What stands between the texts of a chat.

    Attributes:
        first: in front of the first question. answer: behind a question, so that the model answers.
        next: between an answer, without its end token, and the next question.
    """

    first: str
    answer: str
    next: str

    def text(self, said: Sequence[str]) -> str:
        """A chat that ends so that the model answers; questions and answers by turns."""
        out = self.first
        for index, one in enumerate(said):
            out += one + (self.next if index % 2 else self.answer)
        return out


def turns_of(template: ChatTemplate) -> Turns:
    """The three texts of a template.

    Raises:
        TargetError: its chats are no such sequence, or it takes none of questions and answers; says why.
    """
    question, again = _QUESTIONS
    rendered = _render(template, (question, _ANSWER, again))
    cuts = [rendered.find(word) for word in (question, _ANSWER, again)]
    if -1 in cuts or cuts != sorted(cuts) or any(rendered.count(word) != 1 for word in (question, _ANSWER, again)):
        raise _refused(template, "it leaves out or repeats what was said before")
    ends = [cut + len(word) for cut, word in zip(cuts, (question, _ANSWER, again), strict=True)]
    found = Turns(rendered[: cuts[0]], rendered[ends[2] :], rendered[ends[1] : cuts[2]])
    before = rendered[ends[0] : cuts[1]]
    if before != found.answer:
        raise _refused(template, f"it has {before!r} in front of an answer, and {found.answer!r} where one begins")
    for said in _CHATS:
        if _render(template, said) != found.text(said):
            raise _refused(template, f"a chat of {len(said)} turns has other texts between them than one of 3")
    return found


def _render(template: ChatTemplate, said: Sequence[str]) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(said)]
    try:
        return template.render(messages, add_generation_prompt=True)
    except InputError as error:
        raise _refused(template, error.problem) from None


def _refused(template: ChatTemplate, why: str) -> TargetError:
    problem = f"the app cannot write chats as this model's template does: {why}"
    return TargetError(problem, where=template.where, fix=_FIX)
