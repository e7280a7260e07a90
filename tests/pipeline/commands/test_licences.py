"""What a bundle says of the weights' licence: the checkpoint's own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from bluelm.system.files import demo_checkpoint
from pipeline.bundles.licences import NOT_KNOWN, licences

CARDS = {
    "---\nlicense: apache-2.0\n---\n# Qwen2\n": "apache-2.0",
    "---\nlicense: other\nlicense_name: tongyi-qianwen\nlicense_link: x\n---\n": "tongyi-qianwen",
    "---\nlicense: other\n---\nlicense: mit\n": NOT_KNOWN,
    "license: mit\n": NOT_KNOWN,
}


@pytest.mark.parametrize(("card", "told"), CARDS.items(), ids=CARDS.values())
def test_the_model_card_names_it_or_nobody_does(card: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licences(tmp_path, None).weights == told
    assert licences(tmp_path, "MIT").weights == "MIT"


def test_texts_that_came_with_it_are_named() -> None:
    assert licences(demo_checkpoint(), None).weights == "Apache-2.0"


def test_a_text_without_a_card(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("You may.")
    found = licences(tmp_path, None)
    assert found.weights == "see LICENSES/weights-LICENSE" and "came with" in found.note
