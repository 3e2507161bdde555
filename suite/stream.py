"""A model larger than the memory: its decoder layers are read from safetensors one at a time, and leave again.

`open_model` builds the architecture without weights, reads embedding, norm and head, and exchanges the list of layers
for one that can bring a layer in and release it. `suite.walk` does both, and needs nothing else to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from suite import arch, trust
from suite.errors import PTQError


class StreamedLayers(nn.ModuleList):
    """Decoder layers without weights, but for those that are brought in.

    >>> layers.bring(3); layers[3](hidden); layers.release(3)  # doctest: +SKIP
    """

    def __init__(self, layers: Iterable[nn.Module] = (), read: Callable[[str], Tensor] | None = None, prefix: str = "",
                 device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__(layers)
        self._read, self._prefix, self._device, self._dtype = read, prefix, device, dtype

    def bring(self, i: int) -> None:
        """Gives layer i its weights, unless it has some. Raises PTQError for weights that are missing or of another
        shape."""
        for name, empty in list(self[i].named_parameters()):
            if empty.is_meta:
                found = self._read(f"{self._prefix}.{i}.{name}")
                _set(self[i], name, found.to(self._device, self._dtype), empty)

    def release(self, i: int) -> None:
        """Frees the weights of layer i, written or not; what was written must have been kept."""
        self[i].to("meta")


def open_model(folder: Path, files: Iterable[Path], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model whose decoder layers are `StreamedLayers`, in evaluation mode. The head stays on the processor, since
    quantization by layer does not use it.

    Raises PTQError for weights that are missing or do not fit the architecture.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    own = trust.allows(trust.CODE)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=own)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=own).eval()
    reader, places = _reader(files), arch.family(model)
    parent, _, leaf = places.layers.rpartition(".")
    streamed = StreamedLayers(arch.layers(model), reader, places.layers, device, dtype)
    tied = bool(config.tie_word_embeddings)
    for name, empty in list(model.named_parameters()):
        if not name.startswith(f"{places.layers}.") and not (tied and name == f"{places.head}.weight"):
            where = torch.device("cpu") if name.startswith(f"{places.head}.") else device
            _set(model, name, reader(name).to(where, dtype), empty)
    setattr(model.get_submodule(parent), leaf, streamed.eval())
    if tied:
        arch.head(model).weight = arch.embedding(model).weight
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    return model


def is_streamed(model: nn.Module) -> bool:
    return isinstance(arch.layers(model), StreamedLayers)


def _set(module: nn.Module, name: str, tensor: Tensor, empty: nn.Parameter) -> None:
    if tensor.shape != empty.shape:
        raise PTQError(f"the model's weights are corrupt: {name} has shape {tuple(tensor.shape)}, its config.json asks "
                       f"for {tuple(empty.shape)}")
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=empty.requires_grad))


def _reader(files: Iterable[Path]) -> Callable[[str], Tensor]:
    """Reads one tensor by name from the safetensors that has it; nothing else of the file comes into memory."""
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), path))

    def read(name: str) -> Tensor:
        if name not in where:
            raise PTQError(f"the model's weights are incomplete: {name} is missing")
        with safe_open(where[name], framework="pt") as file:  # opened anew: an open one keeps what it has read mapped
            return file.get_tensor(name)

    return read
