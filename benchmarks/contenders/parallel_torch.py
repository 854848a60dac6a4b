"""The straight loop on some ranks: torch's DistributedDataParallel, or its fully_shard on each block and the rest."""

from __future__ import annotations

import nanogpt
import torch
from figures import Figures
from kernels import milliseconds_by_category
from ranks import RANKS, arguments, autocast, device, own_windows, report
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, supported_activities

PROFILED = 3


def main() -> None:
    shape, folder, precision, steps, how, options = arguments()
    place = device()
    torch.manual_seed(0)
    if RANKS > 1:
        distributed.init_process_group("gloo" if place.type == "cpu" else "nccl")
    network = nanogpt.GPT(shape).to(place)
    if place.type != "cpu":
        torch.set_default_device(place)  # for the positions that the model makes
    forward: torch.nn.Module = network
    if "compile" in options:
        for block in network.blocks:
            block.compile()
    if how == "shard":
        mesh = init_device_mesh(place.type, (RANKS,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision == "bf16" else None)
        for block in network.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)
    elif how == "replicate":
        forward = DistributedDataParallel(network)
    decayed = [parameter for parameter in network.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    figures = Figures(shape.tokens)
    recorded: list[profile] = []
    for step, window in zip(range(steps), own_windows(folder, shape), strict=False):
        if "profile" in options and step == steps - PROFILED:
            recorded.append(profile(activities=list(supported_activities())))
            recorded[0].start()
        tokens = window.to(place)
        with autocast(precision, place):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        figures.step(loss.item())
    if recorded:
        recorded[0].stop()
        report(figures, steps, milliseconds=milliseconds_by_category(recorded[0], PROFILED))
    else:
        report(figures, steps)
    if RANKS > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
