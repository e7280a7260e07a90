"""Encodes and decodes text with sentencepiece, directly from tokenizer.model."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from bluelm.errors import InputError
from bluelm.system.reading import MOST_TABLE_BYTES, read_bytes
from bluelm.text.added_tokens import AddedToken, splitter, token_text
from bluelm.text.guard import Part

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
SPACE = "▁"  # sentencepiece's stand-in for a space
MARK = re.compile(r"\[\|[^\[\]|]+\|\]:?|<\|[^<>|]+\|>|\[SE[HA]\]")  # [|Human|]:  <|end|>  [SEH]
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type


class SentencePieces:
    """The pieces of a SentencePiece model, and the tokens added to it.

    Text is either trusted, then marks in it (`[|Human|]:` as a piece or an added token, `</s>`) become their
    token, or it is data, then they are spelled out in ordinary pieces.
    """

    def __init__(self, path: Path, added: Sequence[AddedToken] = (), legacy: bool = True,
                 named: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        """Read `path`.

        Args:
            added: tokens on top of the model's pieces.
            legacy: text behind an added token gets the dummy prefix too, as in the first Llama tokenizer.
            named: tokenizer_config.json, whose bos_token, eos_token and pad_token stand before the model's own.

        Raises:
            InputError: not a SentencePiece model, or an added token takes the id of another piece.
        """
        self._proto = ModelProto()
        try:
            self._proto.ParseFromString(read_bytes(path, MOST_TABLE_BYTES))
            texts = [self._proto.trainer_spec.unk_surface, *(piece.piece for piece in self._proto.pieces)]
            if not all(isinstance(text, str) for text in texts):  # protobuf hands out broken UTF-8 as bytes
                raise ValueError("a piece is not UTF-8")
            processor = self._processor(True, True)
            self._bytes = _surface(self._proto, added)
        except (DecodeError, RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"not a SentencePiece model: {reason}", where=path, fix="fetch tokenizer.model again"
            ) from None
        pieces = self._proto.pieces
        for token in added:
            if token.id < len(pieces) and pieces[token.id].piece != token.text:
                taken = pieces[token.id].piece
                raise InputError(
                    f"added token {token.text!r} takes the id {token.id} of the piece {taken!r}",
                    where=path,
                    fix="fetch tokenizer.model and the added tokens from the same checkpoint",
                )
        spec = self._proto.normalizer_spec
        self._legacy = legacy
        self._ids = {piece.piece: index for index, piece in enumerate(pieces)} | {t.text: t.id for t in added}
        self._added = {token.text: token.id for token in added if token.id >= len(pieces)}
        controls = [AddedToken(p.piece, i) for i, p in enumerate(pieces) if p.type == CONTROL]
        self._splitter = splitter([t for t in added if t.id >= len(pieces)] + controls)
        native = [AddedToken(p.piece, 0) for p in pieces if p.type == USER_DEFINED and MARK.fullmatch(p.piece)]
        self._pieces_as_marks = splitter(native) or re.compile("(?!)")
        bare = [AddedToken(t.text, 0) for t in [*added, *controls] if t.text not in {n.text for n in native}]
        marks = native + list({t.text: t for t in bare}.values())
        self._special = tuple(sorted(token.text for token in marks))
        self.marks = splitter(marks)
        self._leading = "all" if spec.remove_extra_whitespaces else "one" if spec.add_dummy_prefix else "none"
        self.size = max([len(pieces), *(token.id + 1 for token in added)])
        own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
        told = {name: self._ids.get(token_text((named or {}).get(f"{name}_token")) or "") for name in own}
        self.bos, self.eos, self.pad = (
            index if index is None or index >= 0 else None
            for index in (own[name] if told[name] is None else told[name] for name in own)
        )

    def special(self) -> tuple[str, ...]:
        """Texts of the marks: what `marks` finds."""
        return self._special

    def id(self, text: str) -> int | None:
        """The token that is exactly `text`."""
        return self._ids.get(text)

    def added(self) -> dict[int, str]:
        """Texts of the tokens behind the model's own pieces, by id."""
        return {index: text for text, index in self._added.items()}

    def texts(self) -> dict[int, str]:
        """Texts of all tokens by id."""
        return {index: text for text, index in self._ids.items()}

    def text(self, token: int) -> str | None:
        """The text that is exactly this token."""
        pieces = self._proto.pieces
        return pieces[token].piece if 0 <= token < len(pieces) else self.added().get(token)

    def encode(self, text: str, trusted: bool) -> list[int]:
        """Tokens of `text`; marks in it become their token only when it is trusted."""
        return self.encode_parts([(text, False)]) if trusted else self._plain(text, False, True)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Tokens of one text whose marks are trusted in some of its parts, and data in others (`guard.parts`)."""
        tokens: list[int] = []
        held: list[Part] = []  # since the last control or added token
        prefix = True
        for text, data in parts:
            start = 0
            for match in self._splitter.finditer(text) if self._splitter and not data else ():
                tokens += self._between([*held, (text[start : match.start()], False)], prefix)
                tokens.append(self._ids[match[match.lastgroup or 0]])
                held, prefix, start = [], self._legacy, match.end()
            held.append((text[start:], data))
        return tokens + self._between(held, prefix)

    def _between(self, parts: Sequence[Part], prefix: bool) -> list[int]:
        """Tokens of parts without control and added tokens; `prefix`: with the dummy prefix."""
        if not any(data for _, data in parts):
            return self._plain("".join(text for text, _ in parts), True, prefix)
        tokens: list[int] = []
        held = ""
        for text, data in parts:
            start = 0
            for match in self._pieces_as_marks.finditer(text) if not data else ():
                held += text[start : match.start()]
                tokens += self._plain(held, False, prefix)
                tokens += self._plain(match[0], True, prefix and not held)
                held, prefix, start = "", False, match.end()
            held += text[start:]
        return tokens + self._plain(held, False, prefix)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; control tokens and ids without a piece give none, broken UTF-8 gives U+FFFD."""
        stream = self.stream(False)
        return "".join(stream.push(token) for token in tokens) + stream.flush()

    def stream(self, continues: bool) -> SentencePieceStream:
        """A decoder that takes one token at a time."""
        return SentencePieceStream(self._bytes, "none" if continues else self._leading)

    def _plain(self, text: str, marks: bool, prefix: bool) -> list[int]:
        return self._processor(marks, prefix).encode(text) if text else []

    @cache  # noqa: B019  (four processors at most, which live as long as the tokenizer)
    def _processor(self, marks: bool, prefix: bool) -> sentencepiece.SentencePieceProcessor:
        """The model itself, or a copy in which marks are no pieces or text gets no dummy prefix."""
        proto = ModelProto()
        proto.CopyFrom(self._proto)
        proto.normalizer_spec.add_dummy_prefix &= prefix
        for piece in proto.pieces:
            if not marks and piece.type == USER_DEFINED and MARK.fullmatch(piece.piece):
                piece.type = UNUSED
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def piece_count(path: Path) -> int:
    """Pieces of a SentencePiece model; 0 where the file is none (`SentencePieces` says what is wrong)."""
    proto = ModelProto()
    try:
        proto.ParseFromString(read_bytes(path, MOST_TABLE_BYTES))
    except (DecodeError, InputError):
        return 0
    return len(proto.pieces)


