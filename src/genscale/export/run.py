"""From a run to a folder that other libraries read: the verb ``export``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from genscale.export.diffusers import write_diffusers
from genscale.objectives.objective import Objective
from genscale.runs.disk import writing
from genscale.runs.run import Run
from genscale.runtime.errors import UserError, nearest
from genscale.training.restore import load_objective

FORMATS: dict[str, Callable[[Run, Objective, Path], None]] = {"diffusers": write_diffusers}
"""What a run can be written as, and what writes it into an empty folder."""


def export(run: Run | str | Path, to: str, out: str | Path, checkpoint: str | int = "best") -> Path:
    """Write a run's weights in another library's format; the folder.

    The folder is made aside and renamed, so that it is never there in part.

    Args:
        run: the run or its directory. Its data store is not needed.
        to: a key of :data:`FORMATS`.
        out: the folder, which must not be there yet, or be empty.
        checkpoint: ``best``, ``last``, or a step.

    Raises:
        UserError: no run, no such checkpoint or format, a run that the format cannot hold, a folder that is not empty.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    if to not in FORMATS:
        raise UserError(f"to: expected one of {', '.join(FORMATS)}, found '{to}'{nearest(to, list(FORMATS))}")
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; choose another --out")
    objective = load_objective(run, checkpoint, "cpu")
    aside = folder.with_name(f".{folder.name}.aside")
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            FORMATS[to](run, objective, aside)
            if folder.exists():
                folder.rmdir()
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return folder
