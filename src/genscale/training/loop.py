"""The one training loop. It runs any objective and never asks which kind it has."""

from __future__ import annotations

from typing import Any, Literal

from genscale.evaluation.held_out import held_out
from genscale.parallel.traffic import Traffic, axes_of, measured_traffic
from genscale.runtime.errors import UserError
from genscale.runtime.peak import measured_anew
from genscale.runtime.world import from_rank_0
from genscale.training.average_snapshots import averages_folder, drop_later, write_snapshot
from genscale.training.guard import Verdict
from genscale.training.job import Job
from genscale.training.meter import Meter
from genscale.training.power_average import PowerAverage
from genscale.training.precision import autocast, torch_dtype
from genscale.training.step import accumulate, apply, clear, reshard


def run_steps(job: Job) -> None:
    """Train until the budget is spent, validation stops improving, or somebody interrupts; then save."""
    plan, progress = job.plan, job.progress
    meter = Meter(progress.seconds)
    saved = progress.step  # a run begins with a checkpoint, read or written; again, it would no longer be the best
    while not job.done and not job.interruption.requested():
        step = progress.step
        meter.start()
        job.profile.begin(step)
        if step == job.measured_step:
            with measured_traffic(axes_of(*job.mesh.meshes)) as traffic:
                measured, verdict = train_step(job, step)
            tell_traffic(job, traffic)
        else:
            measured, verdict = train_step(job, step)
        if verdict is Verdict.ROLLBACK:
            go_back(job)
            progress, saved = job.progress, job.progress.step
            continue
        for outer in job.state.outer.values():
            before = outer.bytes_sent
            outer.after_step(step + 1)
            if step + 1 == plan.steps:
                outer.finish(step + 1)
            progress.exchanged += outer.bytes_sent - before
        for average in job.state.averages.values():
            average.update(plan.batch)
        job.profile.end(step)
        meter.stop(plan.batch)
        progress.step, progress.seconds = step + 1, meter.elapsed
        if plan.snapshot_every and plan.due(plan.snapshot_every, step):
            keep_snapshots(job)
        log_step(job, step, measured, meter)
        scored = plan.due(plan.validate_every, step) or job.done
        best = scored and validate(job)
        if best or plan.due(plan.checkpoint_every, step):
            job.checkpoints.save(progress.step, job.state.saved_tensors(), job.facts(), best=best)
            saved = progress.step
    if saved != progress.step:
        job.checkpoints.save(progress.step, job.state.saved_tensors(), job.facts())
    job.checkpoints.wait()


def tell_traffic(job: Job, traffic: Traffic) -> None:
    """What a step sent, in the run's facts and events."""
    from_rank_0(lambda: job.run.record(traffic=traffic.facts()))
    rows = ", ".join(f"{row.collective} along {row.axis} {row.bytes / 1e6:.3g} MB" for row in traffic.table()[:4])
    waiting = "" if traffic.waiting is None else f"; {traffic.waiting:.0%} of the step was waiting"
    job.event("traffic", f"a step sends {traffic.bytes / 1e6:.3g} MB from each process: {rows}{waiting}")


def train_step(job: Job, step: int) -> tuple[dict[str, float], Verdict]:
    """All phases of a step; what was measured, and the worst verdict on it."""
    measured: dict[str, float] = {}
    sound = True
    for phase in job.objective.phases:
        guard = job.guards[phase.name]
        if step % phase.every or step in guard.skipped:
            continue
        values = accumulate(job, phase, step)
        if job.state.scaler.overflowed(values["loss"], values["gradient_norm"]):
            clear(job)
            sound = False
            continue
        verdict = guard.observe(step, values["loss"], values["gradient_norm"])
        if verdict is Verdict.GOOD:
            apply(job, phase, step, values["gradient_norm"])
        clear(job)
        if verdict is not Verdict.GOOD:
            warn(job, phase.name, step, values, verdict)
            sound = False
        if verdict is Verdict.ROLLBACK:
            return measured, verdict
        prefix = f"{phase.name}_" if len(job.objective.phases) > 1 else ""
        measured |= {prefix + name: value for name, value in values.items()}
    if sound:
        job.objective.observe(measured, job.plan.batch)
    return measured, Verdict.GOOD


def warn(job: Job, phase: str, step: int, values: dict[str, float], verdict: Verdict) -> None:
    """Say what was wrong with a step and what is done about it; raises UserError when training is given up."""
    what = f"step {step + 1}: {phase} loss {values['loss']:.4g}, gradient norm {values['gradient_norm']:.4g}"
    if verdict is Verdict.GIVE_UP:
        job.event("give_up", f"{what}: bad again after going back")
        raise UserError(
            f"{what}: still bad after going back {job.recipe.training.guard.rollbacks} times; "
            "try a lower learning rate, longer warm-up, smaller gradient_clip, or look at the data of these steps"
        )
    done = "skipped" if verdict is Verdict.SKIP else "going back to the last good checkpoint"
    job.event("bad_step", f"{what}: {done}", verdict=done)


def go_back(job: Job) -> None:
    """Return to a checkpoint from before the trouble; the steps that led into it stay skipped, also after a restart."""
    memories = {name: guard.memory() for name, guard in job.guards.items()}
    trusted = min(guard.trusted_until for guard in job.guards.values() if guard.trusted_until is not None)
    job.checkpoints.wait()
    steps = from_rank_0(job.checkpoints.steps)
    restore(job, max((step for step in steps if step <= trusted), default=min(steps)))
    for name, memory in memories.items():
        job.guards[name].remember(memory)
    # Saving drops the later checkpoints: a run killed from here on goes on from this one, with what was remembered.
    best = job.progress.best_step == job.progress.step
    job.checkpoints.save(job.progress.step, job.state.saved_tensors(), job.facts(), best=best, wait=True)
    job.event("rollback", f"went back to step {job.progress.step:,}")


