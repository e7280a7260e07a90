"""What a GGUF file says of itself beside the weights: name, licence, type, end tokens; and BPE cuts by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bluelm.checkpoint import Checkpoint
from bluelm.errors import TargetError
from bluelm.system.files import demo_checkpoint
from compress.checkpoint.store import QuantizedCheckpoint
from export.artifacts.artifact import Artifact
from export.gguf import export as gguf_file
from export.gguf.bpe import read_byte_pairs
from export.gguf.reader import GgufFile
from export.gguf.tokenizer import check_tokenizer
from export.readback import differing
from export.readback.items import TELLS
from pipeline.run.provenance import about
from tests.support.checkpoints.rounded import rounded
from tests.support.damage import again
from tests.support.files.gguf_files import rewrite
from tests.support.files.tokenizers import ROWS, write_tokenizer

TOLD = {"name": "small", "license": "apache-2.0"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Artifact]:
    place = tmp_path_factory.mktemp("about")
    quantized = rounded(place / "q", blocks=1)
    return quantized, gguf_file.export(quantized, place / "a", context=16, about=TOLD)


def test_the_file_names_the_model(made: tuple[QuantizedCheckpoint, Artifact]) -> None:
    quantized, artifact = made
    fields = GgufFile(artifact.path("model")).fields
    assert {key: fields[f"general.{key}"].contents() for key in TOLD} == TOLD == artifact.about
    assert fields["general.file_type"].contents() == 2  # mostly Q4_0
    assert differing(artifact, quantized) == []


@pytest.mark.parametrize(
    "changes",
    [{"general.name": "other"}, {"general.license": None}, {"general.file_type": 7}, {"general.version": "2"}],
)
def test_another_name_is_found(
    changes: dict[str, object], made: tuple[QuantizedCheckpoint, Artifact], tmp_path: Path
) -> None:
    quantized, artifact = made
    shutil.copytree(artifact.folder, tmp_path / "a")
    copy = Artifact.open(tmp_path / "a")
    rewrite(copy.path("model"), changes)
    assert differing(again(copy), quantized) == [TELLS]


@pytest.mark.parametrize(
    ("card", "licence"),
    [("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"), ("# A model\nlicense: mit\n", None), (None, None)],
)
def test_a_model_card_names_the_licence(card: str | None, licence: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert about(tmp_path, "m") == {"name": "m"} | ({"license": licence} if licence else {})


def test_the_cut_of_smollm_is_known_and_others_are_refused_before_any_work(tmp_path: Path) -> None:
    """What SmolLM2's tokenizer.json has: digits one by one, then GPT-2's words."""
    write_tokenizer(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    path.write_text(json.dumps(saved))
    assert read_byte_pairs(path, ROWS).cut == "smollm"
    for parts in ([digits], [byte_level, digits], [digits | {"individual_digits": False}, byte_level]):
        path.write_text(json.dumps(saved | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}))
        with pytest.raises(TargetError, match="no pre-tokenizer"):
            read_byte_pairs(path, ROWS)


def test_more_end_tokens_than_the_file_names_are_refused(tmp_path: Path) -> None:
    config = Checkpoint.open(demo_checkpoint()).config
    shutil.copy(demo_checkpoint() / "tokenizer.model", tmp_path)
    for ends, fits in (((2, 5, 6), True), ((2, 5, 6, 7), False)):
        many = replace(config, eos_token_ids=ends)
        if fits:
            check_tokenizer(tmp_path, many)
            continue
        with pytest.raises(TargetError, match="names 3 end tokens, this model has 4"):
            check_tokenizer(tmp_path, many)
