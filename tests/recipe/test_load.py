"""Recipes from files and overrides: what is merged, what is refused, and where each message points."""

import json
import re

import pytest

from genscale.recipe.amount import Amount
from genscale.recipe.data import FileTokenizer, Source
from genscale.recipe.load import differences, load_recipe, recipe_from_mapping, recipe_to_yaml
from genscale.recipe.objective import MaskedObjective
from genscale.recipe.schema import Recipe
from genscale.recipe.shipped import shipped_recipes
from genscale.recipe.training import AdamW, Muon, ScheduleFree
from genscale.runtime.errors import UserError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


def refusal(path, *overrides):
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------- files and extending


def test_values_of_a_file_and_defaults_for_the_rest(write):
    recipe = load_recipe(write("mine.yaml", "model:\n  layers: 2\ntraining:\n  budget: 3 epochs\n"))
    assert recipe == Recipe(
        name="mine",
        model=Recipe().model.model_copy(update={"layers": 2}),
        training=Recipe().training.model_copy(update={"budget": Amount(3, "epochs")}),
    )


def test_a_recipe_without_a_name_is_called_after_its_file(write):
    assert load_recipe(write("my texts (1).yaml", "seed: 1")).name == "my-texts-1"
    write("base.yaml", "name: base")
    assert load_recipe(write("child.yaml", "extends: base.yaml")).run_directory == "runs/child"


def test_a_chain_of_recipes_merges_mappings_and_replaces_lists(write):
    write("a.yaml", "seed: 1\nmodel: {layers: 2, width: 64, heads: 2}\ndata: {sources: [x.txt, y.txt]}")
    write("b.yaml", "extends: a.yaml\nmodel: {width: 128}\nsampling: {prompts: [one, two]}")
    recipe = load_recipe(write("c.yaml", "extends: b.yaml\nmodel: {layers: 3}\ndata: {sources: [z.txt]}"))
    assert (recipe.seed, recipe.model.layers, recipe.model.width, recipe.model.heads) == (1, 3, 128, 2)
    assert recipe.data.sources == (Source(path="z.txt"),)
    assert recipe.sampling.prompts == ("one", "two")


def test_extends_is_relative_to_the_file_and_may_name_a_shipped_recipe(write):
    write("folder/base.yaml", "seed: 5")
    assert load_recipe(write("folder/child.yaml", "extends: base.yaml")).seed == 5
    assert load_recipe(write("own.yaml", "extends: tiny")).model == load_recipe("tiny").model


def test_a_shipped_recipe_is_found_by_name_and_by_path_and_a_users_file_comes_first(write):
    assert load_recipe("tiny") == load_recipe("recipes/text/tiny.yaml")
    write("recipes/tiny.yaml", "seed: 9")
    assert load_recipe("recipes/tiny.yaml").seed == 9


def test_another_kind_replaces_the_mapping_and_the_same_kind_merges(write):
    write("base.yaml", "training: {optimizer: {kind: adamw, learning_rate: 5e-4, beta1: 0.8}}")
    other = load_recipe(write("other.yaml", "extends: base.yaml\ntraining: {optimizer: {kind: schedule_free}}"))
    assert other.training.optimizer == ScheduleFree()
    same = load_recipe(write("same.yaml", "extends: base.yaml\ntraining: {optimizer: {learning_rate: 1e-3}}"))
    assert same.training.optimizer == AdamW(learning_rate=1e-3, beta1=0.8)


def test_a_kind_that_is_not_given_is_that_of_the_default(write):
    recipe = load_recipe(write("a.yaml", "training: {optimizer: {learning_rate: 0.01, rest: {beta2: 0.99}}}"))
    assert recipe.training.optimizer == Muon(
        learning_rate=0.01, rest=AdamW(learning_rate=3e-3, weight_decay=0, beta2=0.99)
    )


