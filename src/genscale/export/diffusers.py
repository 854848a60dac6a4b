"""A diffusion run as a folder that diffusers loads offline::

    pipeline = DiffusionPipeline.from_pretrained("folder", trust_remote_code=True)
    images = pipeline(labels=["sneaker"] * 4, guidance_scale=2).images

A UNet becomes diffusers' own ``UNet2DModel``. A run that diffusers has a pipeline for (DDPM of 1,000 steps, without a
condition, on pixels) becomes a ``DDIMPipeline``, and needs no code. Else a pipeline of ours travels along, and with a
transformer or captions the network's code as well: hence ``trust_remote_code``. Schedulers are always diffusers' own,
set up so that from the same noise comes the same image:

| objective | scheduler | the sampler here that it equals |
|---|---|---|
| flow | FlowMatchEulerDiscreteScheduler | ``euler`` |
| EDM | EDMEulerScheduler | ``euler`` |
| DDPM | DPMSolverMultistepScheduler | ``dpm_solver_2m`` |
| DDPM in a DDIMPipeline, or of zero terminal SNR | DDIMScheduler | ``ddim``, where the steps divide those of training |
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from genscale.export.flatten import flatten
from genscale.export.unet import unet_config, unet_weights
from genscale.objectives.augmentation import AUGMENTATION_WIDTH
from genscale.objectives.diffusion import DDPM, EDM, Flow
from genscale.objectives.noise_levels import alpha_bar
from genscale.objectives.objective import Objective
from genscale.recipe.base import Part
from genscale.recipe.image_model import UNetModel
from genscale.recipe.image_objective import DDPMObjective, EDMObjective, FlowObjective
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.runtime.files import write_atomically


def write_diffusers(run: Run, objective: Objective, folder: Path) -> None:
    """Write the folder, which is there and empty.

    Raises:
        UserError: a run that is no diffusion model.
    """
    options = run.recipe.objective
    if not isinstance(objective, Flow | EDM | DDPM):
        raise UserError(f"to: diffusers draws with diffusion models; {run.directory} learned '{options.kind}'")
    assert isinstance(options, FlowObjective | EDMObjective | DDPMObjective)
    shape, described, told = objective.shape, objective.described, objective.conditioning.kind
    is_known = isinstance(shape, UNetModel) and told != "text"
    steps_are_usual = isinstance(options, DDPMObjective) and options.steps == 1000
    needs_no_code = is_known and told == "none" and steps_are_usual and described.autoencoder is None
    component = "unet" if needs_no_code else "denoiser"
    index: dict[str, Any] = {"_class_name": "DDIMPipeline"}
    if is_known:
        _write_known_unet(folder / component, objective)
        index[component] = ["diffusers", "UNet2DModel"]
    else:
        index[component] = [_write_denoiser(folder / component, objective), "Denoiser"]
    name, settings = _scheduler(options, divides=needs_no_code)
    index["scheduler"] = ["diffusers", name]
    _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": name, **settings})
    if not needs_no_code:
        index["_class_name"] = [_write_code(folder, "pipeline"), "GenscalePipeline"]
        index["vae"] = [None, None]
        if told == "class":
            index["id2label"] = {str(number): label for number, label in enumerate(described.classes)}
    if told == "text":
        index["caption_tokens"] = described.caption_tokens
        shutil.copy(run.tokenizer, folder / "tokenizer.json")
    if described.autoencoder is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
        shutil.copytree(described.autoencoder, folder / "vae")
    _write_json(folder / "model_index.json", index)


def _write_known_unet(folder: Path, objective: Flow | EDM | DDPM) -> None:
    assert isinstance(objective.shape, UNetModel)
    knows_classes = objective.conditioning.kind == "class"
    _write_json(folder / "config.json", unet_config(objective.shape, objective.described, knows_classes))
    _write_weights(folder, unet_weights(objective.denoiser.state_dict()))


def _write_denoiser(folder: Path, objective: Flow | EDM | DDPM) -> str:
    """Weights, configuration and code; the name of the code."""
    described = objective.described
    told_changes = objective.augmentation is not None and not objective.augmentation.leaky
    config = {
        "_class_name": "Denoiser",
        "kind": objective.shape.kind,
        "shape": _values(objective.shape),
        "described": asdict(replace(described, autoencoder=None)),
        "conditioning": objective.conditioning.kind,
        "augmentation_width": AUGMENTATION_WIDTH if told_changes else 0,
        "in_channels": described.channels,
        "sample_size": described.resolution,
    }
    _write_json(folder / "config.json", config)
    _write_weights(folder, {f"network.{name}": each for name, each in objective.denoiser.state_dict().items()})
    return _write_code(folder, "denoiser")


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_code(folder: Path, name: str) -> str:
    """Write ``diffusers_<name>.py``, with all it needs of the package, as one file; what it is called, which tells its
    content: diffusers keeps the code of all folders in one place, by name."""
    code = flatten(f"genscale.export.diffusers_{name}", f"Written by genscale: the {name} of a diffusion model.")
    called = f"genscale_{name}_{hashlib.blake2b(code.encode(), digest_size=4).hexdigest()}"
    write_atomically(folder / f"{called}.py", code)
    return called


def _scheduler(options: FlowObjective | EDMObjective | DDPMObjective, divides: bool) -> tuple[str, dict[str, Any]]:
    """The name of diffusers' scheduler for an objective, and its settings; ``divides``: the one of DDIMPipeline."""
    if isinstance(options, FlowObjective):
        return "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": options.shift}
    if isinstance(options, EDMObjective):
        return "EDMEulerScheduler", {
            "sigma_min": options.sigma_min,
            "sigma_max": options.sigma_max,
            "sigma_data": options.sigma_data,
            "rho": options.rho,
            "sigma_schedule": "karras",
            "prediction_type": "epsilon",
            "final_sigmas_type": "zero",
        }
    plain = alpha_bar(options.model_copy(update={"zero_terminal_snr": False})).tolist()
    before = [1.0, *plain[:-1]]
    shared = {
        "num_train_timesteps": options.steps,
        "trained_betas": [1 - now / last for now, last in zip(plain, before, strict=True)],
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[options.prediction],
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": options.zero_terminal_snr,
    }
    if options.zero_terminal_snr or divides:
        return "DDIMScheduler", {**shared, "clip_sample": False, "set_alpha_to_one": True}
    return "DPMSolverMultistepScheduler", {
        **shared,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "lower_order_final": False,
    }


def _values(part: Part) -> dict[str, Any]:
    """A recipe's part with what it computes: networks read both."""
    computed = {name: getattr(part, name) for name, value in vars(type(part)).items() if isinstance(value, property)}
    fields = {name: getattr(part, name) for name in type(part).model_fields}
    return {name: _values(value) if isinstance(value, Part) else value for name, value in (fields | computed).items()}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
