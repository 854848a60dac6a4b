import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from genscale.recipe.load import recipe_from_mapping
from genscale.recipe.schema import Recipe
from genscale.runs.environment import environment
from genscale.runs.run import FREE, Run
from genscale.runtime.errors import UserError


def recipe(**changes: object) -> Recipe:
    return recipe_from_mapping({"name": "tiny", "seed": 3, **changes})


def begun(directory: Path) -> Run:
    """A run that has its first checkpoint."""
    run = Run.create(directory, recipe(), "f00d")
    (run.checkpoints / "step-00000000").mkdir(parents=True)
    return run


def test_a_new_run_records_recipe_data_and_environment(tmp_path):
    run = Run.create(tmp_path / "runs" / "tiny", recipe(), "f00d")
    assert not run.resumed
    again = Run.open(tmp_path / "runs" / "tiny")
    assert again.recipe == recipe()
    assert again.data_fingerprint == "f00d"
    assert again.store == Path.cwd() / "stores" / "tiny"
    assert again.facts["status"] == "created"
    assert again.facts["environment"]["python"] == ".".join(map(str, __import__("sys").version_info[:3]))


def test_the_environment_is_json_and_knows_versions_and_commit():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert all(facts[name] for name in ("genscale", "torch", "processor", "cores"))
    assert facts["commit"] is None or len(facts["commit"].removesuffix("-dirty")) == 40


def test_the_same_recipe_and_data_go_on_and_nothing_is_rewritten(tmp_path):
    first = Run.create(tmp_path, recipe(), "f00d")
    first.log_metrics(1, loss=2.0)
    first.record(status="stopped")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    second = Run.create(tmp_path, recipe(), "f00d")
    assert second.resumed
    assert second.facts["status"] == "stopped"
    assert second.metrics() == [{"step": 1, "loss": 2.0}]
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_another_recipe_is_refused_with_the_difference_on_one_line(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError) as caught:
        Run.create(tmp_path, recipe(training={"batch": "32 samples"}), "f00d")
    message = str(caught.value)
    assert message == (
        f"{tmp_path} holds another run: training.batch: 64 samples -> 32 samples; "
        "choose another `run=` or delete that directory"
    )
    assert Run.open(tmp_path).recipe == recipe()


def test_many_differences_are_cut_to_three(tmp_path):
    begun(tmp_path)
    other = recipe(seed=4, training={"batch": "32 samples", "budget": "3 steps", "gradient_clip": 2.0}, name="big")
    with pytest.raises(UserError, match=r" and 2 more; choose another"):
        Run.create(tmp_path, other, "f00d")


def test_other_data_is_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError, match="holds another run: its data has the fingerprint f00d, not beef"):
        Run.create(tmp_path, recipe(), "beef")


def test_a_run_that_never_came_to_a_checkpoint_is_not_in_the_way(tmp_path):
    Run.create(tmp_path, recipe(), "f00d").record(decisions={"precision": "fp16"})
    other = recipe(seed=4)
    with Run.open(tmp_path).lock(), pytest.raises(UserError, match="is using"):
        Run.create(tmp_path, other, "beef")
    run = Run.create(tmp_path, other, "beef")
    assert (run.resumed, run.recipe, run.data_fingerprint) == (False, other, "beef")
    assert Run.open(tmp_path).facts == run.facts
    assert "decisions" not in run.facts


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_that_holds_the_run(tmp_path):
    run = begun(tmp_path)
    run.weights.mkdir()
    before = set(tmp_path.rglob("*"))
    for name in (".facts.json.7.aside", ".metrics.jsonl.7.aside", "weights/.model.safetensors.7.aside"):
        (tmp_path / name).write_text("half")
    with run.lock():
        assert set(tmp_path.rglob("*")) == before


CHANGES = {
    "description": {"description": "new words"},
    "run": {"run": "elsewhere/{name}"},
    "data.store": {"data": {"store": "moved/{name}"}},
    "training.checkpoints": {"training": {"checkpoints": {"keep_last": 7}}},
    "training.trackers": {"training": {"trackers": {"tensorboard": True}}},
    "training.log_every": {"training": {"log_every": 3}},
    "training.profile": {"training": {"profile": [3, 5]}},
    "layout.device": {"layout": {"device": "cpu"}},
    "layout.micro_batch": {"layout": {"micro_batch": 2}},
    "layout.compile": {"layout": {"compile": False}},
    "layout.recompute": {"layout": {"recompute": "full"}},
    "layout.replicate": {"layout": {"replicate": 2}},
    "layout.shard": {"layout": {"shard": 2}},
    "layout.tensor": {"layout": {"tensor": 2}},
    "layout.sequence": {"layout": {"sequence": False}},
    "layout.pipeline": {"layout": {"pipeline": 2}},
    "layout.schedule": {"layout": {"schedule": "gpipe"}},
    "layout.stages": {"layout": {"stages": 3}},
    "layout.context": {"layout": {"context": 2}},
    "layout.attention": {"layout": {"attention": "all_gather"}},
    "layout.expert": {"layout": {"expert": 2}},
    "layout.offload": {"layout": {"offload": True, "shard": 2}},
    "sampling": {"sampling": {"prompts": ["def "], "temperature": 0.1}},
}