def test_recipes_that_extend_each_other_are_refused(write):
    write("a.yaml", "extends: b.yaml")
    write("b.yaml", "extends: a.yaml")
    assert refusal("a.yaml") == "recipes extend each other in a circle: a.yaml extends b.yaml extends a.yaml"


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_yaml_and_come_last(write):
    recipe = load_recipe(
        write("a.yaml", "model: {width: 128, heads: 4}"),
        [
            "model.width=256",
            "training.batch=32 samples",
            "data.sources=['a.txt', {path: b.txt, licence: MIT}]",
            "training.early_stopping=null",
            "training.average.half_life=5%",
            "layout.compile=false",
            "data.tokenizer.training_bytes=1e8",
        ],
    )
    assert recipe.model.width == 256
    assert recipe.training.batch == Amount(32, "samples")
    assert recipe.data.sources == (Source(path="a.txt"), Source(path="b.txt", licence="MIT"))
    assert recipe.training.early_stopping is None
    assert recipe.training.average.half_life == Amount(5, "%")
    assert recipe.layout.compile is False
    assert recipe.data.tokenizer.training_bytes == 100_000_000


def test_the_order_of_overrides_does_not_matter_when_one_changes_the_kind():
    overrides = ["training.optimizer.learning_rate=6e-4", "training.optimizer.kind=adamw"]
    expected = AdamW(learning_rate=6e-4)
    assert load_recipe("tiny", overrides).training.optimizer == expected
    assert load_recipe("tiny", overrides[::-1]).training.optimizer == expected


def test_an_override_reaches_into_a_list(write):
    recipe = load_recipe(
        write("a.yaml", "data: {sources: [a.txt]}"),
        ["data.sources.0.licence=MIT", "data.sources.1.path=b.txt"],
    )
    assert recipe.data.sources == (Source(path="a.txt", licence="MIT"), Source(path="b.txt"))
    assert refusal("a.yaml", "data.sources.5.path=c") == (
        "override 'data.sources.5.path=c': data.sources is a list of 1; expected an index up to 1"
    )


def test_the_home_folder_is_expanded_and_other_paths_stay(monkeypatch, write):
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = load_recipe(
        write("a.yaml", "data: {sources: [~/x/*.txt, y.txt, 's3://b/k'], store: '~/stores/{name}'}\nrun: out/{name}")
    )
    assert [source.path for source in recipe.data.sources] == ["/home/ada/x/*.txt", "y.txt", "s3://b/k"]
    assert recipe.store_directory == "/home/ada/stores/a"
    assert recipe.run_directory == "out/a"


# ---------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_resolved_recipe_reads_back_equal(name, write):
    recipe = load_recipe(name)
    assert load_recipe(write("again.yaml", recipe_to_yaml(recipe))) == recipe
    assert recipe_from_mapping(json.loads(recipe.model_dump_json())) == recipe


def test_awkward_values_read_back_equal(write):
    words = ["no", "1e5", "2024-01-01", "1_000", "~", "0x10", ".5", "12:30", "a: b", "- c", "#"]
    awkward = [*words, "", " x ", "a\nb\n", "'\"", "é🙂\u2028"]
    recipe = recipe_from_mapping(
        {
            "name": "awkward",
            "sampling": {"prompts": awkward, "temperature": 1e-20},
            "training": {"budget": "1234567 tokens", "optimizer": {"learning_rate": 1e16}},
            "model": {"rotary_base": 1.1e22},
        }
    )
    assert load_recipe(write("again.yaml", recipe_to_yaml(recipe))) == recipe


def test_differences_name_each_key_with_both_values():
    a = recipe_from_mapping({"name": "x", "data": {"sources": ["a.txt"]}})
    changes = {"training.batch": "32 samples", "training.optimizer.kind": "adamw", "sampling.prompts": ["hi"]}
    b = load_recipe_from(a, changes)
    found = differences(a, b)
    assert "training.batch: 64 samples -> 32 samples" in found
    assert "training.optimizer.kind: muon -> adamw" in found
    assert "training.optimizer.momentum: 0.95 -> not there" in found
    assert 'sampling.prompts: [] -> ["hi"]' in found
    assert not any(line.startswith(("model", "data")) for line in found)
    assert differences(a, a) == []
    c = a.model_copy(update={"data": a.data.model_copy(update={"sources": (Source(path="b.txt"),)})})
    assert differences(a, c) == ["data.sources.0.path: a.txt -> b.txt"]


