"""SpinQuant: rotations that leave the function as it is, learning them, and state that survives a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toys import make_tokenizer, make_toy

from suite import arch, calib, checkpoint, cli, hadamard, kv, method, models, resume, rotate, stiefel, walk, zoo
from suite.errors import PTQError
from suite.grid import QuantSpec, fake_quantize_tokens
from suite.linear import Online
from suite.testing import TOYS, _logits, _relative

EXACT = 1e-6  # of logits in float64; RMSNorm of transformers works in float32, which leaves 3e-7


def tokens_of(sequences: int = 8, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(512, (sequences, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- the function stays


@pytest.mark.parametrize("variant", ["no_had", "had"])
@pytest.mark.parametrize("rotation", ["random-hadamard", "hadamard", "random", "learned"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "llama-mha", "qwen", "qwen-gqa"])
def test_plan_leaves_the_function_as_it_is(kind, rotation, variant):
    model, tokens = make_toy(kind, torch.float64), tokens_of(seed=1)
    before, weights = _logits(model, tokens), {k: v.clone() for k, v in model.state_dict().items()}
    method.build("spinquant", rotation=rotation, variant=variant, steps=2).plan(model, calib.from_tokens(tokens_of()))
    assert _relative(_logits(model, tokens), before) < EXACT
    after = model.state_dict()
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ):
        assert not torch.allclose(after[name], weights[name], atol=1e-3), f"{name} was not rotated"
    assert model.config.tie_word_embeddings is False and arch.head(model).weight is not arch.embedding(model).weight
    assert all(torch.equal(v, torch.ones_like(v)) for k, v in after.items() if "norm" in k), (
        "gains stand in the linears"
    )


@pytest.mark.parametrize("name", zoo.names())
def test_plan_leaves_the_function_of_an_embedded_model(name):
    if not (zoo.path(name) / "model.safetensors").exists():
        pytest.skip(f"{name} is not trained in this installation")
    model, tokens = models.load(name, dtype="float64").model, tokens_of(2, 48, seed=1)
    before = _logits(model, tokens)
    method.build("spinquant", steps=1, variant="had").plan(model, calib.from_tokens(tokens_of(2, 32)))
    assert _relative(_logits(model, tokens), before) < EXACT


def test_every_bias_is_rotated_that_has_to_be():
    model, tokens = make_toy("llama", torch.float64, attention_bias=True, mlp_bias=True), tokens_of(seed=1)
    before = _logits(model, tokens)
    method.build("spinquant", rotation="random", variant="had").plan(model, calib.from_tokens(tokens_of()))
    assert _relative(_logits(model, tokens), before) < EXACT


def test_rotations_spread_an_outlier_channel():
    def kurtosis(model):
        view = next(walk.walk(model, calib.from_tokens(tokens_of())))
        x = view.inputs().double()
        return float((x**4).mean() / (x**2).mean() ** 2)

    model = make_toy("llama")
    with torch.no_grad():
        arch.embedding(model).weight[:, 7] *= 30
    before = kurtosis(model)
    method.build("spinquant", rotation="random-hadamard").plan(model, calib.from_tokens(tokens_of()))
    assert kurtosis(model) < 4 < 20 < before


@pytest.mark.parametrize("size", sorted(m * p for m in hadamard.TABULATED for p in ((16, 64) if m == 1 else (2, 4))))
def test_the_online_rotation_fits_every_tabulated_size(size):
    model, tokens = make_toy("llama", torch.float64, layers=1, intermediate_size=size), tokens_of(2, 12, seed=1)
    before = _logits(model, tokens)
    rotate.put_online_(model, hadamard.online(size))
    assert _relative(_logits(model, tokens), before) < 1e-12
    assert isinstance(arch.layers(model)[0].mlp.down_proj, Online)
    assert [s.linears for s in arch.sites(model)][-1] == ("mlp.down_proj.linear",)


def test_no_rotation_is_the_inner_method():
    toy = TOYS["gqa"]
    spin, plain = toy.model(), toy.model()
    walk.quantize_model(method.build("spinquant", rotation="none"), spin, toy.calib())
    walk.quantize_model(method.build("gptq"), plain, toy.calib())
    assert all(torch.equal(a, b) for a, b in zip(spin.state_dict().values(), plain.state_dict().values(), strict=True))


def test_keys_and_queries_are_rotated_only_where_the_cache_is_rounded():
    for bits, rotated in ((16, False), (4, True)):
        model = make_toy("llama")
        kv.set_(model, bits)
        rules = method.build("spinquant", rotation="hadamard", variant="had").plan(
            model, calib.from_tokens(tokens_of())
        )
        assert ("R3" in rules[0].note["rotation"]) is rotated
        assert rotated is (kv.rounding_of(model) is not None and kv.rounding_of(model).rotation is not None)


# ---------------------------------------------------------------------------------------------- orders


def test_a_width_without_a_hadamard_matrix_is_said_before_anything_is_written():
    model = make_toy("llama", intermediate_size=19 * 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PTQError, match="intermediate width.*304.*block-hadamard"):
        method.build("spinquant", variant="had").plan(model, calib.from_tokens(tokens_of()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    method.build("spinquant", variant="no_had").check(model.config)


@pytest.mark.parametrize("fallback", hadamard.FALLBACKS)
def test_a_fallback_is_named_in_the_record_and_leaves_the_function(fallback):
    model, tokens = make_toy("llama", torch.float64, intermediate_size=19 * 16), tokens_of(seed=1)
    before = _logits(model, tokens)
    made = method.build("spinquant", rotation="hadamard", variant="had", inner="rtn", fallback=fallback)
    note = made.plan(model, None)[0].note["rotation"]
    assert fallback.split("-")[0] in note["R4"]
    assert _relative(_logits(model, tokens), before) < EXACT


def test_a_fallback_survives_a_checkpoint(tmp_path):
    model = make_toy("llama", intermediate_size=19 * 16)
    made = method.build("spinquant", rotation="random", variant="had", inner="rtn", fallback="random", group_size=16)
    walk.quantize_model(made, model, None)
    folder = checkpoint.save(model, make_tokenizer(), tmp_path / "out", {"method": method.to_config(made)})
    loaded, _, _ = checkpoint.load(folder)
    assert torch.equal(_logits(loaded, tokens_of()), _logits(model, tokens_of()))


@pytest.mark.parametrize(
    "option, value, named",
    [
        ("rotation", "hadamrd", "hadamard"),
        ("variant", "hat", "had"),
        ("inner", "awq", "gptq"),
        ("fallback", "blok", "block"),
        ("steps", 0, "steps is 0"),
        ("learning_rate", -1.0, "learning_rate is -1"),
        ("batch", 0, "batch is 0"),
    ],
)
def test_a_bad_option_is_an_error(option, value, named):
    with pytest.raises(PTQError, match=named):
        method.build("spinquant", **{option: value})


def test_no_hybrid_can_have_it():
    for pool in (("gptq", "spinquant"), ("spinquant",)):
        with pytest.raises(PTQError, match="spinquant, which rewrites the whole model"):
            method.build("cka-hybrid", pool=pool)


def test_learning_needs_data_and_something_to_round():
    with pytest.raises(PTQError, match="calibration data"):
        method.build("spinquant", inner="rtn").plan(make_toy(), None)
    with pytest.raises(PTQError, match="nothing is rounded"):
        method.build("spinquant", wbits=16, abits=16)


# ---------------------------------------------------------------------------------------------- learning


def test_a_cayley_step_goes_down_and_stays_orthogonal():
    """min |X - T|^2 over orthogonal X, whose solution for orthogonal T is T."""
    generator = torch.Generator().manual_seed(0)
    skew = torch.randn(3, 16, 16, generator=generator, dtype=torch.float64)
    target = torch.matrix_exp((skew - skew.mT) * 0.1)
    x = torch.eye(16, dtype=torch.float64).expand(3, 16, 16)
    losses = []
    for _ in range(60):
        losses.append(float((x - target).square().sum()))
        x = stiefel.cayley_step(x, 2 * (x - target), 0.1)
        assert float(stiefel.orthogonality_error(x)) < 1e-12
    assert all(b < a for a, b in itertools.pairwise(losses)) and losses[-1] < 1e-6 * losses[0]


def test_the_step_is_bounded_by_the_size_of_the_gradient():
    x, gradient = torch.eye(8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    near = stiefel.cayley_step(x, 1e6 * gradient, 1.5)
    assert torch.allclose(near, stiefel.cayley_step(x, 1e9 * gradient, 1.5), atol=1e-6)
    assert float((near - x).norm()) < 3


def prepared(kind="llama", dtype=torch.float32, **changes):
    model = make_toy(kind, dtype, **changes)
    arch.untie(model)
    rotate.fuse_norms_(model)
    generator = torch.Generator().manual_seed(0)
    start = rotate.Rotations(
        hadamard.random_hadamard(128, generator),
        torch.stack([hadamard.random_hadamard(32, generator) for _ in arch.layers(model)]),
    )
    return model, start


def test_the_gradient_is_that_of_the_rotated_model():
    """Without rounding the loss is the model's own and does not depend on the rotations; with a smooth stand-in for
    rounding, differences of the loss equal the gradient."""
    model, start = prepared(dtype=torch.float64)
    tokens = tokens_of(2, 12)
    network = rotate._Network(model, tokens, None, None, False)
    loss, (g1, g2) = network.gradient(start.residual, start.heads, torch.arange(2))
    logits = _logits(model, tokens)
    direct = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss - float(direct)) < 1e-6
    for x, g in ((start.residual, g1), (start.heads, g2)):  # along the manifold nothing changes
        tangent = x.mT @ g
        assert float((tangent - tangent.mT).abs().max()) < 1e-4 * float(g.abs().max() + 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_knows_that_the_grid_of_a_token_grows_with_it(bits):
    """Twice the token is rounded to twice the values: along x itself the derivative is the rounded x."""
    x = torch.randn(5, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = fake_quantize_tokens(x.detach(), QuantSpec(bits, True, None))
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for function, slope in ((rotate._through_scale, rounded), (rotate._straight_through, x.detach())):
        found = function(x, rounded)
        assert torch.equal(found, rounded)
        (gradient,) = torch.autograd.grad((found * weights).sum(), x)
        assert torch.allclose((gradient * x).sum(-1), (weights * slope).sum(-1), rtol=1e-6)
    zero = torch.zeros(1, 4, requires_grad=True)
    assert torch.autograd.grad(rotate._through_scale(zero, zero.detach()).sum(), zero)[0].isfinite().all()


@pytest.mark.parametrize("scale_gradient", [True, False])
def test_an_option_decides_which_gradient_it_is(scale_gradient, monkeypatch):
    used = []
    monkeypatch.setattr(rotate, "_through_scale", lambda x, rounded: used.append(1) or rotate._straight_through(x, rounded))
    toy = TOYS["gqa"]
    walk.quantize_model(method.build("spinquant", steps=1, scale_gradient=scale_gradient), toy.model(), toy.calib())
    assert bool(used) == scale_gradient
    assert method.build("spinquant").scale_gradient is False, "as in the released code"


def test_learning_lowers_the_loss_and_is_orthogonal_at_every_step(monkeypatch):
    errors = []
    step = rotate.cayley_step
    monkeypatch.setattr(
        rotate, "cayley_step", lambda *a: errors.append(float(stiefel.orthogonality_error(y := step(*a)))) or y
    )
    model, start = prepared()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learned, note = rotate.learn(
        model, start, tokens_of(16, 40), rotate.Schedule(steps=60, batch=16), QuantSpec(4, True, None)
    )
    assert note["loss after"] < note["loss before"] - 0.01
    assert len(errors) == 120 and max(errors) < rotate.TOLERANCE and note["orthogonality"] == max(errors)
    assert len(note["losses"]) == 60 and note["sequences"] == 960 and note["distinct sequences"] == 16
    assert not torch.allclose(learned.residual, start.residual) and not torch.allclose(learned.heads, start.heads)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "learning changes no weight"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activation_checkpointing_changes_memory_only():
    results = []
    for checkpointing in (False, True):
        model, start = prepared("qwen")
        results.append(
            rotate.learn(
                model,
                start,
                tokens_of(4, 24),
                rotate.Schedule(steps=3, batch=4),
                QuantSpec(4, True, None),
                checkpointing=checkpointing,
            )
        )
    (one, first), (two, second) = results
    assert torch.equal(one.residual, two.residual) and torch.equal(one.heads, two.heads) and first == second


def test_learning_in_bfloat16_keeps_rotations_in_float64():
    model, start = prepared("qwen-gqa", torch.bfloat16)
    learned, note = rotate.learn(
        model, start, tokens_of(4, 24), rotate.Schedule(steps=3, batch=4), QuantSpec(8, True, None)
    )
    assert learned.residual.dtype == torch.float64 and note["orthogonality"] < 1e-12


def test_weights_are_rounded_where_activations_are_not():
    toy = TOYS["gqa"]
    made = method.build("spinquant", abits=16, steps=3)
    note = made.plan(toy.model(), toy.calib())[0].note["rotation"]
    assert note["learned with"] == "rounded weights" and len(set(note["losses"])) == 3


def test_the_record_tells_how_it_was_learned():
    toy = TOYS["gqa"]
    made = method.build("spinquant", steps=3)
    record = walk.quantize_model(made, toy.model(), toy.calib())[0]["rotation"]
    assert record["sequences"] == 24 and record["distinct sequences"] == 8 and len(record["losses"]) == 3
    assert len(record["sha256"]["R1"]) == 64 and len(record["sha256"]["R2"]) == 2
    json.dumps(record, allow_nan=False)
    other = walk.quantize_model(method.build("spinquant", steps=3, rotation_seed=1), toy.model(), toy.calib())[0][
        "rotation"
    ]
    assert other["sha256"]["R1"] != record["sha256"]["R1"]


# ---------------------------------------------------------------------------------------------- resume


def test_a_workspace_belongs_to_one_run(tmp_path):
    folder = tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt), resume.into(folder, {"a": 1, "b": 2}) as workspace:
        assert not folder.exists()
        workspace.save("x", {"step": 3, "t": torch.arange(3)})
        raise KeyboardInterrupt
    with pytest.raises(PTQError, match="another run, which differs in b"), resume.into(folder, {"a": 1, "b": 3}):
        pass
    with resume.into(folder, {"b": 2, "a": 1}) as workspace:
        assert resume.current() is workspace and workspace.load("x")["step"] == 3 and workspace.load("y") is None
        with pytest.raises(PTQError, match="in use"), resume.into(folder, {"a": 1, "b": 2}):
            pass
    assert not folder.exists() and resume.current() is None


def quantize(folder: Path, out: Path, text: Path, *more: str) -> list[str]:
    return [
        "quantize",
        "--model",
        str(folder),
        "--method",
        "spinquant",
        "--rotation",
        "learned",
        "--abits",
        "4",
        "--set",
        "steps=12",
        "--nsamples",
        "4",
        "--seqlen",
        "32",
        "--calib",
        str(text),
        "--out",
        str(out),
        *more,
    ]


def test_a_killed_run_continues_to_the_same_model(tmp_path, toy_folder, toy_text_file, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Slow steps and a state after each, so that the kill hits the middle on any machine.
    slow = tmp_path / "slow" / "sitecustomize.py"
    slow.parent.mkdir()
    slow.write_text(
        "import time\nfrom suite import resume, rotate\nresume.SECONDS = 0\nresume._SHARE = 1\n"
        "step = rotate.cayley_step\nrotate.cayley_step = lambda *a: (time.sleep(0.2), step(*a))[1]\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "suite.cli", *quantize(toy_folder, killed, toy_text_file)],
        env={**os.environ, "PYTHONPATH": str(slow.parent)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    state = tmp_path / "killed.partial" / "rotation.pt"
    until = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = len(torch.load(state, weights_only=True)["losses"])
    assert 0 < steps < 12 and not killed.exists()

    with pytest.raises(SystemExit) as refused:
        cli.main(quantize(toy_folder, killed, toy_text_file, "--set", "rotation_seed=1"))
    assert refused.value.code == 2 and "state of another run, which differs in method" in capsys.readouterr().err

    for out in (killed, whole):
        with pytest.raises(SystemExit) as ended:
            cli.main(quantize(toy_folder, out, toy_text_file))
        assert ended.value.code == 0
    assert not state.parent.exists()
    assert checkpoint.identity(killed) == checkpoint.identity(whole)
    (first, second) = (checkpoint.read_record(out)["record"]["layers"][0]["rotation"] for out in (killed, whole))
    assert first == second and len(first["losses"]) == 12
