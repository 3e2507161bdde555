"""Window perplexity, the papers' protocol: the number that tables of quantization papers call perplexity.

The text is tokenized once, cut into windows of N tokens without overlap, and the rest dropped. Inside each window the
tokens 2..N are predicted from those before them: ppl = exp(sum of their NLL / their number). lm-eval's own perplexity
tasks count words and stride differently, and give other numbers.

Source: the evaluation of the GPTQ code (Frantar et al. 2022), which SmoothQuant, AWQ and SpinQuant took over.

Letters: w windows, N tokens per window, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite import resume
from suite.calib import digest
from suite.errors import PTQError
from suite.tokens import text_digest, token_ids  # the digest calibration has too: a run on the evaluated text is found by it

DEFAULT_WINDOW = 2048  # the papers'; models with fewer positions take all they have
_TOKENS_PER_BATCH = 4096
_LOGITS_PER_BATCH = 2**26  # 256 MiB in float32


@dataclass(frozen=True, eq=False)
class Windows:
    """A tokenized text, cut.

    tokens (w, N) int64; text_tokens: how many tokens the whole text has, special ones included; bos: whether a
    beginning-of-sequence token stands first (only there: later windows begin in the middle of the text);
    text_digest: sha256 of the text; special_tokens: whether the tokenizer was let to add its own.
    """

    tokens: Tensor
    text_tokens: int
    bos: bool
    special_tokens: bool
    text_digest: str

    @property
    def count(self) -> int:
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        return self.tokens.shape[1]

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return self.count * (self.size - 1)

    @property
    def protocol(self) -> dict:
        """What must be equal for two perplexities to be comparable, as JSON. data_digest: sha256 of the tokens used."""
        return {"window": self.size, "windows": self.count, "tokens": self.predicted, "text_tokens": self.text_tokens,
                "bos": "once, at the start of the text" if self.bos else "none",
                "special_tokens": "the tokenizer's own, once around the text" if self.special_tokens else "none",
                "text_digest": self.text_digest, "data_digest": digest(self.tokens)}


def read_text(path: str | Path) -> str:
    """The text of a local file. Raises PTQError if it is missing, empty, or no UTF-8 text."""
    path = Path(path).expanduser()
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise PTQError(f"text file {str(path)!r} {fault}: give a text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PTQError(f"text file {str(path)!r} cannot be read as UTF-8 text: {error}") from None
    return _not_empty(text, f"text file {str(path)!r}")


def _not_empty(text: str, name: str) -> str:
    if not text.strip():
        raise PTQError(f"{name} is empty: give a text of at least one window")
    return text


def max_positions(model: nn.Module) -> int | None:
    """The longest window that a model takes, None where its configuration sets no bound."""
    return getattr(model.config, "max_position_embeddings", None)


def fit(window: int | None, positions: int | None, default: int = DEFAULT_WINDOW) -> int:
    """The window to use: the one asked for, else `default` or as much of it as the model takes.

    Raises PTQError for a window that was asked for and is longer than the model takes, or shorter than 2 tokens.

    >>> fit(None, 512), fit(256, 512)
    (512, 256)
    """
    if window is None:
        return min(default, positions or default)
    if window < 2:
        raise PTQError(f"window is {window}: allowed are whole numbers from 2, since the first token is not predicted")
    if positions is not None and window > positions:
        raise PTQError(f"window is {window}, the model takes at most {positions} tokens: "
                       f"give a window up to {positions}")
    return window


def token_windows(text: str, tokenizer, window: int, max_windows: int | None = None, max_tokens: int | None = None,
                  special_tokens: bool = True, name: str = "the text") -> Windows:
    """Tokenizes a text once, as a whole, and cuts it into windows without overlap; what is left over is dropped.

    special_tokens: let the tokenizer add its own (Llama's BOS, once at the start), as the GPTQ code does.
    max_windows, max_tokens: use only the first so many windows, or the windows that fit into so many tokens.
    name: what error messages call the text.

    Raises PTQError for an empty text, or one shorter than a window.

    >>> windows = token_windows(text, tokenizer, 512)     # doctest: +SKIP
    >>> windows.tokens.shape, windows.predicted           # doctest: +SKIP
    (torch.Size([78, 512]), 39858)
    """
    ids = token_ids(_not_empty(text, name), tokenizer, special_tokens)
    used = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    count = used // window if max_windows is None else min(used // window, max_windows)
    if count < 1:
        limit = "" if used == len(ids) else f", of which --max-tokens leaves {used}"
        raise PTQError(f"{name} has {len(ids)} tokens{limit}, fewer than one window of {window}: "
                       f"give more text or a smaller window")
    bos = tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id
    tokens = ids[:count * window].reshape(count, window)  # (w, N)
    return Windows(tokens, len(ids), bos, special_tokens, text_digest(text))


def batch_of(window: int, vocabulary: int) -> int:
    """How many windows to run at once: enough to keep the processor busy, and no more logits than 256 MiB."""
    return max(1, min(_TOKENS_PER_BATCH // window, _LOGITS_PER_BATCH // (window * vocabulary)))


@torch.no_grad()
def window_nll(model: nn.Module, windows: Tensor, batch_size: int | None = None,
               progress: Callable[[int, int], None] | None = None, keep_as: str | None = None) -> Tensor:
    """Sum over the tokens 2..N of the negative log-likelihood of each window, in nats: (w,) float64.

    windows (w, N) int64; batch_size: windows run at once, chosen by `batch_of` if None, without influence on the
    result beyond round-off. Log-probabilities are taken in float32 at least and summed in float64. The model is run as
    it is: the caller has put it into evaluation mode. progress(done, total) is called after each batch. keep_as: the
    name under which finished batches are kept in the workspace of the run (suite.resume), if it has one.

    Raises PTQError if a window's NLL is not finite.
    """
    device = next(iter(model.parameters())).device
    total, window = windows.shape
    batch_size = batch_size or batch_of(window, model.config.vocab_size)
    workspace = resume.current() if keep_as else None
    sums = [state["nll"]] if workspace and (state := workspace.load(keep_as)) else []
    for start in range(len(sums[0]) if sums else 0, total, batch_size):
        batch = windows[start:start + batch_size].to(device)  # (b, N)
        logits = model(input_ids=batch, use_cache=False).logits  # (b, N, v)
        sums.append(_nll(logits, batch).cpu())
        if workspace and workspace.due(keep_as):
            workspace.save(keep_as, {"nll": torch.cat(sums)})
        if progress:
            progress(start + len(batch), total)
    nll = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64)  # of several processes one may have no window
    if not torch.isfinite(nll).all():
        raise PTQError(f"window {int((~torch.isfinite(nll)).nonzero()[0])} has an NLL that is not finite: "
                       f"the model puts out NaN or infinity, so it is broken (or its type too narrow: try float32)")
    return nll


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """(b,) float64 sums of NLL; logits (b, N, v), tokens (b, N). One window at a time, for large vocabularies."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.stack([F.cross_entropy(row[:-1].to(wide), target[1:], reduction="none").double().sum()
                        for row, target in zip(logits, tokens, strict=True)])


def perplexity(nll: Tensor, predicted: int) -> float:
    """exp of the mean NLL; nll: sums per window, predicted: tokens that they count.

    >>> round(perplexity(torch.tensor([2.0, 4.0]), 6), 4)
    2.7183
    """
    return float(torch.exp(nll.double().sum() / predicted))