def whole_nowhere(job: Job) -> bool:
    """Whether processes may have parts of the state that others do not."""
    return job.recipe.layout.sharded or bool(job.state.outer)


def restore(job: Job, which: int | Literal["last"] = "last") -> bool:
    """Load a checkpoint, by default the newest intact one; False when there is none yet."""
    if job.checkpoints.is_empty():
        return False
    try:
        checkpoint = job.checkpoints.load(which, into=job.state.room_for if whole_nowhere(job) else None)
    except UserError as error:
        raise UserError(f"{error}; delete {job.checkpoints.folder} to begin anew") from None
    job.state.load(checkpoint.tensors, checkpoint.step)
    job.load_facts(checkpoint.facts)
    for warning in checkpoint.warnings:
        job.event("damaged_checkpoint", warning)
    if job.leads:
        forget(job, job.progress.step)
    return True


def forget(job: Job, after_step: int) -> None:
    """Drop what was kept of later steps, which are about to be run again."""
    job.run.truncate_metrics(after_step)
    drop_later(averages_folder(job.run), after_step * job.plan.batch)


def keep_snapshots(job: Job) -> None:
    """Of averages from which others are put together after training."""
    for name, average in job.state.averages.items():
        if isinstance(average, PowerAverage):
            samples = job.progress.step * job.plan.batch
            write_snapshot(averages_folder(job.run), name, samples, average.snapshot())


def log_step(job: Job, step: int, measured: dict[str, float], meter: Meter) -> None:
    """A line of the log, every ``log_every`` steps and at the end."""
    plan, done = job.plan, step + 1
    if done % job.recipe.training.log_every and done != plan.steps:
        return
    rate = meter.samples_per_second()
    values: dict[str, float] = {
        "samples": done * plan.batch,
        **measured,
        "learning_rate": next(iter(job.state.optimizers.values())).param_groups[0]["lr"],
        "samples_per_second": rate,
        "utilisation": utilisation(job, rate),
        "seconds": job.progress.seconds,
        "checkpoint_pause_seconds": job.checkpoints.pause_seconds,
    }
    if plan.clock.tokens_per_sample:
        values["tokens"] = values["samples"] * plan.clock.tokens_per_sample
        values["tokens_per_second"] = rate * plan.clock.tokens_per_sample
    publish(job, done, values)
    for line in job.stragglers.slow_ranks():
        job.event("slow_rank", line)
    for kind, concern in job.objective.concerns(measured).items():
        if kind not in job.progress.concerns:
            job.progress.concerns.append(kind)
            job.event(kind, concern)
    per_second = "tokens_per_second" if plan.clock.tokens_per_sample else "samples_per_second"
    job.display.update(
        done,
        losses={name.removesuffix("_loss"): value for name, value in measured.items() if name.endswith("loss")},
        rate=(values[per_second], per_second.split("_")[0]),
        utilisation=values["utilisation"],
        utilisation_kind=f"{job.peak.kind} peak",
        learning_rate=values["learning_rate"],
        seconds_left=(plan.steps - done) * plan.batch / rate if rate else None,
    )


def utilisation(job: Job, samples_per_second: float) -> float:
    """The part of the ranks' matrix peak that is used; a peak that turns out too low is measured anew."""
    flops = samples_per_second * job.flops_per_sample / job.world.size
    if job.leads and flops > job.peak.flops and job.peak.kind == "measured":
        job.peak = measured_anew(job.device, torch_dtype(job.precision))
        job.run.record(peak=job.peak._asdict())
    return flops / job.peak.flops


def validate(job: Job) -> bool:
    """Score the held-out data, draw the report's samples, and say whether this is the best so far."""
    progress, plan = job.progress, job.plan
    job.watch.at(progress.step - 1, "validation")
    reshard(job)
    with job.state.evaluation_weights():
        scores = held_out(
            job.objective,
            job.validation,
            seed=job.recipe.seed,
            batch=job.micro_batch,
            limit=plan.validation_windows,
            device=job.device,
            autocast=lambda: autocast(job.precision, job.device),
            world=job.world,
            data=job.mesh.data,
        )
        reshard(job)
        for number, sample in enumerate(job.preview()):
            keep_sample(job, number, sample)
    best = progress.best_loss is None or scores["loss"] < progress.best_loss
    if best:
        progress.best_step, progress.best_loss = progress.step, scores["loss"]
    if job.early_stopping and job.early_stopping.observe(progress.step, scores["loss"]):
        progress.stopped_early = True
        job.event("early_stop", f"validation has not improved since step {progress.best_step}: stopped early")
    publish(job, progress.step, {f"validation_{name}": value for name, value in scores.items()})
    job.display.update(progress.step, validation_loss=scores["loss"], best=progress.best_loss)
    return best


def keep_sample(job: Job, number: int, sample: dict[str, str | bytes]) -> None:
    """To the run directory and the trackers; a PNG becomes a file of its own."""
    step, name = job.progress.step, f"samples/{number}"
    kept: dict[str, str] = {}
    for key, value in sample.items():
        if isinstance(value, bytes):
            kept[key] = job.run.keep_image(step, number, value)
            job.tracker.image(step, name, value)
        else:
            kept[key] = value
    job.run.log_sample(step, **kept)
    text = "".join(value for value in sample.values() if isinstance(value, str))
    if text:
        job.tracker.text(step, name, text)


def publish(job: Job, step: int, values: dict[str, Any]) -> None:
    """To ``metrics.jsonl`` and the trackers."""
    if job.leads:
        job.run.log_metrics(step, **values)
        job.tracker.log(step, values)