def load_recipe_from(recipe, changes):
    with open("base.yaml", "w", encoding="utf-8") as file:
        file.write(recipe_to_yaml(recipe))
    return load_recipe("base.yaml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  optimiser: {}", "a.yaml, line 2: training.optimiser: unknown key, did you mean 'optimizer'?"),
        (
            "training:\n  learning_rate: 1",
            "a.yaml, line 2: training.learning_rate: unknown key, did you mean 'training.optimizer.learning_rate'?",
        ),
        (
            "training:\n  optimizer:\n    kind: adamw\n    momentum: 1",
            "a.yaml, line 4: training.optimizer.momentum: unknown key of kind 'adamw'; it belongs to another kind",
        ),
        (
            "data:\n  split: {zzzz: 1}",
            "a.yaml, line 2: data.split.zzzz: unknown key; the keys here are by, validation",
        ),
        ("data:\n  sources:\n  - pth: x", "a.yaml, line 3: data.sources.0.pth: unknown key, did you mean 'path'?"),
        ("extend: b.yaml", "a.yaml, line 1: extend: unknown key, did you mean 'extends'?"),
        ("model:\n  layers: four", "a.yaml, line 2: model.layers: expected a whole number, found 'four'"),
        ("model:\n  layers: true", "a.yaml, line 2: model.layers: expected a whole number, found true"),
        ("model:\n  layers: 2.5", "a.yaml, line 2: model.layers: expected a whole number, found 2.5"),
        ("model:\n  bias: yes", "a.yaml, line 2: model.bias: expected true or false, found 'yes'"),
        ("model:\n  layers: 0", "a.yaml, line 2: model.layers: expected at least 1, found 0"),
        ("model:\n  dropout: 1", "a.yaml, line 2: model.dropout: expected less than 1, found 1"),
        ("model:\n  width:", "a.yaml, line 2: model.width: expected a whole number, found nothing"),
        ("model: [1]", "a.yaml, line 1: model: expected a mapping, found a list"),
        ("data:\n  sources: x.txt", "a.yaml, line 2: data.sources: expected a list, found 'x.txt'"),
        ("data:\n  sources:\n  - {licence: MIT}", "a.yaml, line 3: data.sources.0.path: missing"),
        ("data:\n  sources: ['']", "a.yaml, line 2: data.sources.0: expected text that is not empty, found ''"),
        (
            "model:\n  norm: lyer",
            "a.yaml, line 2: model.norm: expected 'rms' or 'layer', found 'lyer', did you mean 'layer'?",
        ),
        (
            "training:\n  optimizer:\n    kind: adam",
            "a.yaml, line 3: training.optimizer.kind: expected 'adamw', 'muon', 'adafactor' or 'schedule_free', "
            "found 'adam', did you mean 'adamw'?",
        ),
        (
            "layout:\n  micro_batch: sixty",
            "a.yaml, line 2: layout.micro_batch: expected a whole number or 'auto', found 'sixty'",
        ),
        (
            "training:\n  budget: 5000",
            "a.yaml, line 2: training.budget: expected an amount such as '5M tokens', '250 steps', '2 epochs', "
            "'64 samples' or '3%', not 5000",
        ),
        ("training:\n  budget: 0 steps", "a.yaml, line 2: training.budget: must be more than 0, not '0 steps'"),
        (
            "training:\n  validation:\n    every: 0 steps",
            "a.yaml, line 3: training.validation.every: must be more than 0, not '0 steps'",
        ),
        (
            "training:\n  budget: 50%",
            "a.yaml, line 2: training: budget is given in tokens, samples, steps or epochs, not in % of itself",
        ),
        (
            "training:\n  schedule:\n    warmup: 120%",
            "a.yaml, line 3: training.schedule: warmup (120%) is more than the whole budget",
        ),
        (
            "model:\n  width: 384\n  heads: 5",
            "a.yaml, line 3: model: heads (5) must divide width (384), or head_width be given",
        ),
        (
            "training:\n  batch: 32 samples\nlayout:\n  micro_batch: 64",
            "a.yaml, line 4: layout.micro_batch (64 samples) is larger than training.batch (32 samples)",
        ),
        (
            "model:\n  context: 1024\ntraining:\n  batch: 100 tokens",
            "a.yaml, line 4: training.batch (100 tokens) is less than one sample of model.context (1024 tokens)",
        ),
        (
            "training:\n  budget: 8 samples\n  batch: 16 samples",
            "a.yaml, line 2: training.budget (8 samples) is less than one step of training.batch (16 samples)",
        ),
        (
            "objective: {kind: masked}\nmodel:\n  sliding_window: 16",
            "a.yaml, line 3: model.sliding_window reaches back only; objective.kind 'masked' looks both ways",
        ),
        (
            "data:\n  mixture: {x: 0}",
            "a.yaml, line 2: data: mixture gives 'x' the weight 0; expected more than 0",
        ),
        ("run: out/{nme}", "a.yaml, line 1: run: only {name} may stand in braces, not 'out/{nme}'"),
        (
            "model:\n  widht: 3\n  layers: x\n  heads: 1.5",
            "a.yaml, line 2: model.widht: unknown key, did you mean 'width'? (and 2 more)",
        ),
        ("model:\n  layers: 2\n  layers: 3", "a.yaml, line 3: model.layers: given twice, first in line 2"),
        ("model: [1, 2", "a.yaml, line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("model:\n\tlayers: 1", "a.yaml, line 2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: &a [*a]", "a.yaml: a YAML alias contains itself"),
        ("", "a.yaml: expected keys such as 'model:' and 'training:', found nothing"),
        ("- 1", "a.yaml: expected keys such as 'model:' and 'training:', found a list"),
        ("extends: 3", "a.yaml, line 1: extends: expected one recipe's path or name"),
        ("extends: tinny", "a.yaml, line 1: extends: tinny: no such recipe, did you mean 'tiny'?"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_says_where(write, text, message):
    assert refusal(write("a.yaml", text)) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heds=4", "model.heds: unknown key, did you mean 'heads'?"),
        ("model.heads=5", "model: heads (5) must divide width (256), or head_width be given"),
        ("seed.x=1", "seed: expected a whole number, found a mapping"),
        ("data.sources.0.pth=x", "data.sources.0.pth: unknown key, did you mean 'path'?"),
        ("layout.micro_batch=64", "layout.micro_batch (64 samples) is larger than training.batch (16 samples)"),
        ("training.batch", "expected key.path=value, such as training.batch='32 samples'"),
        ("model..heads=3", "expected key.path=value, such as training.batch='32 samples'"),
        ("extends=tiny", "extends stands in a recipe file, not in an override"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(override, message):
    assert refusal("tiny", override) == f"override '{override}': {message}"


def test_a_mistake_in_an_extended_recipe_names_that_file(write):
    write("base.yaml", "model:\n  layers: x")
    write("child.yaml", "extends: base.yaml\nseed: 1")
    assert refusal("child.yaml") == "base.yaml, line 2: model.layers: expected a whole number, found 'x'"


def test_a_list_entry_is_told_from_the_recipe_that_gave_the_list(write):
    write("base.yaml", "data:\n  sources:\n  - path: x\n    licence: MIT")
    write("child.yaml", "extends: base.yaml\ndata:\n  sources: [{licence: MIT}]")
    assert refusal("child.yaml") == "child.yaml, line 3: data.sources.0.path: missing"


def test_a_recipe_that_is_not_there_suggests_the_nearest(write):
    write("mine.yaml", "seed: 1")
    assert refusal("mnie.yaml") == "mnie.yaml: no such recipe file, did you mean 'mine.yaml'?"
    assert refusal("tinny") == "tinny: no such recipe, did you mean 'tiny'?"
    assert refusal("recipes/text/tin.yaml").endswith("did you mean 'recipes/text/tiny.yaml'?")
    assert refusal("tiny.yml").endswith("did you mean 'tiny'?")
    assert re.search(r"; shipped recipes: .*\b1b, 405b, 70b, ", refusal("qqqq"))


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"seed: 1 # \xe9")
    (tmp_path / "control.yaml").write_bytes(b"seed: 1\x01")
    (tmp_path / "folder.yaml").mkdir()
    assert refusal("bytes.yaml") == "bytes.yaml: not UTF-8 text (byte 10)"
    assert "not valid YAML: unacceptable character" in refusal("control.yaml")
    assert "folder.yaml: " in refusal("./folder.yaml")


def test_a_mapping_is_checked_like_a_file():
    data = {"tokenizer": {"kind": "file", "path": "t"}}
    recipe = recipe_from_mapping({"objective": {"kind": "masked"}, "data": data})
    assert recipe.objective == MaskedObjective()
    assert recipe.data.tokenizer == FileTokenizer(path="t")
    with pytest.raises(UserError, match=r"^facts: model\.layers: expected a whole number, found '4'$"):
        recipe_from_mapping({"model": {"layers": "4"}}, where="facts")


def test_a_batch_in_tokens_is_rounded_to_whole_samples():
    assert load_recipe("tiny", ["training.batch=1000 tokens"]).samples_per_step == 4
