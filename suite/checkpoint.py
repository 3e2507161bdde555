"""A quantized model on disk: Hugging Face's configuration and tokenizer, safetensors with the codes, and ptq.json.

    config.json generation_config.json tokenizer.json ...   as Hugging Face writes them
    quantized.safetensors  of every quantized linear: codes (out, in) int8, scale (out, groups) bfloat16,
                           zero (out, groups) int8 where the grid has one, bias; all other weights as they were
    ptq.json               format, versions, record of the run, the grid of every linear, checksum of the weights

A code takes a whole byte whatever its bits: this is the suite's own form, exact and simple to read back; the packed
form that engines load is written by the export. The weights have a name of their own because other loaders, where they
find a model.safetensors, fill the linears that are missing in it with random numbers and go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suite import arch, provenance, trust
from suite.errors import PTQError
from suite.grid import Grid, QuantSpec, decode
from suite.hadamard import Orthogonal
from suite.layer_state import compact, grids
from suite.linear import Online, QuantLinear, RoundedLinear, TokenRounding

FORMAT = 1
RECORD, WEIGHTS = "ptq.json", "quantized.safetensors"
_ADVICE = "quantize it again"


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder holds a model that `save` wrote."""
    return (Path(folder) / RECORD).is_file()


def check_safetensors(path: Path) -> None:
    """Raises PTQError, naming the file, if a safetensors file is missing, corrupt or cut short. Reads its head only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError:
        raise PTQError(f"weights {str(path)!r} are missing: the folder is incomplete, fetch or copy it again") from None
    except (SafetensorError, OSError) as error:
        raise PTQError(f"weights {str(path)!r} are corrupt or cut short, fetch or copy them again: {error}") from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises PTQError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True,
                                             trust_remote_code=trust.allows(trust.CODE))
    except Exception as error:  # the readers of its many formats raise what they like, bare Exception among it
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise PTQError(f"model folder {str(folder)!r} has no tokenizer that can be read "
                       f"({type(error).__name__}): {reason}") from None


# ---------------------------------------------------------------------------------------------- saving


def save(model: nn.Module, tokenizer: Any, folder: str | Path, record: dict, overwrite: bool = False,
         layers: Sequence[dict[str, Any]] | None = None) -> Path:
    """Writes a quantized model, whole or not at all; returns the folder.

    record: JSON that tells how the model came about (method configuration, scheme, calibration, layers, base model);
    kept in ptq.json under "record". overwrite: replace a folder that an earlier `save` wrote. layers: the states of the
    quantized layers (`suite.layer_state.take`) of a model that does not hold them itself (suite.stream).

    Raises PTQError: the target exists and is not empty, or cannot be written; the model holds nothing quantized.

    >>> save(model, tokenizer, "out", {"method": to_config(method), "layers": records})  # doctest: +SKIP
    """
    linears = _linears(model, layers)
    if not linears:
        raise PTQError("this model has no quantized linear: save it with its own save_pretrained")
    with whole(folder, overwrite) as temporary:
        _write(model, tokenizer, temporary, linears, record, layers)
    return Path(folder).expanduser()


@contextlib.contextmanager
def whole(folder: str | Path, overwrite: bool = False, marker: str = RECORD) -> Iterator[Path]:
    """A new folder to write into, that takes its place when the block ends and vanishes if it fails.

    marker: the file by which a folder of the same kind is known, that may be replaced if `overwrite` says so.
    Raises PTQError: the target exists and is not empty, is of another kind, or cannot be written.
    """
    folder = Path(folder).expanduser()
    check_target(folder, overwrite, marker)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".tmp"))
    except OSError as error:
        raise PTQError(f"folder {str(folder)!r} cannot be written ({error.strerror}): "
                       f"give another with --out") from None
    try:
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o755)  # mkdtemp's folders are private
        _publish(temporary, folder)
    except OSError as error:
        raise PTQError(f"folder {str(folder)!r} cannot be written ({error.strerror or error}): "
                       f"give another with --out") from None
    finally:  # after an interrupt too
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: str | Path, overwrite: bool = False, marker: str = RECORD) -> None:
    """Raises PTQError if `whole` would refuse a folder: to be called before the work begins."""
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise PTQError(f"output {str(folder)!r} is a file: give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise PTQError(f"output folder {str(folder)!r} exists and is not empty: give another, or pass --overwrite")
        if not (folder / marker).is_file():
            raise PTQError(f"output folder {str(folder)!r} holds something that is no quantized model, "
                           f"and is not overwritten: give another")


def _linears(model: nn.Module, layers: Sequence[dict[str, Any]] | None) -> dict[str, dict]:
    """The grids of every quantized linear, by its name in the model."""
    if layers is None:
        return grids(model)
    return {f"{arch.family(model).layers}.{i}.{name}": specs for i, state in enumerate(layers)
            for name, specs in state["linears"].items()}


def _write(model: nn.Module, tokenizer: Any, folder: Path, linears: dict[str, dict], record: dict,
           layers: Sequence[dict[str, Any]] | None) -> None:
    from safetensors.torch import save_file

    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if getattr(model.config, "auto_map", None):  # code of the model's own, without which it cannot be built
        for path in Path(model.config._name_or_path).glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(model)}
    for i, state in enumerate(layers or ()):
        tensors |= {f"{arch.family(model).layers}.{i}.{name}": tensor for name, tensor in state["tensors"].items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with (folder / WEIGHTS).open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    write_json(folder / RECORD, {
        "format": FORMAT, "sha256": checksum, "dtype": str(arch.embedding(model).weight.dtype).removeprefix("torch."),
        "linears": linears,
        **_added(model),
        "versions": provenance.versions(), "record": record})


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is needed to build the model again, tied ones once."""
    tied = arch.head(model).weight is arch.embedding(model).weight
    # Buffers too that transformers does not save: a model that was cast has its rotary frequencies cast with it.
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        parent, _, leaf = name.rpartition(".")
        quantized = isinstance(model.get_submodule(parent), QuantLinear)
        if tensor.is_meta:  # of a layer that has left the memory (suite.stream)
            continue
        if quantized and leaf == "weight" or tied and name == _head_weight(model):
            continue  # decoded from the codes; the embedding again
        yield name, compact(leaf, tensor) if quantized else tensor


