"""Sampling from a run directory, which needs nothing but the run."""

import pytest

from genscale.data.description import TextDescription
from genscale.data.tokenizer import character_tokenizer
from genscale.generation.run import sample
from genscale.objectives.build import build_objective
from genscale.recipe.load import recipe_from_mapping
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.training.checkpoint import CheckpointStore

TOKENIZER = character_tokenizer("abcdefgh ")


@pytest.fixture
def run(tmp_path):
    recipe = recipe_from_mapping(
        {
            "run": str(tmp_path / "run"),
            "model": {"layers": 1, "width": 16, "heads": 2, "context": 16, "initial_std": 0.7},
            "sampling": {"prompts": ["bad", "cafe"], "tokens": 6, "temperature": 0},
            "data": {"tokenizer": {"kind": "characters"}},
        }
    )
    made = Run.create(tmp_path / "run", recipe, "fingerprint")
    TOKENIZER.save(made.tokenizer)
    store = CheckpointStore(made.checkpoints, keep_last=2)
    for step, seed in ((10, 1), (20, 2)):
        objective = build_objective(recipe.model_copy(update={"seed": seed}), TextDescription(TOKENIZER.size))
        weights = objective.networks["model"].state_dict()
        tensors = {f"networks.model.{name}": tensor for name, tensor in weights.items()}
        store.save(step, tensors, {}, best=step == 10, wait=True)
    return made


def test_defaults_are_the_runs_own(run):
    done = sample(run)
    assert [completion.prompt for completion in done] == ["bad", "cafe"]
    assert all(len(completion.text) == 6 or completion.stopped == "end" for completion in done)
    assert sample(run.directory) == done
    assert sample(str(run.directory), ["cafe"])[0].text == done[1].text  # greedy: no draw


def test_checkpoints_are_chosen_by_name_or_step(run):
    best, last = sample(run), sample(run, checkpoint="last")
    assert best != last
    assert sample(run, checkpoint=10) == best
    assert sample(run, checkpoint=20) == last
    with pytest.raises(UserError, match="30"):
        sample(run, checkpoint=30)


def test_overrides_and_counts(run):
    done = sample(run, ["a"], count=3, tokens=9, temperature=1.0, seed=1)
    assert [completion.index for completion in done] == [0, 1, 2]
    assert len({completion.text for completion in done}) == 3
    assert sample(run, ["a"], count=3, tokens=9, temperature=1.0, seed=1) == done
    heard = {}
    streamed = sample(run, ["a"], count=3, tokens=9, temperature=1.0, seed=1,
                      on_text=lambda index, text: heard.update({index: heard.get(index, "") + text}))  # fmt: skip
    assert heard == {completion.index: completion.text for completion in streamed}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"top_p": 3}, r"top_p: expected at most 1, found 3"),
        ({"count": 0}, "at least 1, not 0"),
        ({"suffix": "bad"}, "objective.kind: infill"),
        ({"prompts": ["axe"]}, "the character 'x'"),
    ],
)
def test_mistakes_are_told_in_one_line(run, how, words):
    with pytest.raises(UserError, match=words) as error:
        sample(run, **how)
    assert "\n" not in str(error.value)


def test_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        sample(tmp_path)
