"""Recipes and the rows they choose."""

import importlib.util
import json
import re
import sys
from collections import Counter

import pytest

from mllm_protector_guard import ConfigError, DataError, MissingDependencyError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.training import DetectorRecipe, DetoxifierRecipe, load_recipe, recipe_names
from mllm_protector_guard.training.config import LoraRecipe, SourceRecipe
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow, choose, read_training_rows

NAME = "smollm2-135m-detector"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestRecipes:
    @pytest.mark.parametrize("name", recipe_names())
    def test_the_recipes_of_the_package_parse(self, name):
        recipe = load_recipe(name)
        assert isinstance(recipe, DetectorRecipe if "-detector" in name else DetoxifierRecipe)
        assert recipe.base.sha256 or recipe.base.name not in catalog.names()

    def test_there_are_both_kinds(self):
        assert {load_recipe(name).kind for name in recipe_names()} == {"detector", "detoxifier"}

    def test_overrides_replace_fields(self):
        recipe = load_recipe(NAME, overrides=["epochs=2", "lora.rank=4", "sources={}", "layers=null"])
        assert (recipe.epochs, recipe.lora.rank, recipe.sources, recipe.layers) == (2.0, 4, {}, None)
        assert recipe.lora.alpha == load_recipe(NAME).lora.alpha

    @pytest.mark.parametrize(
        ("override", "named"),
        [
            ("epochs", "key=value"),
            ("=1", "key=value"),
            ("epochs.x=1", "'epochs' has no fields"),
            ("no_such=1", "no_such"),
            ("epochs=-1", "epochs"),
            ("lora.rank=many", "lora.rank"),
            ("kind=detoxifiers", "kind"),
            ("epochs=[", "YAML"),
        ],
    )
    def test_wrong_overrides_are_named(self, override, named):
        with pytest.raises(ConfigError, match=re.escape(named)):
            load_recipe(NAME, overrides=[override])

    @pytest.mark.parametrize("content", ["", "- 1", "kind: detector", "a: [", "kind: detector\nbase: 3", "\x00"])
    def test_wrong_files_are_named(self, tmp_path, content):
        path = tmp_path / "mine.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match="mine"):
            load_recipe(path)

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(ConfigError, match=f"'nope'.*{NAME}"):
            load_recipe("nope")

    def test_lora_layers_must_exist(self):
        lora = LoraRecipe(first_layer=1, modules=("q_proj",))
        assert re.fullmatch(lora.target_pattern(3), "model.layers.2.self_attn.q_proj")
        assert not re.fullmatch(lora.target_pattern(3), "model.layers.0.self_attn.q_proj")
        assert not re.fullmatch(lora.target_pattern(30), "model.layers.11.self_attn.k_proj")
        with pytest.raises(ConfigError, match="layers 9 to 2"):
            LoraRecipe(first_layer=9).target_pattern(3)


class TestRows:
    def test_rows_without_a_label_are_counted_and_left_out(self, tmp_path, caplog):
        path = write(
            tmp_path / "rows.jsonl",
            {"answer": "one", "harmful": None},
            {"question": "q", "answer": "two \ud83d", "harmful": True, "source": "s", "more": 1},
        )
        (row,) = read_training_rows([path], AnswerRow)
        assert (row.answer, row.harmful) == ("two \ud83d", True)
        assert "1 rows without a label" in caplog.text

    @pytest.mark.parametrize(
        ("bad", "named"),
        [
            ({"answer": "planted"}, "harmful"),
            ({"answer": ["planted"], "harmful": True}, "answer"),
            ({"answer": "planted", "harmful": "perhaps planted"}, "harmful"),
        ],
    )
    def test_a_bad_row_is_told_by_path_and_line(self, tmp_path, bad, named):
        path = write(tmp_path / "rows.jsonl", {"answer": "fine", "harmful": False}, bad)
        with pytest.raises(DataError, match=named) as caught:
            read_training_rows([path], AnswerRow)
        assert (caught.value.path, caught.value.line) == (str(path), 2)
        assert "planted" not in str(caught.value)

    def test_a_file_with_nothing_usable_is_refused(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", {"answer": "x", "harmful": None})
        with pytest.raises(DataError, match="no usable row"):
            read_training_rows([path], AnswerRow)
        with pytest.raises(DataError, match="rejected"):
            read_training_rows([path], RewriteRow)

    def test_sources_are_drawn_repeated_and_weighed(self):
        rows = [AnswerRow(answer=str(i), harmful=True, source="a") for i in range(10)]
        rows += [AnswerRow(answer=str(i), harmful=True, source="b", extra={"lang": "zh"}) for i in range(4)]
        rows += [AnswerRow(answer="c", harmful=False, source="c")]
        sources = {"a": SourceRecipe(rows=3, repeat=2), "b:zh": SourceRecipe(weight=0.5)}
        chosen = choose(rows, sources, SourceRecipe(rows=0), seed=1)
        assert Counter((row.source, weight) for row, weight in chosen) == {("a", 1.0): 6, ("b", 0.5): 4}
        assert chosen == choose(rows, sources, SourceRecipe(rows=0), seed=1)
        assert chosen != choose(rows, sources, SourceRecipe(rows=0), seed=2)

    def test_a_recipe_that_takes_no_row_is_refused(self):
        rows = [AnswerRow(answer="x", harmful=True, source="a")]
        with pytest.raises(ConfigError, match="'a'"):
            choose(rows, {}, SourceRecipe(rows=0), seed=1)


@pytest.mark.parametrize("package", ["accelerate", "yaml", "scipy"])
def test_training_names_the_extra_that_it_needs(package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else found(name, *more))
    monkeypatch.delitem(sys.modules, "mllm_protector_guard.training")
    with pytest.raises(MissingDependencyError, match=r"mllm-protector-guard\[train\]") as caught:
        importlib.import_module("mllm_protector_guard.training")
    assert caught.value.extra == "train"
