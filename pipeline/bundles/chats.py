"""What a bundle's manifest says of tokens and chats, and whether an app can chat as the model does."""

from __future__ import annotations

from pathlib import Path

from bluelm.errors import TargetError
from bluelm.system.reading import MOST_TABLE_BYTES, read_json
from bluelm.text.added_tokens import optional_json
from bluelm.text.sentencepieces import USER_DEFINED, SentencePieces, read_model
from bluelm.text.tokenizer import NO_TEMPLATE, Tokenizer
from bluelm.text.turns import turns_of
from export.artifacts.artifact import Artifact
from export.bundle.byte_pairs import unread
from export.bundle.manifest import ChatNote, Format, TokenizerNote
from export.bundle.project import RuntimeFacts
from export.tokenizer.table import ROLE, check_pieces
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


def check_app(tokenizer: Tokenizer, facts: RuntimeFacts, format_: Format) -> None:
    """Make sure that the app around a runtime can chat as the model does.

    Raises:
        TargetError: it cannot; says why.
    """
    if facts.chats != "messages" or tokenizer.template is None:
        chat_note(tokenizer, ())
    if facts.chats == "loop":
        why = _unread(tokenizer, format_)
        if why is not None:
            raise TargetError(why, where=tokenizer.source, fix=_FIX)


def _unread(tokenizer: Tokenizer, format_: Format) -> str | None:
    """Why the app's own tokenizer cannot read text as the model's does; None where it can."""
    pieces, template = tokenizer.pieces, tokenizer.template
    if format_ == "xcode":
        if not isinstance(pieces, SentencePieces):
            return f"the Swift app reads tokenizer.model, and this model's tokenizer is {tokenizer.source.name}"
        if template is None or not template.bluelm or tokenizer.front != (tokenizer.bos,):
            return "the Swift app's own loop has BlueLM's template, and this model's chats have another"
    if isinstance(pieces, SentencePieces):
        check_pieces(tokenizer.source)
        return _unread_model(tokenizer.source, pieces)
    return unread(read_json(tokenizer.source, MOST_TABLE_BYTES))


def _unread_model(path: Path, pieces: SentencePieces) -> str | None:
    """The same, of a tokenizer.model of BPE pieces."""
    proto = read_model(path)
    spec = proto.normalizer_spec
    own = {piece.piece for piece in proto.pieces if piece.type == USER_DEFINED}
    if pieces.added():
        return "the app reads tokenizer.model alone, and this model adds tokens to it"
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        return "the app's own tokenizer does not change text as this tokenizer.model does"
    if spec.add_dummy_prefix and optional_json(path.parent, "tokenizer_config.json").get("legacy") is False:
        return "the app's own tokenizer begins a text again behind a mark, and this model's does not"
    if own - set(pieces.special()):
        return f"the app's own tokenizer does not find {min(own - set(pieces.special()))!r} in a text"
    return None
