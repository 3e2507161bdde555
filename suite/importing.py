"""Checkpoints of the compressed-tensors format, the suite's own and llm-compressor's, as models of the suite.

What the file says is taken over exactly: codes, scales and zero points become those of `QuantLinear`, so a checkpoint
that another tool made is evaluated by the same arithmetic as the suite's own, and exported again it is the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from suite import checkpoint, schemes
from suite.errors import PTQError
from suite.grid import QuantSpec
from suite.layer_state import spec_as_json

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig

RECORD = "ptq_export.json"  # beside an export of the suite: how it was made
CONFIG = "quantization_config"


def is_importable(folder: str | Path) -> bool:
    """Whether the config.json of a folder names the compressed-tensors format."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))[CONFIG]
        return found["quant_method"] == schemes.METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load(folder: str | Path, dtype: torch.dtype | None = None,
         device: str | torch.device = "cpu") -> tuple[nn.Module, Any, dict]:
    """(model, tokenizer, record) from a checkpoint of the format.

    dtype None: the type that its config.json names. record: how the suite made it; {} if another tool did.

    Raises PTQError: no such checkpoint; tensors that are missing, cut short or do not fit; a scheme that the suite has
    no grid for; transforms, or a key-value cache, in the configuration.

    >>> model, tokenizer, record = load("checkpoint-of-llm-compressor")  # doctest: +SKIP
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    folder = Path(folder).expanduser()
    if not is_importable(folder):
        raise PTQError(f"{str(folder)!r} is no quantized model: it has neither {checkpoint.RECORD}, which `ptq quantize` "
                       f"writes, nor a config.json with a {CONFIG} of {schemes.METHOD}")
    plan = read_config(folder)
    tensors = _read_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        del config.quantization_config
        stored = config.dtype or torch.float32
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=stored)
        linears = _linears(model, plan)
        tensors = _translate(tensors, linears, stored)
        for name, buffer in model.named_buffers():  # made by the architecture, not stored
            tensors.setdefault(name, buffer)
        checkpoint.fill_(model, tensors, {name: specs for name, (specs, _) in linears.items()}, stored)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise PTQError(f"checkpoint {str(folder)!r} does not fit together, so it is corrupt or of a kind that is not "
                       f"read ({type(error).__name__}: {error}): make it again") from None
    return checkpoint.finished_(model, folder, stored, dtype, device), checkpoint.load_tokenizer(folder), read_record(folder)


def read_record(folder: str | Path) -> dict:
    """How an export of the suite was made; {} for a checkpoint of another tool. Raises PTQError if it is corrupt."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PTQError(f"{str(path)!r} cannot be read, so the folder is corrupt: export it again ({error})") from None
    if not isinstance(found, dict):
        raise PTQError(f"{str(path)!r} holds no JSON object, so the folder is corrupt: export it again")
    return found


def read_config(folder: str | Path) -> QuantizationConfig:
    """The `quantization_config` of a checkpoint, checked: what stands in it, the suite can run.

    Raises PTQError for what the library refuses, and for what the suite has no counterpart of.
    """
    from compressed_tensors.quantization import QuantizationConfig

    path = Path(folder) / "config.json"
    found = json.loads(path.read_text(encoding="utf-8"))[CONFIG]
    try:
        config = QuantizationConfig.model_validate(found)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise PTQError(f"{CONFIG} of {str(path)!r} is not what the format allows: {reason[:300]}") from None
    if (found.get("transform_config") or {}).get("config_groups"):
        raise PTQError(f"{str(path)!r} asks for transforms at run time, which are not imported: "
                       f"make the checkpoint with transforms that stand in the weights")
    if config.kv_cache_scheme is not None:
        raise PTQError(f"{str(path)!r} has a kv_cache_scheme, which is not imported: make the checkpoint without one")
    if config.quantization_status != "compressed":
        raise PTQError(f"{str(path)!r} has quantization_status {config.quantization_status.value!r}: allowed is "
                       f"'compressed'; save the model with save_compressed=True")
    for name, scheme in config.config_groups.items():
        schemes.from_scheme(scheme, name)
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [single]
    if index.is_file() and not single.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise PTQError(f"{str(index)!r} cannot be read, so the checkpoint is corrupt: {error}") from None
    tensors: dict[str, Tensor] = {}
    for file in files:
        checkpoint.check_safetensors(file)
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise PTQError(f"weights {str(file)!r} are corrupt or cut short: {error}") from None
    return tensors


