from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from genscale.data.store import Store
from genscale.evaluation.kneser_ney import KneserNey
from genscale.evaluation.run import evaluate
from genscale.recipe.load import recipe_from_mapping
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.training.restore import load_objective
from genscale.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A few steps on a few files: just enough to have a checkpoint."""
    folder = tmp_path_factory.mktemp("evaluation")
    library = Path(sysconfig.get_path("stdlib"))
    recipe = {
        "run": str(folder / "run"),
        "data": {
            "sources": [str(library / f"{name}.py") for name in ("argparse", "calendar", "csv")],
            "store": str(folder / "store"),
            "tokenizer": {"kind": "characters"},
            "split": {"by": "tail", "validation": 0.05},
        },
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 32},
        "training": {"budget": "3 steps", "batch": "4 samples"},
        "layout": {"device": "cpu", "precision": "fp32", "compile": False, "micro_batch": 4},
    }
    return train(recipe_from_mapping(recipe), show_progress=False)


def test_scores_every_held_out_token_with_the_weights_of_the_checkpoint(run: Run) -> None:
    scores = evaluate(run, "last", device="cpu")
    store = Store.open(run.store)
    tokens = np.concatenate(store.shards("validation")).astype(np.int64)
    network = load_objective(run, "last", "cpu").networks["model"]
    nats = 0.0
    for start in range(0, len(tokens) - 1, 32):  # one window at a time, without padding
        window = torch.from_numpy(tokens[start : start + 33])
        with torch.no_grad():
            logits = network(window[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert scores["tokens"] == len(tokens) - 1
    assert scores["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    text = store.tokenizer.decode([token for token in tokens.tolist() if token != store.tokenizer.end_of_document])
    bits = scores["loss"] * len(tokens) / math.log(2)
    assert scores["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-6)


def test_baselines_are_fitted_to_the_training_split_and_score_the_same_tokens(run: Run) -> None:
    store = Store.open(run.store)
    baselines = evaluate(run, device="cpu")["baselines"]
    assert set(baselines) == {"3-gram", "5-gram"}
    model = KneserNey(3, store.tokenizer.size).fit(store.shards("train"))
    assert baselines["3-gram"] == model.loss(store.shards("validation"))


def test_baselines_fitted_to_a_part_say_so(run: Run) -> None:
    assert set(evaluate(run, device="cpu", baseline_tokens=2000)["baselines"]) == {
        "3-gram of 2,000 tokens",
        "5-gram of 2,000 tokens",
    }


def test_scores_are_recorded_with_the_run_beside_its_other_facts(run: Run) -> None:
    before = Run.open(run.directory).facts
    scores = evaluate(run.directory, device="cpu")
    assert scores["recorded"] is True
    facts = json.loads((run.directory / "facts.json").read_text())
    assert facts["baselines"] == scores["baselines"]
    assert facts["held_out"]["loss"] == scores["loss"]
    assert facts["held_out"]["checkpoint"] == "best"
    assert before.keys() <= facts.keys()
    assert facts["status"] == "finished"


def test_a_run_in_use_is_scored_but_not_written_to(run: Run) -> None:
    before = (run.directory / "facts.json").read_bytes()
    with run.lock():
        scores = evaluate(run.directory, "last", device="cpu")
    assert scores["recorded"] is False
    assert (run.directory / "facts.json").read_bytes() == before


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        evaluate(tmp_path)
