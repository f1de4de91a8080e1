"""Write the weights of a small module of ours."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def write(module: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the module's state in float32, readable for all."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)  # safetensors makes files that only their owner may read
