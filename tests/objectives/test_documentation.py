"""The objective in docs/objectives.md is one: it trains and it samples."""

import re
from pathlib import Path

import torch

from genscale.data.batch import TextBatch
from genscale.data.description import TextDescription
from genscale.objectives.decoding import TextRequest
from genscale.recipe.model import TransformerModel
from genscale.recipe.schema import Recipe
from genscale.runtime.randomness import Rng


def test_the_documented_objective_learns_to_count_backwards():
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    recipe = Recipe(model=TransformerModel(layers=1, width=32, heads=2, context=16))
    objective = names["BackwardLanguage"](recipe, TextDescription(6))
    tokens = (torch.arange(6)[:, None] + torch.arange(17)) % 6
    batch = TextBatch(tokens, torch.zeros_like(tokens, dtype=torch.int32), None, torch.arange(6))
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    for step in range(40):
        rng = Rng(0, step, "train", batch.positions)
        loss = objective.loss(objective.phases[0], batch, rng, {})
        (loss.total / objective.weight(objective.phases[0], batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    request = TextRequest([[5, 4, 3], [0]], tokens=4, temperature=0.0)
    samples = objective.sample(request, Rng(0, 0, "sample", torch.arange(2)))
    assert [sample.tokens for sample in samples] == [[2, 1, 0, 5], [5, 4, 3, 2]]
