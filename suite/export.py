"""A quantized model in the compressed-tensors format: what transformers loads by itself and inference engines read.

    config.json            with `quantization_config`: the grid of every linear, and which linears are not quantized
    model*.safetensors     of every quantized linear: its codes, packed by the format's own library, and its scales
    tokenizer ... README.md (model card), recipe.yaml (where llm-compressor could do it), ptq_export.json (record)

Everything a method did but rounding (folded scales, rotations inside the weights) stands in plain tensors already, so
a hybrid of methods is one uniform checkpoint. What the format cannot say is refused, not left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suite import arch, card, checkpoint, importing, kv, recipe, schemes
from suite.errors import PTQError, unknown
from suite.grid import Scheme, decode, encode
from suite.importing import RECORD
from suite.linear import Online, QuantLinear, RoundedLinear

FORMATS = (schemes.METHOD,)


def export(source: str | Path, folder: str | Path, form: str = schemes.METHOD, overwrite: bool = False,
           measured: list[dict] | None = None) -> Path:
    """Writes the model of a quantized folder in another format; returns the folder.

    source: what `ptq quantize` or an earlier export wrote, or a checkpoint of that format that the suite reads.
    measured: rows for the model card, see `suite.card.text`.

    Raises PTQError: an unknown format; a folder that is not quantized, or corrupt; a target that exists; a model that
    the format cannot express.

    >>> export("hybrid", "hybrid-packed")  # doctest: +SKIP
    PosixPath('hybrid-packed')
    """
    check_format(form)
    checkpoint.check_target(folder, overwrite, RECORD)
    source = Path(source).expanduser()
    reader: Any = checkpoint if checkpoint.is_quantized(source) else importing
    model, tokenizer, record = reader.load(source)
    return write(model, tokenizer, folder, record, overwrite, measured)


def check_format(form: str) -> None:
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)


def check_plan(method: Any, scheme: Scheme, kvbits: int) -> None:
    """Raises PTQError if what a method will make of a model could not be exported: before the work, from options alone."""
    if getattr(method, "variant", None) == "had":
        raise PTQError(f"variant 'had' cannot be exported: {_ONLINE}; use variant no_had, which has none")
    if kvbits < 16:
        raise PTQError(f"kvbits is {kvbits}, which cannot be exported: {_CACHE}; use kvbits 16")


# transformers 5.23 reads a checkpoint with a `transform_config` and leaves the transforms out, without a word.
_ONLINE = ("it rotates activations at run time, and a loader that leaves such rotations out, as transformers does, "
           "computes another model without saying so")
_CACHE = "the format has no key-value cache rounded asymmetrically per token and head"


@torch.no_grad()
def write(model: nn.Module, tokenizer: Any, folder: str | Path, record: dict, overwrite: bool = False,
          measured: list[dict] | None = None) -> Path:
    """Writes a quantized model, whole or not at all; returns the folder. Arguments and errors: see `export`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from huggingface_hub import save_torch_state_dict

    linears = _linears(model)
    groups = schemes.grouped({name: (getattr(linear, "spec", None), linear.act) for name, linear in linears.items()})
    forms = {group.format for group in groups} - {schemes.DENSE}
    config = QuantizationConfig(
        config_groups={f"group_{i}": group for i, group in enumerate(groups)},
        format=forms.pop() if len(forms) == 1 else "mixed-precision" if forms else schemes.DENSE,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    tensors = dict(_tensors(model, linears))
    with checkpoint.whole(folder, overwrite, RECORD) as temporary:
        plain = model.config.to_dict()
        plain.pop("_name_or_path", None)
        plain |= {"architectures": [type(model).__name__],
                  "dtype": str(arch.embedding(model).weight.dtype).removeprefix("torch.")}
        checkpoint.write_json(temporary / "config.json", plain)
        ModelCompressor(quantization_config=config).update_config(str(temporary))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_torch_state_dict(tensors, temporary)
        checkpoint.write_json(temporary / RECORD, card.told(record))
        (temporary / "README.md").write_text(card.text(model.config, record, groups, measured), encoding="utf-8")
        if (steps := recipe.text(record)) is not None:
            (temporary / recipe.NAME).write_text(steps, encoding="utf-8")
    return Path(folder).expanduser()


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every quantized linear. Raises PTQError for a model of which the format can tell only a part."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, (QuantLinear, RoundedLinear))}
    if not found:
        raise PTQError("this model has no quantized linear: `ptq quantize` makes one, save_pretrained writes any other")
    if online := next((name for name, m in model.named_modules() if isinstance(m, Online)), None):
        raise PTQError(f"linear {online!r} cannot be exported: {_ONLINE}; quantize with variant no_had")
    if kv.rounding_of(model) is not None:
        raise PTQError(f"the key-value cache of {kv.bits_of(model)} bits cannot be exported: {_CACHE}; "
                       f"quantize with kvbits 16")
    return found


def _tensors(model: nn.Module, linears: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint: those of the quantized linears compressed, tied ones once."""
    tied = arch.head(model).weight is arch.embedding(model).weight
    for name, tensor in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        linear = linears.get(parent)
        if isinstance(linear, QuantLinear) and leaf != "bias" or tied and linear is None and parent == _head(model):
            continue
        yield name, tensor.contiguous()
    for name, linear in linears.items():
        if isinstance(linear, QuantLinear):
            for leaf, tensor in _compress(linear, name).items():
                yield f"{name}.{leaf}", tensor.contiguous()


def _head(model: nn.Module) -> str:
    return arch.family(model).head


def _compress(linear: QuantLinear, name: str) -> dict[str, Tensor]:
    """The library's own compressor on one linear, {"weight_packed" or "weight", "weight_scale", ...}, read back at once."""
    from compressed_tensors.compressors import BaseCompressor

    scheme = schemes.to_scheme(linear.spec, linear.act, [name])
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    # In float32 whatever the type of the model: the compressor divides by the scale again, and must meet the same codes.
    given = {"weight": decode(linear.codes, linear.grid), "weight_scale": linear.scale.float()}
    if linear.zero is not None:
        given["weight_zero_point"] = linear.zero.to(torch.int8)
    made = compressor.compress(given, scheme)
    back = compressor.decompress(made, scheme)["weight"]
    if not torch.equal(encode(back, linear.grid), linear.codes.float()):
        raise RuntimeError(f"{name}: the compressor of {schemes.METHOD} gave other codes than it was given")
    made["weight_scale"] = _narrow(made["weight_scale"])
    return made


def _narrow(scale: Tensor) -> Tensor:
    """Scales in the 16 bits they have, if they do: those of the suite are bfloat16 numbers."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale.to(dtype).float(), scale):
            return scale.to(dtype)
    return scale
