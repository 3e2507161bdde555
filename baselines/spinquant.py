"""SpinQuant (Liu et al., arXiv 2405.16406): rotate the model so that its activations have no outliers, then round.

Rotations leave the function of the unquantized model as it is, and spread what one channel held over all of them. Those
that are absorbed in weights are learned: they start as random Hadamard matrices and go down the loss of the network
with rounded activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from suite import arch, hadamard, kv, progress, rotate
from suite.errors import PTQError, unknown
from suite.grid import Scheme
from suite.method import LayerMethod, Native, Noted, build

ROTATIONS = ("learned", "random-hadamard", "hadamard", "random", "none")
VARIANTS = ("no_had", "had")
INNER = ("gptq", "rtn")


@dataclass(frozen=True)
class SpinQuant:
    """Objective: orthogonal R1, R2 that minimise the model's NLL with activations on their grid and weights in 16 bit.

    Source: section 3 of the paper. R1 (hidden width) rotates the residual stream, one R2 (width of a head) per layer
    the values between v and o; both stand in the weights afterwards. Then the inner method rounds the rotated weights.

    rotation:      "learned", from a random-hadamard start; or that start alone, a plain "hadamard", a "random"
                   orthogonal matrix, or "none": neither R1 nor R2, so the inner method alone (for comparison).
    variant:       "no_had": R1 and R2 only, so the model runs at no extra cost. "had": also R4, a Hadamard transform
                   before down_proj at run time; and R3, one on queries and keys, where the key-value cache is rounded.
    inner:         "gptq" or "rtn", with their default options and this scheme.
    steps, learning_rate, batch: of the learning; batch counts sequences. The rate falls as half a cosine wave.
    scale_gradient: whether gradients of the learning also reach the scale of a token, which its largest entry sets, so
                   that they see what a finer grid would gain. As the released code has it, they pass straight through
                   the rounding, and the scale is a constant.
    rotation_seed: of the start, and of the order of sequences.
    fallback:      what to take for a width that has no tabulated Hadamard matrix ("constructed", "block-hadamard",
                   "random", see `suite.hadamard.online`); "": such a model is an error.

    Deviations: the Cayley step is solved exactly (`suite.stiefel`). Sequences are those of the calibration set, seen as
    often as the steps ask for, where the paper has 800 different ones; the record counts both. With 16-bit activations
    rotations would not change the loss, so they are learned with weights rounded to nearest, in place of activations.
    Embeddings are not centred: that is not neutral before an RMSNorm.

    Raises PTQError: unknown rotation, variant, inner or fallback; steps, rate or batch that are not positive; learning
    with nothing rounded.

    >>> SpinQuant(rotation="random-hadamard").variant
    'no_had'
    """

    scheme: Scheme = Scheme()
    rotation: str = "learned"
    variant: str = "no_had"
    inner: str = "gptq"
    steps: int = 100
    learning_rate: float = 1.5
    batch: int = 8
    scale_gradient: bool = False
    rotation_seed: int = 0
    fallback: str = ""
    rewrites_model = True  # its rules fit only the model that its plan has rotated
    added = {"scale_gradient": False}

    def __post_init__(self):
        for kind, value, allowed in (
            ("rotation", self.rotation, ROTATIONS),
            ("variant", self.variant, VARIANTS),
            ("inner", self.inner, INNER),
        ):
            if value not in allowed:
                raise unknown(kind, value, allowed)
        hadamard.check_fallback(self.fallback)
        for name, least in (("steps", 1), ("batch", 1), ("rotation_seed", 0)):
            if getattr(self, name) < least:
                raise PTQError(f"{name} is {getattr(self, name)}: allowed are whole numbers from {least}")
        if not (0 < self.learning_rate < math.inf):
            raise PTQError(f"learning_rate is {self.learning_rate}: allowed are positive numbers")
        if self.rotation == "learned" and self.scheme.act is None and not self.scheme.weight.quantized:
            raise PTQError(
                f"rotations cannot be learned at {self.scheme}, where nothing is rounded: "
                f"give fewer bits, or another rotation"
            )

    @property
    def needs_calibration(self) -> bool:
        return self.rotation == "learned" or self.inner != "rtn"

    def check(self, config: Any) -> None:
        """Raises PTQError if a width of a model, told by its configuration, has no Hadamard matrix that may be used."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths = {}
        if self.rotation in ("learned", "random-hadamard", "hadamard"):
            widths |= {"the hidden width": config.hidden_size, "the width of a head": head}
        if self.variant == "had":
            widths["the intermediate width"] = config.intermediate_size
        for what, width in widths.items():
            try:
                hadamard.online(width, self.fallback)
            except PTQError as error:
                raise PTQError(f"spinquant, {what}: {error}") from None

    def plan(self, model: nn.Module, calib: Any) -> Sequence[LayerMethod]:
        self.check(model.config)
        if calib is None and self.needs_calibration:
            raise PTQError(
                "spinquant needs calibration data: pass --calib embedded, a text file, or a set; "
                "or inner=rtn with a rotation that is not learned"
            )
        note: dict[str, Any] = {"kind": self.rotation, "variant": self.variant}
        if self.variant == "had":
            note |= self._stay_online(model)
        if self.rotation != "none":
            note |= self._absorb(model, calib)
        rules = list(build(self.inner, **self.scheme.options).plan(model, calib))
        return [Noted(rules[0], {"rotation": note}), *rules[1:]]

    def _stay_online(self, model: nn.Module) -> dict[str, str]:
        """R4, and R3 where the key-value cache is rounded."""
        note = {}
        r4 = hadamard.online(model.config.intermediate_size, self.fallback, self.rotation_seed)
        rotate.put_online_(model, r4)
        note["R4"] = r4.name
        if (bits := kv.bits_of(model)) < 16:
            r3 = hadamard.online(arch.head_dim(model), self.fallback, self.rotation_seed)
            kv.set_(model, bits, r3)
            note["R3"] = r3.name
        return note

    def _absorb(self, model: nn.Module, calib: Any) -> dict[str, Any]:
        """R1 and R2."""
        arch.untie(model)
        rotate.fuse_norms_(model)
        rotations, note = self._start(model), {}
        if self.rotation == "learned":
            schedule = rotate.Schedule(self.steps, self.learning_rate, self.batch, self.rotation_seed)
            weight = self.scheme.weight if self.scheme.act is None else None
            note = {
                "start": "random-hadamard",
                "learned with": "rounded activations" if weight is None else "rounded weights",
            }
            rotations, course = rotate.learn(
                model,
                rotations,
                calib.tokens,
                schedule,
                self.scheme.act,
                weight,
                lambda step, text: progress.tell(text),
                scale_gradient=self.scale_gradient,
            )
            note |= course
        rotate.rotate_(model, rotations)
        return {**note, "sha256": rotations.digests()}

    def _start(self, model: nn.Module) -> rotate.Rotations:
        generator = torch.Generator().manual_seed(self.rotation_seed)

        def one(width: int) -> Tensor:
            if self.rotation == "random":
                return hadamard.random_orthogonal(width, generator)
            if self.rotation == "hadamard":
                return hadamard.online(width, self.fallback, self.rotation_seed).matrix()
            return hadamard.random_hadamard(width, generator, self.fallback)

        head = arch.head_dim(model)
        return rotate.Rotations(one(model.config.hidden_size), torch.stack([one(head) for _ in arch.layers(model)]))


NATIVE = Native(options={"symmetric": True, "group_size": 0, "abits": 8, "variant": "had"}, nsamples=800, seqlen=2048)