def read_model(path: Path) -> Any:
    """The `ModelProto` of a good SentencePiece model: pieces, scores, kinds, and how text is treated."""
    proto = ModelProto()
    proto.ParseFromString(read_bytes(path, MOST_TABLE_BYTES))
    return proto


def has_dummy_prefix(path: Path) -> bool:
    """Whether a SentencePiece model puts a space in front of every text."""
    return read_model(path).normalizer_spec.add_dummy_prefix


class SentencePieceStream:
    """Text of tokens as they come; a UTF-8 character is held back until its last byte is there."""

    def __init__(self, surface: dict[int, bytes], leading: str) -> None:
        """`leading`: white space dropped in front of everything: "none", "one" or "all"."""
        self._surface, self._leading = surface, leading
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; often, but not always, that of the token itself."""
        return self._strip(self._utf8.decode(self._surface.get(token, b"")))

    def flush(self) -> str:
        """What is left: U+FFFD when the tokens ended inside a character."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._leading != "none" and text:
            bare = text.lstrip(" ") if self._leading == "all" else text.removeprefix(" ")
            if bare or self._leading == "one":
                self._leading = "none"
            return bare
        return text


def _surface(proto: Any, added: Sequence[AddedToken]) -> dict[int, bytes]:
    """The bytes that each token stands for."""
    surface: dict[int, bytes] = {token.id: token.text.encode() for token in added}
    for index, piece in enumerate(proto.pieces):
        if piece.type == BYTE:
            surface[index] = bytes([int(piece.piece[1:-1], 16)])  # <0x41>
        elif piece.type == UNKNOWN:
            surface[index] = proto.trainer_spec.unk_surface.encode()
        else:
            surface[index] = b"" if piece.type == CONTROL else piece.piece.replace(SPACE, " ").encode()
    return surface
