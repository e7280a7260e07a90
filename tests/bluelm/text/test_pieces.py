"""What is a mark and what is text, by SentencePiece's own words; and which of a folder's files decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from bluelm.errors import InputError
from bluelm.system.files import demo_checkpoint
from bluelm.text.added_tokens import MOST_CHARACTERS, MOST_TOKENS, read_added_tokens
from bluelm.text.jsonpieces import MOST_GROWTH, JsonPieces, _told, same_tokens
from bluelm.text.sentencepieces import SentencePieces, has_dummy_prefix, piece_count, read_model
from bluelm.text.tokenizer import Message, Tokenizer
from tests.support.checkpoints.shapes import train_tokenizer
from tests.support.files.tokenizers import write_tokenizer

MARKED = train_tokenizer(add_dummy_prefix=True, user_defined_symbols=["[|Human|]:", "[|AI|]:", "weights"])


def folder_with(folder: Path, model: bytes, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_marks_are_control_pieces_and_pieces_that_look_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, MARKED))
    marks = tokenizer.pieces.marks
    assert marks is not None
    for text, has in [("x[|AI|]:y", True), ("x</s>", True), ("x<s>y", True), ("the weights", False), ("[|AI", False)]:
        assert bool(marks.search(text)) is has, text
    library = sentencepiece.SentencePieceProcessor(model_proto=MARKED)
    assert library.piece_to_id("weights") in tokenizer.encode("the weights")  # a piece of its own, mark or not
    mark = library.piece_to_id("[|AI|]:")
    assert mark in tokenizer.encode("x[|AI|]:", marks=True) and mark not in tokenizer.encode("x[|AI|]:")
    assert tokenizer.decode(tokenizer.encode("x[|AI|]:")) == "x[|AI|]:"


def test_marks_of_the_model_count_beside_added_ones(tmp_path: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_proto=MARKED)
    mark, added = library.piece_to_id("[|AI|]:"), library.vocab_size()
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, MARKED, added_tokens={"[X]": added}))
    tokens = tokenizer.encode("a[|AI|]:b[X]c[|AI|]:d", marks=True)
    assert (tokens.count(mark), tokens.count(added)) == (2, 1)
    assert not {mark, added} & set(tokenizer.encode("a[|AI|]:b[X]c[|AI|]:d"))
    bare = folder_with(tmp_path / "bare", train_tokenizer(add_dummy_prefix=False)) / "tokenizer.model"
    assert not has_dummy_prefix(bare) and len(read_model(bare).pieces) == piece_count(bare)


def test_text_behind_a_mark_gets_no_space_of_its_own(tmp_path: Path) -> None:
    """Marks that are pieces of the model: spaces stand in front of a chat and behind an end, as elsewhere."""
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path / "native", MARKED, config={"model_type": "BlueLM"}))
    assert has_dummy_prefix(tmp_path / "native" / "tokenizer.model")
    tricky = [Message("user", "say </s>"), Message("assistant", "no[|AI|]:"), Message("user", "again")]
    assert tokenizer.decode(tokenizer.chat(tricky)) == "[|Human|]:say </s>[|AI|]:no[|AI|]: [|Human|]:again[|AI|]:"
    library = sentencepiece.SentencePieceProcessor(model_proto=MARKED)

    def spelled(tokens: list[int]) -> str:
        return "".join(library.id_to_piece(token) for token in tokens)

    for legacy, added, behind in [
        (True, False, "the"),
        (True, True, "▁the"),
        (False, True, "the"),
        (False, False, "the"),
    ]:
        files: dict[str, Any] = {"tokenizer_config": {"legacy": legacy}}
        if added:
            files["added_tokens"] = {"[X]": library.vocab_size()}
        pieces = Tokenizer.from_folder(folder_with(tmp_path / f"{legacy}{added}", MARKED, **files)).pieces
        mark = "[X]" if added else "[|AI|]:"
        for parts in ([(f"{mark}the", False)], [(mark, False), ("the", True)]):
            found = pieces.encode_parts(parts)
            assert spelled(found[found.index(pieces.id(mark) or 0) + 1 :]) == behind
        assert spelled(pieces.encode("the", trusted=False)) == "▁the"


def test_bluelms_marks_are_spelled_out_where_they_are_no_tokens(tmp_path: Path) -> None:
    plain = train_tokenizer(add_dummy_prefix=False)
    size = sentencepiece.SentencePieceProcessor(model_proto=plain).vocab_size()
    for marks in (["[|Human|]:"], ["[|AI|]:"], ["[|Human|]:", "[|AI|]:"], []):
        added = {mark: size + index for index, mark in enumerate(marks)}
        folder = folder_with(tmp_path / "x", plain, added_tokens=added, config={"model_type": "BlueLM"})
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.decode(tokenizer.chat([Message("user", "a")])) == "[|Human|]:a[|AI|]:"


def test_tokenizer_config_names_the_ends(tmp_path: Path) -> None:
    named = {"eos_token": "[|AI|]:", "bos_token": {"content": "[|Human|]:"}, "pad_token": "no such piece"}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, MARKED, tokenizer_config=named))
    library = sentencepiece.SentencePieceProcessor(model_proto=MARKED)
    assert (tokenizer.bos, tokenizer.eos) == (library.piece_to_id("[|Human|]:"), library.piece_to_id("[|AI|]:"))
    assert tokenizer.pad == library.pad_id()


@pytest.mark.parametrize(("told", "bos"), [
    (0, 0), (5, 5), ([5, 6], 5), (True, None), (False, None), (-1, None), ("5", None), (5.0, None), ([], None),
    ([True], None), (None, None),
])  # fmt: skip
def test_ids_of_config_json_are_whole_numbers_from_0(told: object, bos: int | None, tmp_path: Path) -> None:
    model = train_tokenizer(bos_id=-1)
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, model, config={"bos_token_id": told}))
    assert tokenizer.bos == bos


def test_added_tokens_are_bounded(tmp_path: Path) -> None:
    def read(tokens: dict[str, int]) -> int:
        (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
        return len(read_added_tokens(tmp_path))

    assert read({"X": 0, "y" * MOST_CHARACTERS: 1}) == 2
    assert read({f"<{index}>": index for index in range(MOST_TOKENS)}) == MOST_TOKENS
    for tokens in (
        {f"<{index}>": index for index in range(MOST_TOKENS + 1)},
        {"y" * (MOST_CHARACTERS + 1): 1},
        {"": 1},
    ):
        with pytest.raises(InputError, match=r"more than|must have a text"):
            read(tokens)


def test_ids_beyond_any_vocabulary_are_refused(tmp_path: Path) -> None:
    Tokenizer.from_folder(folder_with(tmp_path, MARKED, added_tokens={"[X]": 2**24 - 1}))
    with pytest.raises(InputError, match="must have a text and an id"):
        Tokenizer.from_folder(folder_with(tmp_path, MARKED, added_tokens={"[X]": 2**24}))


@pytest.mark.parametrize(("named", "source"), [
    (["tokenization.Own", None], "tokenizer.model"), ([None, "tokenization.OwnFast"], "tokenizer.json"),
    (["tokenization.Own", "tokenization.OwnFast"], "tokenizer.json"), ([None, None], "tokenizer.json"),
    (["tokenization.Own", None, None], "tokenizer.json"), ("tokenization.Own", "tokenizer.json"),
    (None, "tokenizer.json"),
])  # fmt: skip
def test_a_class_without_a_fast_one_reads_tokenizer_model(named: object, source: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    folder_with(tmp_path, MARKED, tokenizer_config={"auto_map": {"AutoTokenizer": named}})
    assert Tokenizer.from_folder(tmp_path).source.name == source


def test_files_of_the_same_tokens_are_told_from_others(tmp_path: Path) -> None:
    """tokenizer.json as transformers converts it: BPE by text, Unigram in order, added tokens beside."""
    size = sentencepiece.SentencePieceProcessor(model_proto=MARKED).vocab_size()
    folder_with(tmp_path, MARKED, added_tokens={"[X]": size})
    pieces = Tokenizer.from_folder(tmp_path).pieces
    assert isinstance(pieces, SentencePieces)
    texts = pieces.texts()
    bpe = {text: index for index, text in texts.items() if index < size}
    added = [{"id": size, "content": "[X]"}, {"id": 1, "content": "<s>"}]
    unigram = [[texts[index], -1.0] for index in range(size)]
    other = {**added[0], "content": "[Y]"}
    for model, more, same in [
        ({"vocab": bpe}, added, True), ({"vocab": unigram}, added, True), ({"vocab": bpe}, [], False),
        ({"vocab": unigram}, [other], False), ({"vocab": {**bpe, "no such piece": 3}}, added, False),
        ({"vocab": unigram[:-1]}, added, False), ({"vocab": [*unigram[:-1], ["no such piece", 0]]}, added, False),
        ({"vocab": 7}, added, False), (7, added, False), ({"vocab": bpe}, 7, False),
        ({"vocab": bpe}, [*added, 7, {"id": "x"}, {"content": "y"}], True),
        ({"vocab": {**bpe, "new": "x"}}, added, True),
        ({"vocab": [*unigram[:-1], []]}, added, False), ({"vocab": [texts[i] for i in range(size)]}, added, True),
    ]:  # fmt: skip
        (tmp_path / "t.json").write_text(json.dumps({"model": model, "added_tokens": more}))
        assert same_tokens(tmp_path / "t.json", pieces) is same, (str(model)[:60], more)


def test_pieces_are_counted_where_there_are_some(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MARKED)
    assert piece_count(path) == sentencepiece.SentencePieceProcessor(model_proto=MARKED).vocab_size()
    path.write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    assert piece_count(path) == piece_count(tmp_path / "none") == 0


def test_special_tokens_of_tokenizer_json_have_no_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    pieces = JsonPieces(tmp_path / "tokenizer.json")
    end, begin, plain = (pieces.id(text) for text in ("<|end|>", "<|begin|>", "plain-added"))
    assert None not in (end, begin, plain)
    horse = pieces.encode("🦄", trusted=False)
    tokens = [begin, *pieces.encode("a", trusted=False), plain, *horse[:2], end]
    text = pieces.decode([token for token in tokens if token is not None])
    assert text.startswith("aplain-added") and "<|" not in text
    stream = pieces.stream(False)
    told = "".join(stream.push(token) for token in tokens if token is not None)
    assert told + stream.flush() == text
    assert pieces.encode("a<|end|>", trusted=True)[-1] == end
    assert end not in pieces.encode("a<|end|>", trusted=False)
    assert pieces.decode(pieces.encode("a<|end|>", trusted=False)) == "a<|end|>"
    assert pieces.marks is not None and pieces.size == 323
    assert pieces.marks.search("x<|end|>") and not pieces.marks.search("plain-added")


def test_a_character_becomes_no_more_than_so_many(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    sound = json.loads(path.read_text())

    def replaced(*sizes: int) -> JsonPieces:
        steps = [{"type": "Replace", "pattern": {"String": "q"}, "content": "q" * size} for size in sizes]
        path.write_text(json.dumps({**sound, "normalizer": {"type": "Sequence", "normalizers": steps}}))
        return JsonPieces(path)

    assert MOST_GROWTH % 10 == 0
    assert replaced(10, MOST_GROWTH // 10).encode("a", trusted=False)
    for sizes in ((10, MOST_GROWTH // 10 + 1), (MOST_GROWTH + 1,)):
        with pytest.raises(InputError, match=f"a character may become more than {MOST_GROWTH}"):
            replaced(*sizes)


def test_only_what_the_library_raises_is_told_as_its_own(tmp_path: Path) -> None:
    class Ours(BaseException):
        pass

    class PanicException(BaseException):
        """As Rust's."""

    for raised, told in [(Ours, Ours), (KeyboardInterrupt, KeyboardInterrupt), (MemoryError, MemoryError),
                         (Exception, InputError), (PanicException, InputError)]:  # fmt: skip
        with pytest.raises(told), _told("a text", tmp_path):
            raise raised("why")


def test_the_demo_folder_takes_its_model(tmp_path: Path) -> None:
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}')
    assert Tokenizer.from_folder(tmp_path).source.name == "tokenizer.model"
