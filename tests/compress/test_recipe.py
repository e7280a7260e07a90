"""Recipes: presets, files, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bluelm.errors import InputError
from compress.recipe import Recipe, presets


def test_presets_load_and_differ() -> None:
    assert {"w4-g32", "w4-g128", "w8", "w4a16-npu"} <= set(presets())
    loaded = {name: Recipe.load(name) for name in presets()}
    assert (loaded["w4-g128"].bits, loaded["w4-g128"].group_size) == (4, 128)
    assert loaded["w8"].bits == 8
    assert loaded["w4-g32"].method == "gptq"


def test_file_and_options_over_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: awq\nbits: 8\n")
    recipe = Recipe.load(path, bits=4, seed=7)
    assert (recipe.method, recipe.bits, recipe.seed) == ("awq", 4, 7)


def test_plain_rounding_searches_nothing_unless_told() -> None:
    assert Recipe.make({"method": "rtn"}).grid == "minmax"
    assert Recipe.make({"method": "rtn", "grid": "mse"}).grid == "mse"
    assert Recipe.make({"method": "gptq"}).grid == "mse"
    assert not Recipe.make({"method": "rtn"}).reads_text


def test_digest_follows_every_value() -> None:
    base = Recipe()
    assert base.digest() == Recipe().digest()
    for change in ({"bits": 8}, {"seed": 1}, {"damping": 0.02}, {"correction": 0.0}, {"head_bits": 4}):
        assert Recipe.make({**base.model_dump(), **change}).digest() != base.digest()


def test_dumped_recipe_reads_back() -> None:
    recipe = Recipe.make({"method": "awq", "group_size": -1, "symmetric": False})
    assert Recipe.make(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"group_sise": 32}, "did you mean 'group_size'"),
        ({"colour": 1}, "known keys"),
        ({"bits": 5}, "bits = 5"),
        ({"bits": "4"}, "bits = '4'"),
        ({"group_size": 48}, "group_size = 48"),
        ({"method": "magic"}, "method = 'magic'"),
        ({"damping": 0}, "damping = 0"),
        ({"damping": float("nan")}, "damping = nan"),
        ({"samples": 0}, "samples = 0"),
        ({"length": 1}, "length = 1"),
        ({"correction": 2}, "correction = 2"),
        ({5: 1}, "no key '5'"),
    ],
)
def test_mistakes_are_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.make(values)
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["- 1\n", "bits: [", "\tbits: 4", "bits: 4\nbitz: 8\n", "just words"])
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        Recipe.load(path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not UTF-8"):
        Recipe.load(path)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(InputError, match="w4-g32"):
        Recipe.load("w5")


def test_the_documented_recipe_is_the_default_with_one_linear_otherwise() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    values = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    documented = Recipe.make(values)
    assert set(values) == set(Recipe.keys()) - {"auto", "size", "max_kl", "activations", "gptq"}
    assert documented.model_copy(update={"layers": {}}) == Recipe.load("w4-g32")
    assert documented.widths("model.layers.0.mlp.down_proj").bits == 8
    for name in presets():
        assert f"`{name}`" in page
