"""Models by name: an embedded one, a local folder, a quantized folder, a checkpoint of the compressed-tensors format,
a known name or any id of the hub.

A name may end in `@outliers=SEVERITY[,seed=N]`: outlier channels are planted on loading (see suite/zoo/outliers.py).
What was loaded is identified by a digest of its files, not by its name, so that records never mix two models up.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from suite import arch, checkpoint, hub, importing, kv, paths, stream, trust, zoo
from suite.errors import PTQError, unknown
from suite.zoo import outliers

KNOWN: dict[str, dict[str, Any]] = paths.known_models()
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_IDENTIFYING = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Source:
    """Where a model comes from. kind: "embedded", "folder", "quantized" or "hub"; name: how records call it;
    folder: None for a model of the hub until it is fetched; note: what the user should know about the choice."""

    kind: str
    name: str
    folder: Path | None = None
    repository: str | None = None
    revision: str | None = None
    outliers: Any = None
    note: str = ""

    def fetched(self) -> Source:
        """The same, with its files in a local folder, and the commit in place of a branch. Raises PTQError as
        `suite.hub.snapshot` does."""
        if self.folder is not None:
            return self
        folder = hub.snapshot(self.repository, self.revision, _instead())
        _check_folder(folder, self.repository)
        return replace(self, folder=folder, revision=folder.name)  # snapshots are filed under their commit


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to run, its tokenizer, and what identifies it.

    digest: sha256 over weights, configuration and tokenizer files, and over the planted outliers;
    record: the record of a quantized folder, else None; revision: the commit of a model of the hub, else None;
    trusted: what the user allowed and the model used, "code of its own", "pickled weights".
    """

    model: nn.Module
    tokenizer: Any
    name: str
    digest: str
    kind: str
    record: dict | None = None
    note: str = ""
    revision: str | None = None
    trusted: tuple[str, ...] = ()

    @property
    def identity(self) -> dict:
        return {"name": self.name, "digest": self.digest}


def names() -> list[str]:
    """Every model that has a short name: the embedded ones and the table of known ones."""
    return [*zoo.names(), *KNOWN]


def _instead() -> str:
    return f"an embedded model ({', '.join(zoo.names())}) or a local folder"


def resolve(name: str, revision: str | None = None) -> Source:
    """What a name stands for. Looks at the local disk only.

    Raises PTQError: unknown name (with near misses), a folder that is no model, a bad outlier suffix.

    >>> resolve("qwen1.5-1.5b").repository
    'Qwen/Qwen1.5-1.8B'
    """
    base, planted = outliers.parse(name)
    source = _resolve_base(base, revision)
    if planted is None:
        return source
    if source.kind == "quantized":
        raise PTQError(f"{base!r} is quantized already: outliers are planted before quantization, "
                       f"into a full-precision model")
    return replace(source, name=f"{source.name}{planted.suffix()}", outliers=planted)


def _resolve_base(name: str, revision: str | None) -> Source:
    if name in zoo.names():
        folder = zoo.path(name)
        if not (folder / "config.json").is_file():
            raise PTQError(f"the embedded model {name!r} has no weights in this installation: "
                           f"train it with `ptq zoo train {name}`, or install the suite again")
        return Source("embedded", name, folder)
    if (known := KNOWN.get(name.lower())) is not None:
        return Source("hub", known["hub"], repository=known["hub"], revision=revision, note=known.get("note", ""))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, name)
        quantized = checkpoint.is_quantized(folder) or importing.is_importable(folder)
        kind = "quantized" if quantized else "folder"
        return Source(kind, folder.resolve().name, folder)
    if folder.is_file():
        raise PTQError(f"model {name!r} is a file: give the folder that holds config.json and the safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise PTQError(f"model folder {name!r} does not exist: give a folder, an id of the hub, "
                       f"or one of {', '.join(names())}")
    if _HUB_ID.fullmatch(name):
        return Source("hub", name, repository=name, revision=revision)
    raise unknown("model", name, [*names(), "a local folder", "ORGANISATION/NAME of the hub"])


