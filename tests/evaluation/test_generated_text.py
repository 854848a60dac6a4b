from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genscale.data.store import Store, write_store
from genscale.data.tokenizer import character_tokenizer
from genscale.evaluation import generated_text as module
from genscale.evaluation.generated_text import evaluate_novelty
from genscale.generation.text import Completion
from genscale.objectives.objective import Objective
from genscale.runtime.errors import UserError

LETTERS = "abcdefghij"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    random = np.random.default_rng(0)
    splits = {
        "train": [random.integers(10, size=4000), random.integers(10, size=4000)],
        "validation": [random.integers(10, size=1500)],
    }
    return write_store(
        tmp_path / "store", splits, character_tokenizer(LETTERS, end_of_document=False), shard_tokens=5000
    )


def writes(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def generate(objective, tokenizer, prompts, sampling, count, seed):  # type: ignore[no-untyped-def]
        asked.append(
            {"prompts": prompts, "tokens": sampling.tokens, "temperature": sampling.temperature, "count": count}
        )
        return [Completion("", text, index, "length") for index, text in enumerate(texts)]

    monkeypatch.setattr(module, "generate", generate)
    return asked


def text_of(tokens: np.ndarray) -> str:
    return "".join(LETTERS[token] for token in tokens.tolist())


def test_a_copied_text_is_told_and_shown(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = text_of(store.shards("train")[0][100:400])
    fresh = text_of(np.random.default_rng(5).integers(10, size=300))
    asked = writes([fresh, copied], monkeypatch)
    scores = evaluate_novelty(Objective(), store.tokenizer, [store], texts=2, tokens=300)
    assert asked == [{"prompts": [""], "tokens": 300, "temperature": 1.0, "count": 2}]
    assert scores["verbatim"] == 0.5
    assert scores["longest_copy"] == 256, "runs are followed that far"
    assert scores["longest_copy_text"] in copied
    assert (scores["texts"], scores["tokens"]) == (2, 600)
    json.dumps(scores, allow_nan=False)


def test_fresh_text_is_as_new_as_held_out_text(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(6)
    writes([text_of(random.integers(10, size=200)) for _ in range(6)] + [""], monkeypatch)
    scores = evaluate_novelty(Objective(), store.tokenizer, [store], texts=7, tokens=200)
    assert scores["texts"] == 6
    assert scores["verbatim"] == scores["verbatim_held_out"] == 0
    np.testing.assert_allclose(scores["novel_ngrams"], scores["novel_ngrams_held_out"], atol=0.05)
    assert scores["novel_ngrams"][0] == 0
    # 8,000 tokens hold about 1 - e^-0.8 of the 10,000 4-grams
    assert scores["novel_ngrams"][3] == pytest.approx(np.exp(-0.8), abs=0.05)


def test_texts_without_any_tokens_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    writes(["", ""], monkeypatch)
    with pytest.raises(UserError, match="none of 2 texts has any tokens"):
        evaluate_novelty(Objective(), store.tokenizer, [store], texts=2)