def test_every_free_key_has_its_test():
    assert set(CHANGES) == set(FREE)


@pytest.mark.parametrize("key", FREE)
def test_a_key_that_changes_nothing_learned_may_change_and_is_recorded(tmp_path, key):
    Run.create(tmp_path, recipe(), "f00d")
    changed = recipe(**CHANGES[key])
    assert changed != recipe()
    assert Run.create(tmp_path, changed, "f00d").resumed
    again = Run.open(tmp_path)
    assert again.recipe == changed
    assert again.store == Path(changed.store_directory).absolute()


def test_a_directory_with_other_files_is_never_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.txt\)"):
        Run.create(tmp_path, recipe(), "f00d")
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        Run.create(tmp_path / "thesis.txt", recipe(), "f00d")


def test_what_a_killed_creation_left_is_taken_over(tmp_path):
    for name in ("lock", "facts.json", ".recipe.yaml.123.aside", ".facts.json.123.aside"):
        (tmp_path / name).write_text("half")
    run = Run.create(tmp_path, recipe(), "f00d")
    assert not run.resumed
    assert Run.open(tmp_path).data_fingerprint == "f00d"


def test_open_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="is not a directory; `genscale train RECIPE` makes one"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        Run.open(tmp_path)
    Run.create(tmp_path, recipe(), "f00d")
    (tmp_path / "facts.json").write_text('{"data": "f0')
    with pytest.raises(UserError, match=r"facts\.json cannot be read"):
        Run.open(tmp_path)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere; become nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_place_is_one_clear_line():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Run.create(folder / "there", recipe(), "f00d")
        for path in (folder, folder / "there"):
            path.chmod(0o555)
        try:
            with unprivileged(), pytest.raises(UserError, match=r"cannot write .*new: permission denied"):
                Run.create(folder / "new", recipe(), "f00d")
            run = Run.open(folder / "there")
            with unprivileged(), pytest.raises(UserError, match=r"cannot write .*facts\.json: permission denied"):
                run.record(status="running")
            with unprivileged(), pytest.raises(UserError, match=r"cannot write .*events\.jsonl: permission denied"):
                run.log_event("stop", "done")
        finally:
            for path in (folder, folder / "there"):
                path.chmod(0o755)


def test_facts_are_added_to_and_kept(tmp_path):
    run = Run.create(tmp_path, recipe(), "f00d")
    run.record(status="running", precision="bf16")
    run.record(status="finished")
    facts = Run.open(tmp_path).facts
    assert (facts["status"], facts["precision"], facts["data"]) == ("finished", "bf16", "f00d")
    run.facts["status"] = "tampered"
    assert run.facts["status"] == "finished"


def test_no_step_stands_twice_in_metrics_or_samples_after_going_back(tmp_path):
    run = Run.create(tmp_path, recipe(), "f00d")
    for step in (10, 20, 30):
        run.log_metrics(step, loss=1.0 / step)
        run.log_sample(step, text="abc")
    run.log_event("rollback", "back to step 20", step=30)
    run.truncate_metrics(after_step=20)
    run.log_metrics(30, loss=0.5)
    assert run.metrics() == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 30, "loss": 0.5}]
    assert [sample["step"] for sample in run.samples()] == [10, 20]
    assert [(event["kind"], event["message"], event["step"]) for event in run.events()] == [
        ("rollback", "back to step 20", 30)
    ]


def test_a_run_in_use_may_be_opened_but_not_locked_or_changed(tmp_path):
    run = Run.create(tmp_path, recipe(), "f00d")
    with run.lock():
        other = Run.create(tmp_path, recipe(), "f00d")
        with pytest.raises(UserError, match="is using"), other.lock():
            pass
        with pytest.raises(UserError, match="is using"):
            Run.create(tmp_path, recipe(description="changed"), "f00d")
    assert Run.open(tmp_path).recipe == recipe()
