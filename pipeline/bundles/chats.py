"""What a bundle's manifest says of tokens and chats, and whether an app can chat as the model does."""

from __future__ import annotations

from bluelm.errors import TargetError
from bluelm.text.sentencepieces import SentencePieces
from bluelm.text.tokenizer import NO_TEMPLATE, Tokenizer
from bluelm.text.turns import turns_of
from export.artifacts.artifact import Artifact
from export.bundle.manifest import ChatNote, TokenizerNote
from export.bundle.project import RuntimeFacts
from export.tokenizer.table import ROLE
from targets.host.generation import ends

_FIX = "use --format folder: all but the app"


def tokenizer_note(artifact: Artifact) -> TokenizerNote:
    """Which files, which template; ids from the tokenizer, the end tokens from the model's config."""
    tokenizer = Tokenizer.from_folder(artifact.folder)
    ended = tuple(sorted(ends(tokenizer, artifact)))
    chat, why = None, NO_TEMPLATE
    try:
        chat, why = chat_note(tokenizer, ended), ""
    except TargetError as error:
        why = error.problem
    return TokenizerNote(
        files=tuple(f"artifact/{f.path}" for f in artifact.files if f.role in ("tokenizer", ROLE)),
        kind="sentencepiece" if isinstance(tokenizer.pieces, SentencePieces) else "tokenizer.json",
        template=None if tokenizer.template is None else tokenizer.template.select(),
        template_note=NO_TEMPLATE if tokenizer.template is None else "",
        chat=chat,
        chat_note=why,
        marks=tokenizer.pieces.special(),
        front=tokenizer.front,
        bos_token_id=tokenizer.bos,
        eos_token_ids=ended,
        pad_token_id=tokenizer.pad,
        vocab_size=artifact.model.vocab_size,
    )


def chat_note(tokenizer: Tokenizer, ended: tuple[int, ...]) -> ChatNote:
    """Chats for apps without Jinja.

    Args:
        ended: tokens that end an answer.

    Raises:
        TargetError: there are none; says why.
    """
    if tokenizer.template is None:
        raise TargetError(f"the app chats by the model's template, and {NO_TEMPLATE}", where=tokenizer.source, fix=_FIX)
    turns = turns_of(tokenizer.template)
    texts = (tokenizer.pieces.text(token) for token in ended)
    return ChatNote(
        first=turns.first,
        answer=turns.answer,
        next=turns.next,
        ends=tuple(text for text in texts if text),
    )


def check_app(tokenizer: Tokenizer, facts: RuntimeFacts) -> None:
    """Make sure that the app around a runtime can chat as the model does.

    Raises:
        TargetError: it cannot.
    """
    if facts.chats == "text" or tokenizer.template is None:
        chat_note(tokenizer, ())
    if facts.chats != "loop":
        return
    if not isinstance(tokenizer.pieces, SentencePieces):
        why = f"the app reads tokenizer.model, and this model's tokenizer is {tokenizer.source.name}"
    elif tokenizer.template is None or not tokenizer.template.bluelm:
        why = "the app's chats have BlueLM's template, and this model's have another"
    elif tokenizer.front != (tokenizer.bos,):
        why = "the app begins chats with bos, and this model's tokenizer begins texts otherwise"
    else:
        return
    raise TargetError(why, where=tokenizer.source, fix=_FIX)