def _check_folder(folder: Path, name: str) -> None:
    """Everything that can be wrong with a folder and is seen without reading its weights."""
    if not (folder / "config.json").is_file():
        raise PTQError(f"model folder {name!r} has no config.json: give a folder in Hugging Face format "
                       f"(config.json, *.safetensors, tokenizer)")
    config = read_json(folder / "config.json")
    if (files := trust.own_code(folder)) and not trust.allows(trust.CODE):
        raise PTQError(f"model {name!r} brings code of its own ({', '.join(files)}), and is not run by other code in its "
                       f"place: pass --trust-remote-code (trust_remote_code=true to lm-eval) to run it, if you trust it")
    if checkpoint.is_quantized(folder):
        return
    if importing.is_importable(folder):
        importing.read_config(folder)
    elif (found := config.get("quantization_config")) is not None:
        how = found.get("quant_method", "?") if isinstance(found, dict) else "?"
        raise PTQError(f"model {name!r} is quantized already, by {how!r}: give a full-precision model, "
                       f"or a checkpoint of compressed-tensors")
    arch.family(SimpleNamespace(config=SimpleNamespace(model_type=config.get("model_type"))))
    weight_files(folder)


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises PTQError, naming the file, if there is none in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PTQError(f"{path.name} of {path.parent.name!r} cannot be read as JSON, so the folder is corrupt: "
                       f"{error}") from None
    if not isinstance(found, dict):
        raise PTQError(f"{path.name} of {path.parent.name!r} holds no JSON object, so the folder is corrupt")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model folder; where there are none and that is allowed, its pickled weights. Raises PTQError if
    there are none, if one is missing, or cut short."""
    if files := _listed(folder, "model.safetensors"):
        for file in files:
            checkpoint.check_safetensors(file)
        return files
    files = _listed(folder, "pytorch_model.bin")
    if not (files and trust.allows(trust.PICKLE)):
        other = sorted(p.name for pattern in ("*.bin", "*.pth", "*.gguf") for p in folder.glob(pattern))
        found = f"found {', '.join(other[:3])}, but only safetensors are read" if other else "found none"
        raise PTQError(f"model folder {str(folder)!r} has no model.safetensors: {found}; --allow-pickle (allow_pickle=true "
                       f"to lm-eval) reads pytorch_model.bin as well")
    if missing := [file.name for file in files if not file.is_file()]:
        raise PTQError(f"model folder {str(folder)!r} is incomplete: {missing[0]} is missing")
    return files


def _listed(folder: Path, name: str) -> list[Path]:
    """The files of weights of one kind: the one of that name, or those that its index lists."""
    index = folder / f"{name}.index.json"
    if (folder / name).exists():
        return [folder / name]
    return [folder / file for file in sorted(set(read_json(index).get("weight_map", {}).values()))] if index.is_file() else []


def trusted(folder: Path) -> tuple[str, ...]:
    """What a model of a folder needs the user's word for."""
    pickled = not checkpoint.is_quantized(folder) and weight_files(folder)[0].suffix == ".bin"
    return (*(("code of its own",) if trust.own_code(folder) else ()), *(("pickled weights",) if pickled else ()))


def record_of(source: Source) -> dict:
    """How a quantized folder was made; {} for a checkpoint of another tool. Raises PTQError if it is corrupt."""
    if checkpoint.is_quantized(source.folder):
        return checkpoint.read_record(source.folder)["record"]
    return importing.read_record(source.folder)


# ---------------------------------------------------------------------------------------------- identity


def identify(name: str, revision: str | None = None) -> dict:
    """{"name", "digest"} of a model without loading it. Raises PTQError as `load` does for what is not there.

    >>> identify("tiny-llama-s")["name"]  # doctest: +SKIP
    'tiny-llama-s'
    """
    source = resolve(name, revision).fetched()
    return {"name": source.name, "digest": _digest(source)}


def _digest(source: Source) -> str:
    if source.kind == "quantized" and checkpoint.is_quantized(source.folder):
        return checkpoint.identity(source.folder)
    files = [source.folder / file for file in _IDENTIFYING] + weight_files(source.folder)
    if trust.own_code(source.folder):
        files += sorted(source.folder.glob("*.py"))
    total = hashlib.sha256()
    for file in files:
        if file.is_file():
            total.update(f"{file.name} {file_digest(file)}\n".encode())
    if source.outliers is not None:
        total.update(source.outliers.suffix().encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file. A file in the hub's cache is not read: its name there is its digest already."""
    path = path.resolve()
    if path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name):
        return path.name
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_in_memory(model: nn.Module) -> int:
    """Bytes of a model's weights that stand in the host's memory."""
    return sum(weight.nbytes for weight in model.parameters() if weight.device.type == "cpu")


