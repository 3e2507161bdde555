"""MP-GPTQ: the budget holds, the allocation is the best one, the record tells it."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch
from toys import make_toy

from baselines.mp_gptq import allocate
from suite import method, walk
from suite.errors import PTQError
from suite.testing import TOYS, _logits, _relative


def best_by_trial(scores, sizes, choices, mean):
    budget = mean * sum(sizes)
    allowed = (
        c
        for c in itertools.product(range(len(choices)), repeat=len(sizes))
        if sum(n * choices[k] for n, k in zip(sizes, c, strict=True)) <= budget
    )
    return min(sum(row[k] for row, k in zip(scores, c, strict=True)) for c in allowed)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("choices, mean", [((16, 4, 2), 4), ((16, 4, 3, 2), 3), ((8, 5, 3), Fraction("4.3"))])
def test_the_solver_equals_brute_force_on_six_layers(seed, choices, mean):
    draw = random.Random(seed)
    equal = seed % 2
    sizes = [12345678 if equal else draw.randint(1, 10**8) for _ in range(6)]
    scores = [sorted(draw.lognormvariate(0, 2) for _ in choices) for _ in range(6)]
    chosen = allocate(scores, sizes, choices, Fraction(mean))
    assert sum(n * choices[k] for n, k in zip(sizes, chosen, strict=True)) <= Fraction(mean) * sum(sizes)
    assert sum(row[k] for row, k in zip(scores, chosen, strict=True)) == pytest.approx(
        best_by_trial(scores, sizes, choices, Fraction(mean)), rel=1e-9
    )


def test_the_budget_holds_on_many_layers():
    draw = random.Random(0)
    for mean in (Fraction(4), Fraction("3.7"), Fraction("2.05")):
        sizes = [draw.randint(10**6, 10**9) for _ in range(80)]
        scores = [sorted(draw.random() * 10 ** draw.randint(-6, 3) for _ in range(3)) for _ in range(80)]
        chosen = allocate(scores, sizes, (16, 4, 2), mean)
        spent = sum(n * (16, 4, 2)[k] for n, k in zip(sizes, chosen, strict=True))
        assert spent <= mean * sum(sizes) and spent > (mean - Fraction("0.2")) * sum(sizes)


def test_what_cannot_be_solved_is_an_error():
    with pytest.raises(PTQError, match="cannot be met"):
        allocate([[0.0, 1.0]], [10], [16, 4], Fraction(3))
    with pytest.raises(PTQError, match="layer 1.*not finite"):
        allocate([[0.0, 1.0], [0.0, float("nan")]], [10, 10], [16, 4], Fraction(8))


def fragile(layers=6):
    """A model in which the third layer matters most and the fifth least."""
    model = make_toy("llama", layers=layers)
    with torch.no_grad():
        for k, gain in ((2, 3.0), (4, 0.02)):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.model.layers[k].get_submodule(name).weight.mul_(gain)
    return model


def test_bits_go_where_the_loss_is():
    toy = TOYS["gqa"]
    made = method.build("mp-gptq", wbits=3, sensitivity="loss", abits=16)
    records = walk.quantize_model(made, fragile(), toy.calib())
    bits = [record["wbits"] for record in records]
    allocation = records[0]["allocation"]
    assert bits[4] == 2 and sum(bits) <= 18 and max(bits) > 3
    assert allocation["mean"] == sum(bits) / 6 <= allocation["bound"] == 3
    assert allocation["objective"] <= allocation["objective of uniform bits"]
    assert allocation["objective"] == pytest.approx(
        best_by_trial(allocation["scores"], [1] * 6, allocation["choices"], 3), abs=1e-9
    )
    assert [round(record["bits"] - 16 / 128) for record in records] == bits


def test_the_loss_is_the_models_own():
    """One layer rounded in place gives the NLL that the score is the increase of."""
    toy = TOYS["gqa"]
    data = toy.calib()
    made = method.build("mp-gptq", sensitivity="loss", bits=(16, 2), wbits=2, mean=16)
    scores = made.plan(make_toy("llama"), data)[0].note["allocation"]["scores"]

    def nll(bits):
        model = make_toy("llama")
        for view in walk.walk(model, data):
            if view.index == 1:
                walk.commit(model, view, method.build("gptq", wbits=bits).quantize(view))
        logits = _logits(model, data.tokens)
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data.tokens[:, 1:].flatten()))

    assert scores[1][1] == pytest.approx(nll(2) - nll(16), abs=1e-5) and scores[1][0] == 0


def test_the_relative_error_is_that_of_the_outputs():
    data = TOYS["gqa"].calib()
    model = make_toy("llama", layers=1)
    scores = method.build("mp-gptq", bits=(16, 2), wbits=2, mean=16).plan(model, data)[0].note["allocation"]["scores"]
    view = next(walk.walk(model, data))
    edit = method.build("gptq", wbits=2).quantize(view)
    inputs, handles = {}, []
    for site in view.sites:
        module = model.model.layers[0].get_submodule(site.linears[0])
        handles.append(module.register_forward_pre_hook(lambda _, a, s=site: inputs.__setitem__(s.name, a[0])))
    _logits(model, data.tokens)
    total = 0.0
    for site in view.sites:
        for name in site.linears:
            x, w = inputs[site.name], view.weight(name)
            total += float((x @ (edit.params[f"{name}.weight"] - w).T).square().sum() / (x @ w.T).square().sum())
    assert scores[0][1] == pytest.approx(total, rel=1e-3)


def test_sixteen_bits_leave_weights_and_round_activations():
    toy = TOYS["gqa"]
    model = toy.model()
    before = {k: v.clone() for k, v in model.named_parameters()}
    records = walk.quantize_model(method.build("mp-gptq", mean=16), model, toy.calib())
    assert [r["wbits"] for r in records] == [16, 16] and [r["bits"] for r in records] == [16, 16]
    linear = model.model.layers[0].mlp.down_proj
    assert linear.act.bits == 8 and torch.equal(linear.weight, before["model.layers.0.mlp.down_proj.weight"])


def test_the_low_bit_variant_is_one_option():
    made = method.build("mp-gptq", wbits=3)
    assert made.choices == (16, 4, 3, 2) and made.bound == 3
    same = method.build("mp-gptq", wbits=3, bits="16,4,3,2", mean=3)
    assert same.choices == made.choices and same.bound == made.bound


def test_a_larger_mean_is_never_worse():
    toy, tokens = TOYS["gqa"], TOYS["gqa"].tokens(seed=1)
    exact = _logits(toy.model(), tokens)
    objectives, errors = [], []
    for mean in (2, 3, 4, 10, 16):
        model = toy.model()
        records = walk.quantize_model(method.build("mp-gptq", mean=mean, abits=16), model, toy.calib())
        objectives.append(records[0]["allocation"]["objective"])
        errors.append(_relative(_logits(model, tokens), exact))
    assert objectives == sorted(objectives, reverse=True) and errors[0] > errors[2] > errors[-1] == 0


@pytest.mark.parametrize(
    "option, value, named",
    [("bits", (16, 9), "bits is 9"), ("mean", 1.5, "mean is 1.5 bits.*2 to 16"), ("sensitivity", "hesian", "hessian")],
)
def test_a_bad_option_is_an_error(option, value, named):
    with pytest.raises(PTQError, match=named):
        method.build("mp-gptq", **{option: value})


def test_it_needs_data():
    with pytest.raises(PTQError, match="calibration data"):
        method.build("mp-gptq").plan(make_toy(), None)


def test_a_hybrid_can_have_it():
    toy = TOYS["gqa"]
    records = walk.quantize_model(method.build("cka-hybrid", pool=("gptq", "mp-gptq")), toy.model(), toy.calib())
    assert all(r["chosen"] in ("gptq", "mp-gptq") for r in records)
