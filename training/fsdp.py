"""Frozen weights in shares, for models that no GPU holds whole: torch's fully sharded data parallel (FSDP2).

Each process keeps a share of every layer's frozen weights, and has them whole only around computing the layer. What is
trained, an adapter and the signal, is small, so every process keeps all of it and the gradients are averaged once a
step: it is saved and resumed as without shares.
"""

from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from model.cache_keyword import base_of
from training.errors import RecipeError


def share_frozen(model: PeftModel, device: torch.device) -> None:
    """Leave each process a share of the frozen weights of every layer, and put what is left whole on `device`.

    Args:
        model: a model of transformers with an adapter, in the process group of all processes.
        device: where this process computes.

    Raises:
        RecipeError: if the architecture does not say what its layers are.
    """
    base: Any = base_of(model)
    kinds = base._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise RecipeError(f"fsdp: {type(base).__name__} does not say what its layers are")
    how: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "reshard_after_forward": True,
    }
    for layer in reversed(layers):  # what is inside another first
        fully_shard(layer, ignored_params={one for one in layer.parameters() if one.requires_grad}, **how)
    # Around them all, so that one layer is gathered while another is computed; nothing else is shared out. It must be a
    # module that is called: peft skips the hooks of the model in it, and transformers knows its decoder by its class.
    around = model.base_model
    fully_shard(around, ignored_params={one for one in around.parameters() if not isinstance(one, DTensor)}, **how)
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