def _added(model: nn.Module) -> dict:
    """What the model does beyond its architecture: rotations before linears, rounding of the key-value cache."""
    from suite import kv

    found = {}
    if online := {name: module.rotation.shape for name, module in model.named_modules() if isinstance(module, Online)}:
        found["online"] = online
    if (rounding := kv.rounding_of(model)) is not None:
        found["kv"] = {"bits": rounding.bits, "rotation": rounding.rotation and rounding.rotation.shape}
    return found


def _modules(model: nn.Module, *kinds: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    """Puts a finished folder into its place; an older one stands until the new one is complete."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".tmp"))
    os.rename(folder, old / "old")
    try:
        os.rename(temporary, folder)
    except OSError:
        os.rename(old / "old", folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- loading


def read_record(folder: str | Path) -> dict:
    """ptq.json of a quantized folder: {"format", "sha256", "dtype", "linears", "record"}.

    Raises PTQError if it cannot be read, lacks a part, or is of another format.
    """
    path = Path(folder) / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        form = found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PTQError(f"{str(path)!r} cannot be read ({type(error).__name__}: {error}), so the folder is corrupt: "
                       f"{_ADVICE}") from None
    if form != FORMAT:
        raise PTQError(f"{str(path)!r} has format {form!r}, this version reads {FORMAT}: {_ADVICE}")
    if not {"sha256", "dtype", "linears", "record"} <= set(found):
        raise PTQError(f"{str(path)!r} lacks a part, so the folder is corrupt: {_ADVICE}")
    return found


def identity(folder: str | Path) -> str:
    """The digest of a quantized model: sha256 over the checksum of its weights and the grids they are on."""
    found = read_record(folder)
    parts = [found[key] for key in ("sha256", "dtype", "linears", "online", "kv") if key in found]
    parts += [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sorted(Path(folder).glob("*.py"))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(folder: str | Path, dtype: torch.dtype | None = None,
         device: str | torch.device = "cpu") -> tuple[nn.Module, Any, dict]:
    """(model, tokenizer, record) from a folder that `save` wrote; its logits are those of the model saved, bit for bit.

    dtype None: the type that the model had. Raises PTQError for a folder that is no quantized model, or is corrupt.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    folder = Path(folder).expanduser()
    if not is_quantized(folder):
        raise PTQError(f"{str(folder)!r} is no quantized model: it has no {RECORD}; `ptq quantize` writes one")
    found = read_record(folder)
    tensors = _read_weights(folder / WEIGHTS, found["sha256"])
    try:
        own = trust.allows(trust.CODE)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=own)
        stored = getattr(torch, found["dtype"])
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=stored, trust_remote_code=own)
        _add_(model, found)
        fill_(model, tensors, found["linears"], stored)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise PTQError(f"quantized folder {str(folder)!r} does not fit together, so it is corrupt "
                       f"({type(error).__name__}: {error}): {_ADVICE}") from None
    return finished_(model, folder, stored, dtype, device), load_tokenizer(folder), found["record"]


