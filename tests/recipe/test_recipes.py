"""The recipes that are shipped: they load, they have the shapes that they name, and editors accept them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from genscale.recipe.dialect import read_yaml
from genscale.recipe.json_schema import recipe_json_schema
from genscale.recipe.load import load_recipe
from genscale.recipe.shipped import FOLDER, shipped_recipes

# Published sizes: GPT-2's checkpoint; the model cards of Llama 3.2 1B, Llama 3 8B and Llama 3 70B.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "1b": 1_235_814_400,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "405b": 405_853_388_800,
}


def parameters(model, vocabulary):
    """Weights of a transformer in closed form, from its recipe alone."""
    width, head = model.width, model.width_of_head
    queries, keys = model.heads * head, (model.key_value_heads or model.heads) * head
    attention = width * queries + 2 * width * keys + queries * width
    attention += (queries + 2 * keys) * model.query_key_value_bias + width * model.bias
    attention += 2 * head * model.query_key_norm  # the scales of the queries' and the keys' norm
    hidden = model.width_of_hidden
    feed_forward = (3 if model.gated else 2) * width * hidden + (hidden + width) * model.bias
    norm = width * (2 if model.norm == "layer" and model.bias else 1)
    embeddings = vocabulary * width * (1 if model.tied_head else 2)
    positions = model.context * width if model.positions == "learned" else 0
    return embeddings + positions + model.layers * (attention + feed_forward + 2 * norm) + norm


def vocabulary_of(recipe):
    return getattr(recipe.data.tokenizer, "vocabulary", 65)  # 65 characters in Shakespeare


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_shipped_recipe_is_named_after_its_file_and_described(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_shipped_recipes_are_the_promised_ones():
    promised = {"tiny", "demo", "shakespeare-char", "shakespeare-char-gpu", "gpt2-124m", "1b", "8b", "70b", "405b"}
    assert promised <= set(shipped_recipes())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_large_shapes_have_their_published_size(name):
    recipe = load_recipe(name)
    assert parameters(recipe.model, vocabulary_of(recipe)) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "least", "most"), [("shakespeare-char", 0.5e6, 0.8e6), ("tiny", 3e6, 4.5e6)])
def test_the_small_shapes_keep_to_their_budget(name, least, most):
    recipe = load_recipe(name)
    assert least < parameters(recipe.model, vocabulary_of(recipe)) <= most


def test_the_shakespeare_recipes_see_what_nanogpt_sees():
    cpu, gpu = load_recipe("shakespeare-char"), load_recipe("shakespeare-char-gpu")
    assert cpu.training.budget.value == 12 * 64 * 2000
    assert (cpu.samples_per_step, cpu.model.context) == (12, 64)
    assert str(gpu.training.budget) == "5k steps"
    assert (gpu.samples_per_step, gpu.model.context, gpu.model.layers, gpu.model.width) == (64, 256, 6, 384)
    assert parameters(gpu.model, 65) <= 10.7e6


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if load_recipe(name).data.kind == "text"])
def test_the_network_of_a_recipe_has_the_size_that_its_recipe_says(name):
    torch = pytest.importorskip("torch")
    from genscale.models.transformer import Transformer

    recipe = load_recipe(name)
    vocabulary = vocabulary_of(recipe)
    with torch.device("meta"):
        network = Transformer(recipe.model, vocabulary)
    assert sum(weight.numel() for weight in network.parameters()) == parameters(recipe.model, vocabulary)


def conforms(value, schema, definitions, path="recipe"):
    """A small JSON-schema check: enough for keys, kinds, types and enumerations. Yields what does not conform."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        attempts = [list(conforms(value, option, definitions, path)) for option in schema["anyOf"]]
        if all(attempts):
            yield f"{path}: {value!r} fits none of {len(attempts)}: {attempts}"
        return
    types = {
        "object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    if "type" in schema and not isinstance(value, types[schema["type"]]):
        yield f"{path}: {value!r} is no {schema['type']}"
        return
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{path}: {value!r}"
    if isinstance(value, dict) and "properties" in schema:
        for key, entry in value.items():
            if key in schema["properties"]:
                yield from conforms(entry, schema["properties"][key], definitions, f"{path}.{key}")
            else:
                yield f"{path}.{key}: unknown"
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for entry in value:
            yield from conforms(entry, schema["items"], definitions, path)


@pytest.mark.parametrize("name", shipped_recipes())
def test_editors_accept_the_shipped_recipes_by_the_schema(name):
    schema = recipe_json_schema()
    written, _ = read_yaml(shipped_recipes()[name].read_text(encoding="utf-8"), name)
    loaded = load_recipe(name, ["data.sources=[a.txt, {path: b.txt}]"]).model_dump(mode="json")
    for recipe in (written, loaded):
        assert list(conforms(recipe, schema, schema["$defs"])) == []


def test_the_schema_refuses_what_the_loader_refuses():
    schema = recipe_json_schema()
    for wrong in ({"training": {"optimiser": {}}}, {"model": {"layers": "x"}}, {"model": {"norm": "lyer"}}):
        assert list(conforms(wrong, schema, schema["$defs"]))
    assert list(conforms({"extends": "tiny.yaml", "data": {"sources": ["a.txt"]}}, schema, schema["$defs"])) == []


def test_a_wheel_carries_the_recipes(tmp_path):
    """An installed genscale has them too, not only a checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel without a network needs setuptools")
    root = FOLDER.parent.parent.parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("not running from a checkout")
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").touch()
    shutil.copytree(root / "src" / "genscale", tmp_path / "src" / "genscale")
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {Path(name).stem for name in wheel.namelist() if name.startswith("genscale/recipes/")}
    assert packed == set(shipped_recipes())
