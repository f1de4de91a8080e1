"""Frozen weights in shares, for models that no GPU holds whole: torch's fully sharded data parallel (FSDP2).

Each process keeps a share of every layer's frozen weights, and has them whole only while it computes the layer. What is
trained, an adapter and the signal, is small, so every process keeps all of it and the gradients are averaged once a
step: it is saved and resumed as without shares.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from model.cache_keyword import base_of
from training.errors import RecipeError


def share_frozen(model: nn.Module, device: torch.device) -> None:
    """Leave each process a share of the frozen weights of every layer, and put what is left whole on `device`.

    Args:
        model: a model of transformers with an adapter, in the process group of all processes.
        device: where this process computes.

    Raises:
        RecipeError: if the architecture does not say what its layers are.
    """
    kinds = base_of(model)._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise RecipeError(f"fsdp: {type(base_of(model)).__name__} does not say what its layers are")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    model.to(device)


def prepare(trainer: Any) -> None:
    """Make a trainer take a model in shares as it is: its own wrapper for several processes refuses them."""
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # its autocast, and no wrapper
    trainer.model._is_accelerate_prepared = True


def average_gradients(model: nn.Module) -> None:
    """Give every process the mean of all processes' gradients, in one message."""
    gradients = [one.grad for one in model.parameters() if one.requires_grad and one.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
