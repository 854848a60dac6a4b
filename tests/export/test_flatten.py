"""Code that travels: one file that does what the package does, without the package."""

import subprocess
import sys

import pytest
import torch

from genscale.export.flatten import flatten
from genscale.models.transformer import Transformer
from genscale.recipe.model import TransformerModel


def test_a_network_of_one_file_needs_no_genscale_and_computes_the_same(tmp_path):
    shape = TransformerModel(layers=2, width=16, heads=2, context=8)
    torch.manual_seed(0)
    network = Transformer(shape, 11)
    tokens = torch.arange(8)[None]
    values = {
        name: getattr(shape, name) for name in (*type(shape).model_fields, "width_of_head", "gated", "width_of_hidden")
    }
    torch.save({"weights": network.state_dict(), "tokens": tokens, "shape": values}, tmp_path / "given.pt")
    (tmp_path / "alone.py").write_text(flatten("genscale.models.transformer", "A network."))
    program = (
        "import sys, torch, types\n"
        "sys.modules['genscale'] = None\n"  # any import of it fails
        "import alone\n"
        "given = torch.load('given.pt')\n"
        "network = alone.Transformer(types.SimpleNamespace(**given['shape']), 11)\n"
        "network.load_state_dict(given['weights'])\n"
        "torch.save(network(given['tokens']).detach(), 'answer.pt')\n"
        "assert 'pydantic' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "answer.pt"), network(tokens), rtol=0, atol=0)


def package(folder, monkeypatch, **modules):
    """A package of the name that is followed, with these modules."""
    for name, text in modules.items():
        (folder / f"genscale_{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"genscale_{name}", raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(
        "genscale.export.flatten._within_package", lambda module: (module or "").startswith("genscale_")
    )


def run(source):
    found = {}
    exec(compile(source, "flat", "exec"), found)
    return found


def test_modules_come_after_what_they_need_and_private_names_stay_apart(tmp_path, monkeypatch):
    package(
        tmp_path,
        monkeypatch,
        low='"""Low."""\nimport math\n_SIZE = 2\n\ndef low():\n    return _SIZE * math.floor(1.5)\n',
        high='"""High."""\nfrom genscale_low import low\n_SIZE = 30\n\n'
        "def high():\n    from genscale_late import late\n    return _SIZE + low() + late()  # a reason\n",
        late="def late():\n    return 400\n",
    )
    source = flatten("genscale_high", "Both.")
    found = run(source)
    assert found["high"]() == 432
    assert found["__doc__"] == "Both."
    assert "# a reason" in source


def test_what_only_annotations_name_is_left_out(tmp_path, monkeypatch):
    package(
        tmp_path,
        monkeypatch,
        heavy="import nothing_that_there_is\n\nclass Heavy: ...\n",
        user="from __future__ import annotations\nfrom genscale_heavy import Heavy\n\n"
        "def take(one: Heavy | None = None) -> Heavy | None:\n    inner: Heavy | None = one\n    return inner\n",
    )
    assert run(flatten("genscale_user", ""))["take"](3) == 3


def test_a_part_of_the_recipe_becomes_a_plain_class_of_the_same_values(tmp_path, monkeypatch):
    text = "from genscale.recipe.model import TransformerModel\n\ndef shape():\n    return TransformerModel(width=48)\n"
    package(tmp_path, monkeypatch, user=text)
    monkeypatch.setattr("genscale.export.flatten._within_package", lambda module: (module or "").startswith("genscale"))
    plain, part = run(flatten("genscale_user", ""))["shape"](), TransformerModel(width=48)
    assert type(plain).__module__ != type(part).__module__
    for name in (*type(part).model_fields, "width_of_head", "gated", "width_of_hidden"):
        assert getattr(plain, name) == getattr(part, name), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from genscale_low import low as other\n\nother()\n", "line 1: an import under another name"),
        (
            "from genscale_low import low\n\ndef public():\n    low()\n",
            "genscale_low and genscale_user both define public",
        ),
    ],
)
def test_what_cannot_be_followed_is_told(tmp_path, monkeypatch, text, words):
    package(tmp_path, monkeypatch, low="def low(): ...\n\ndef public(): ...\n", user=text)
    with pytest.raises(ValueError, match=words):
        flatten("genscale_user", "")
