import json

import pytest
from click.testing import CliRunner

from genscale.cli.recipe_commands import recipe
from genscale.recipe.load import load_recipe, recipe_from_mapping


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        result = CliRunner().invoke(recipe, words)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_show_prints_a_recipe_that_loads_back(run, tmp_path):
    (tmp_path / "again.yaml").write_text(run("show", "tiny", "training.batch=32 samples"))
    assert load_recipe("again.yaml") == load_recipe("tiny", ["training.batch=32 samples"])


def test_show_prints_json(run):
    assert recipe_from_mapping(json.loads(run("show", "--json", "tiny"))) == load_recipe("tiny")


def test_list_names_what_show_accepts(run):
    lines = run("list").splitlines()
    assert any(line.startswith("recipes/text/tiny.yaml ") for line in lines)
    assert all(load_recipe(line.split()[0]) for line in lines)
    assert {entry["name"] for entry in json.loads(run("list", "--json"))} >= {"tiny", "8b"}


def test_schema_is_json_with_every_part(run):
    schema = json.loads(run("schema"))
    assert {"extends", "data", "model", "training"} <= set(schema["properties"])