def finished_(model: nn.Module, folder: Path, stored: torch.dtype, dtype: torch.dtype | None,
              device: torch.device | str) -> nn.Module:
    """A model whose tensors, of type `stored`, were filled in from a folder, as it is handed out: named after the
    folder, with its generation settings, in the type and on the device asked for."""
    from transformers import GenerationConfig

    model.config._name_or_path = model.name_or_path = str(folder)
    with contextlib.suppress(OSError):  # optional
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if dtype is not None and dtype != stored:
        model = cast_(model, dtype)
    return model.to(device).eval()


def _read_weights(path: Path, checksum: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    check_safetensors(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
            raise PTQError(f"weights {str(path)!r} are not those that were written (their checksum differs), "
                           f"so the folder is corrupt: {_ADVICE}")
    return load_file(path)


def _add_(model: nn.Module, found: dict) -> None:
    """The inverse of `_added`; entries of rotations are filled in with all other tensors."""
    for name, shape in found.get("online", {}).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Online(Orthogonal.shell(**shape), model.get_submodule(name)))
    if rounding := found.get("kv"):
        from suite import kv

        kv.set_(model, rounding["bits"], rounding["rotation"] and Orthogonal.shell(**rounding["rotation"]))


@torch.no_grad()
def fill_(model: nn.Module, tensors: dict[str, Tensor], linears: dict[str, dict], dtype: torch.dtype) -> None:
    """Replaces the quantized linears and sets every other tensor. Raises RuntimeError for what does not fit."""
    arch.family(model)
    shared: dict[tuple[str, QuantSpec | None], TokenRounding] = {}
    sites = {name: site.name for site in arch.sites(model) for name in site.linears}
    for name, specs in linears.items():
        parent, _, leaf = name.rpartition(".")
        layer = next(p for p in sites if name.endswith(f".{p}"))
        act = specs["act"] and QuantSpec(**specs["act"])
        # One rounding for the linears that read the same tensor, as the walk commits them.
        rounding = shared.setdefault((f"{name.removesuffix(layer)}{sites[layer]}", act), TokenRounding(act or None))
        if specs["weight"] is None:
            new: nn.Module = RoundedLinear(model.get_submodule(name), rounding)
        else:
            codes, scale, zero, bias = (tensors.pop(f"{name}.{part}", None)
                                        for part in ("codes", "scale", "zero", "bias"))
            if codes is None or scale is None or codes.shape != model.get_submodule(name).weight.shape:
                raise RuntimeError(f"{name} lacks its codes or scales, or they have another shape")
            grid = Grid(QuantSpec(**specs["weight"]), scale.float(), None if zero is None else zero.float())
            new = QuantLinear(codes, grid, bias, rounding, dtype)
        setattr(model.get_submodule(parent), leaf, new)
    untied = not model.config.tie_word_embeddings
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if isinstance(module, QuantLinear):
            continue
        if name not in tensors:
            if name == _head_weight(model) and not untied:
                continue
            raise RuntimeError(f"{name} is missing")
        found = tensors.pop(name)
        if found.shape != tensor.shape:
            raise RuntimeError(f"{name} has shape {tuple(found.shape)}, the architecture asks for "
                               f"{tuple(tensor.shape)}")
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(found, requires_grad=tensor.requires_grad))
        else:
            setattr(module, leaf, found)
    if tensors:
        raise RuntimeError(f"{sorted(tensors)[0]} is in the weights, but not in the architecture")
    model.tie_weights()


def _head_weight(model: nn.Module) -> str:
    return f"{arch.family(model).head}.weight"


def cast_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another floating-point type; scales and zero points stay as they are, weights are decoded anew."""
    exact = {name: (module.scale, module.zero) for name, module in _modules(model, QuantLinear).items()}
    model.to(dtype)
    for name, (scale, zero) in exact.items():
        module = model.get_submodule(name)
        module.scale, module.zero = scale, zero
        module.weight = decode(module.codes, module.grid).to(dtype)
    return model