def _linears(model: nn.Module, config: QuantizationConfig) -> dict[str, tuple[dict, str]]:
    """Linear -> ({"weight": grid, "act": grid} as JSON, form in the file), matched by the library's own rules."""
    from compressed_tensors.utils import match_named_modules
    from compressed_tensors.utils.match import match_targets

    by_target = {target: (group, scheme) for group, scheme in config.config_groups.items()
                 for target in scheme.targets}
    found = {}
    for name, module in match_named_modules(model, list(by_target), config.ignore):
        group, scheme = by_target[match_targets(name, module, list(by_target))[0]]
        weight, act = schemes.from_scheme(scheme, group)
        if (weight, act) == (None, None):
            continue
        if not isinstance(module, nn.Linear):
            raise PTQError(f"scheme {group!r} of the checkpoint quantizes {name!r}, a {type(module).__name__}: "
                           f"allowed are linears of decoder layers")
        form = scheme.format or config.format
        specs = {"weight": spec_as_json(weight), "act": spec_as_json(act)}
        found[name] = (specs, getattr(form, "value", form))
    return found


def _translate(tensors: Mapping[str, Tensor], linears: Mapping[str, tuple[dict, str]], dtype: torch.dtype
               ) -> dict[str, Tensor]:
    """The tensors of the format as `checkpoint.fill_` takes them: codes, scale, zero in place of weight_*."""
    tensors = dict(tensors)
    for name, (specs, form) in linears.items():
        if specs["weight"] is not None:
            spec = QuantSpec(**specs["weight"])
            part = {leaf: tensors.pop(f"{name}.{leaf}", None)
                    for leaf in ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point")}
            codes, zero = _codes(part, spec, form, name)
            scale = part["weight_scale"].float()
            if scale.shape != (codes.shape[0], spec.groups(codes.shape[1], name)):
                raise RuntimeError(f"the scales of {name} have shape {tuple(scale.shape)}")
            tensors |= {f"{name}.codes": codes, f"{name}.scale": scale}
            if zero is not None:
                tensors[f"{name}.zero"] = zero
    return {name: tensor.to(dtype) if tensor.is_floating_point() and not name.endswith(".scale") else tensor
            for name, tensor in tensors.items()}


def _codes(part: Mapping[str, Tensor | None], spec: QuantSpec, form: str, name: str) -> tuple[Tensor, Tensor | None]:
    """(out, in) int8 codes and (out, groups) zero points of one linear."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    needed = ["weight_packed", "weight_shape"] if form == schemes.PACKED else ["weight"]
    needed += ["weight_scale"] if spec.symmetric else ["weight_scale", "weight_zero_point"]
    if missing := [leaf for leaf in needed if part[leaf] is None]:
        raise RuntimeError(f"{name} lacks its {missing[0]}")
    scale, zero = part["weight_scale"], part["weight_zero_point"]
    if form == schemes.PACKED:
        codes = unpack_from_int32(part["weight_packed"], spec.bits, torch.Size(part["weight_shape"].tolist()))
        if not spec.symmetric and zero.dtype == torch.int32:
            zero = unpack_from_int32(zero, spec.bits, scale.shape, packed_dim=0)
    elif part["weight"].dtype == torch.int8:
        codes = part["weight"]
    else:
        raise RuntimeError(f"{name} is stored as {form!r} in {part['weight'].dtype}: read are {schemes.PACKED} and "
                           f"{schemes.BYTES}")
    return codes, None if spec.symmetric else zero