def digest_of(model: nn.Module) -> str:
    """sha256 over the tensors and the architecture of a model in memory: its identity where no folder gives one."""
    total = hashlib.sha256(model.config.model_type.encode())
    for key, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        total.update(f"{key} {data.dtype} {tuple(data.shape)}\n".encode())
        total.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """sha256 of what a quantized model computes: its tensors, and the kind and the grids of its modules. Two variants
    with the same one give the same answers."""
    return hashlib.sha256(f"{digest_of(model)} {kv.bits_of(model)} {model}".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- loading


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(device: str | torch.device | None) -> torch.device:
    """A device by its name, the usual one for None. Raises PTQError for one that is not there."""
    try:
        found = torch.device(device) if device is not None else default_device()
    except RuntimeError:
        raise PTQError(f"device is {str(device)!r}: allowed are cpu, cuda, and cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise PTQError(f"device is {str(device)!r}: allowed are cpu, cuda, and cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PTQError(f"device {str(found)!r} is not there: this machine has no GPU that torch sees; use cpu")
    return found


def devices_of(words: Sequence[str]) -> tuple[torch.device, ...]:
    """Several devices by name; "all": every GPU, or the processor where there is none. Raises PTQError for one that is
    not there.

    >>> devices_of(["cpu"])
    (device(type='cpu'),)
    """
    if tuple(words) == ("all",):
        words = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    found = tuple(device_of(word) for word in words)
    if absent := [device for device in found if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()]:
        raise PTQError(f"device {str(absent[0])!r} is not there: this machine has cuda:0 to "
                       f"cuda:{torch.cuda.device_count() - 1}")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on a processor, where it is exact and no slower; bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch type from its name. None and "auto" leave the choice to `load`. Raises PTQError for any other word."""
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype
    found = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if str(dtype) not in found:
        raise unknown("dtype", str(dtype), [*found, "auto"])
    return found[str(dtype)]


def load(name: str, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
         revision: str | None = None, by_layer: bool = False) -> Loaded:
    """A model by name, in evaluation mode, with its tokenizer.

    name: an embedded model, a local folder (quantized by `ptq quantize` or not), a name of the table of known models,
    or an id of the hub; with `@outliers=SEVERITY[,seed=N]` where outliers are to be planted. dtype None: float32 on a
    processor, bfloat16 on a GPU, and for a quantized folder the type it was quantized in. Code of the model's own is run,
    and pickled weights are read, only where `suite.trust` allows it. by_layer: decoder layers are read when the walk comes
    to them (suite.stream); for quantization only. An embedded model or a folder is loaded without a glance at the network.

    Raises PTQError: unknown model, folder without config.json, corrupt or truncated weights, weights that do not fit
    the architecture, unsupported architecture, no tokenizer, no hub, no such GPU.

    >>> load("tiny-llama-s@outliers=8").name  # doctest: +SKIP
    'tiny-llama-s@outliers=8'
    """
    device = device_of(device)
    source = resolve(name, revision).fetched()
    dtype = parse_dtype(dtype)
    loaded = _load(source, dtype, device, by_layer)
    return replace(loaded, trusted=trusted(source.folder))


def _load(source: Source, dtype: torch.dtype | None, device: torch.device, by_layer: bool) -> Loaded:
    if source.kind == "quantized" and checkpoint.is_quantized(source.folder):
        model, tokenizer, record = checkpoint.load(source.folder, dtype=dtype, device=device)
        return Loaded(model, tokenizer, source.name, checkpoint.identity(source.folder), source.kind, record)
    if importing.is_importable(source.folder):
        model, tokenizer, record = importing.load(source.folder, dtype or default_dtype(device), device)
        return Loaded(model, tokenizer, source.name, _digest(source), "quantized", record)
    if by_layer:
        if source.outliers is not None:
            raise PTQError(f"model {source.name!r}: outliers are planted into a whole model, not layer by layer")
        files = weight_files(source.folder)
        if files[0].suffix == ".bin":
            raise PTQError(f"model {source.name!r} has pickled weights, which are read as a whole: pass --load whole")
        model = stream.open_model(source.folder, files, dtype or default_dtype(device), device)
        return Loaded(model, checkpoint.load_tokenizer(source.folder), source.name, _digest(source), source.kind,
                      note=source.note, revision=source.revision)
    model = _pretrained(source.folder, dtype or default_dtype(device))
    if source.outliers is not None:
        outliers.plant_(model, source.outliers)
    model = model.to(device).eval()
    return Loaded(model, checkpoint.load_tokenizer(source.folder), source.name, _digest(source), source.kind,
                  note=source.note, revision=source.revision)


def _pretrained(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():  # what is wrong is told below, once
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=trust.allows(trust.CODE),
                use_safetensors=weight_files(folder)[0].suffix != ".bin", ignore_mismatched_sizes=True,
                output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError,
            pickle.UnpicklingError) as error:
        raise PTQError(f"model folder {str(folder)!r} cannot be loaded ({type(error).__name__}): "
                       f"{_first_line(error)}") from None
    # transformers leaves a weight that is missing at random values, and says so in a log only.
    if info["mismatched_keys"]:
        key, found, wanted = sorted(info["mismatched_keys"])[0]
        raise PTQError(f"model folder {str(folder)!r} is corrupt: {key} has shape {tuple(found)}, "
                       f"its config.json asks for {tuple(wanted)}")
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise PTQError(f"model folder {str(folder)!r} is incomplete: {len(missing)} weights are missing, "
                       f"the first is {missing[0]}")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars and the warnings of transformers from the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
