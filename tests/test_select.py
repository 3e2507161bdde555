"""The selection: metrics by their formulas, the closest candidate by each of them, the whole matrix in the record."""

from __future__ import annotations

import math

import pytest
import torch

from suite import arch, calib, method, walk
from suite.cka import linear_cka
from suite.errors import PTQError
from suite.grid import Scheme
from suite.method import Uniform, build
from suite.metrics import METRICS, distances, lens_of
from suite.rounding import round_to_nearest
from suite.select import Hybrid, Select

POOL = ("gptq", "awq", "smoothquant")
PLAIN = [name for name in METRICS if name != "kl"]  # those that need no head


def calib_of(n=6, t=32, seed=0):
    return calib.from_tokens(torch.randint(512, (n, t), generator=torch.Generator().manual_seed(seed)))


def outputs_like(reference, size, seed):
    return reference + size * torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def reference():
    x = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 16)
    return x + 2


def states_equal(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)


# ---------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_metrics_by_their_formulas(reference, size):
    candidate = outputs_like(reference, size, 1)
    x, y = reference.reshape(-1, 16).double(), candidate.reshape(-1, 16).double()
    noise = float((y - x).square().sum() / x.square().sum())
    cosine = float(torch.nn.functional.cosine_similarity(x, y, dim=-1).mean())
    found = distances(reference)(candidate)
    assert set(found) == set(PLAIN)
    assert found["cka"] == pytest.approx(1 - linear_cka(x, y), rel=1e-3)
    assert found["mse"] == pytest.approx(noise, rel=1e-4)
    assert found["cosine"] == pytest.approx(1 - cosine, rel=1e-4)
    assert found["sqnr"] == pytest.approx(-10 * math.log10(1 / noise), rel=1e-4)


@pytest.mark.parametrize("metric", PLAIN)
def test_smaller_is_closer(reference, metric):
    measure = distances(reference)
    found = [measure(outputs_like(reference, size, 2))[metric] for size in (0.01, 0.1, 1.0)]
    assert found == sorted(found) and len(set(found)) == 3


def test_identical_outputs_are_finite(reference):
    found = distances(reference)(reference.clone())
    assert found["cka"] < 1e-12 and found["mse"] == 0 and abs(found["cosine"]) < 1e-6 and -400 < found["sqnr"] < -200


def test_half_precision_is_measured_in_more(reference):
    x, y = reference.bfloat16(), outputs_like(reference, 0.05, 3).bfloat16()
    exact = distances(x.double().float())(y.float())
    assert distances(x)(y) == pytest.approx(exact, rel=1e-9)


def test_what_the_metrics_do_not_see(reference):
    scaled = distances(reference)(1.5 * reference)
    assert scaled["cka"] < 1e-9 and abs(scaled["cosine"]) < 1e-6 and scaled["mse"] == pytest.approx(0.25, rel=1e-5)


# ---------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("metric, kind", [("cka", "llama"), ("mse", "qwen"), ("cosine", "llama"), ("sqnr", "qwen")])
def test_the_closest_of_the_pool_is_chosen(metric, kind, make_toy):
    """Scores recomputed for each layer on the prefix that was written, from each candidate on its own."""
    model, data = make_toy(kind), calib_of()
    made = build("cka-hybrid", metric=metric)
    for view, rule in zip(walk.walk(model, data, reference=True), made.plan(model, data), strict=True):
        edit = rule.quantize(view)
        assert set(edit.note["candidates"]) == set(POOL)
        expected = {}
        for name in POOL:
            alone = view.fed_by(view.inputs)
            expected[name] = distances(view.reference)(alone.after(build(name).quantize(alone)).outputs())
            assert edit.note["candidates"][name] == pytest.approx(expected[name], rel=1e-6)
        ranking = sorted(POOL, key=lambda name: expected[name][metric])
        assert edit.note["chosen"] == ranking[0]
        margin = expected[ranking[1]][metric] - expected[ranking[0]][metric]
        assert edit.note["margin"] == pytest.approx(margin, rel=1e-5) and margin >= 0
        walk.commit(model, view, edit)


def test_the_model_is_made_of_the_chosen(make_toy):
    """Different methods in different layers: outliers are planted in the first one only."""

    def planted():
        model = make_toy("llama", layers=2)
        with torch.no_grad():
            arch.layers(model)[0].input_layernorm.weight[:4] *= 50
        return model

    model, data = planted(), calib_of()
    records = walk.quantize_model(build("cka-hybrid", pool="smoothquant|gptq", metric="mse"), model, data)
    chosen = [r["chosen"] for r in records]
    by_hand = planted()
    for view, name in zip(walk.walk(by_hand, data), chosen, strict=True):
        walk.commit(by_hand, view, build(name).quantize(view))
    assert states_equal(model, by_hand)


class Worse(Uniform):
    """Round-to-nearest at fewer bits in some layers."""

    def __init__(self, *layers):
        self.layers, self.scheme = layers, Scheme()

    def quantize(self, layer):
        return round_to_nearest(layer, Scheme.of(2) if layer.index in self.layers else Scheme())


@pytest.mark.parametrize("metric", METRICS)
def test_the_choice_differs_by_layer(metric, make_toy):
    model, rules = make_toy("llama", layers=3), (Worse(0, 2), Worse(1))
    data = calib_of()
    chosen = []
    for view in walk.walk(model, data, reference=True):
        lens = lens_of(model) if metric == "kl" else None
        edit = Select(("a", "b"), tuple((rule,) for rule in rules), metric, lens=lens).quantize(view)
        chosen.append(edit.note["chosen"])
        walk.commit(model, view, edit)
    assert chosen == ["b", "a", "b"]


def test_of_equals_the_first_is_chosen(make_toy):
    view = next(walk.walk(make_toy("llama"), calib_of(), reference=True))
    note = Select(("one", "two"), ((build("rtn"),), (build("rtn"),)), "cka").quantize(view).note
    assert note["chosen"] == "one" and note["margin"] == 0


def test_candidates_share_statistics(make_toy, monkeypatch):
    gathered = []
    original = walk.LayerView._gather
    monkeypatch.setattr(walk.LayerView, "_gather", lambda self: gathered.append(self.index) or original(self))
    walk.quantize_model(build("cka-hybrid"), make_toy("llama", layers=3), calib_of())
    assert gathered == [0, 1, 2]


def test_a_candidate_never_sees_what_another_did(make_toy):
    """The pool in another order gives the same scores."""
    data, scores = calib_of(), []
    for pool in (POOL, POOL[::-1]):
        scores.append(walk.quantize_model(build("cka-hybrid", pool=pool), make_toy("qwen"), data)[0]["candidates"])
    assert scores[0] == scores[1]


def test_scores_use_the_first_tokens_only(make_toy):
    class SmallBatches(calib.Calibration):
        def step(self, tokens_per_batch=0):
            return 2

    data = SmallBatches(**vars(calib_of()))
    part = SmallBatches(**vars(calib.from_tokens(data.tokens[:2])))
    found = walk.quantize_model(build("cka-hybrid", pool="rtn", score_tokens=64), make_toy("llama"), data)
    expected = walk.quantize_model(build("cka-hybrid", pool="rtn"), make_toy("llama"), part)
    for a, b in zip(found, expected, strict=True):
        assert a["candidates"]["rtn"] == pytest.approx(b["candidates"]["rtn"], rel=1e-5)


# ---------------------------------------------------------------------------------------------- pools and blocks


def rewrites(name) -> bool:
    return any(getattr(method.lookup(part), "rewrites_model", False) for part in name.split("+"))


@pytest.mark.parametrize("name", [n for n in method.names() + method.compositions() if not rewrites(n)])
def test_a_pool_of_one(name, make_toy):
    data, models = calib_of(), [make_toy("qwen"), make_toy("qwen")]
    walk.quantize_model(Hybrid(scheme=build(name).scheme, pool=(name,)), models[0], data)
    walk.quantize_model(build(name), models[1], data)
    assert states_equal(*models)


@pytest.mark.parametrize("name", [n for n in method.names() if rewrites(n)])
def test_methods_that_rewrite_the_model_cannot_share_it(name):
    with pytest.raises(PTQError, match=f"pool has {name}, which rewrites the whole model"):
        build("cka-hybrid", pool=f"rtn|{name}")


def test_all_get_the_scheme_of_the_hybrid(make_toy):
    made = build("cka-hybrid", wbits=3, abits=16, group_size=64, symmetric=False, pool="rtn|awq+gptq")
    records = walk.quantize_model(made, model := make_toy("llama"), calib_of())
    assert all(r["bits"] == 3 + 19 / 64 for r in records)
    linear = arch.layers(model)[0].mlp.up_proj
    assert linear.act is None and linear.spec == made.scheme.weight


def test_one_block_is_the_best_uniform_method(make_toy):
    """With all layers in one unit the choice is by the outputs of the last, and the model is that method's."""
    data, pool = calib_of(), ("rtn", "gptq", "smoothquant")
    *_, last = walk.walk(make_toy("llama", layers=3), data)
    uniform, scores = {name: make_toy("llama", layers=3) for name in pool}, {}
    for name, model in uniform.items():
        for view in walk.walk(model, data):
            edit = build(name).quantize(view)
            found = view.after(edit).outputs()
            walk.commit(model, view, edit)
        scores[name] = distances(last.outputs())(found)
    for metric in PLAIN:
        model = make_toy("llama", layers=3)
        records = walk.quantize_model(build("cka-hybrid", pool=pool, metric=metric, block=3), model, data)
        best = min(pool, key=lambda name: scores[name][metric])
        assert {r["chosen"] for r in records} == {best} and states_equal(model, uniform[best])
        for name in pool:
            assert records[0]["candidates"][name] == pytest.approx(scores[name], rel=1e-4)


def test_records_of_a_block(make_toy):
    model = make_toy("llama", layers=5)
    records = walk.quantize_model(build("cka-hybrid", pool="rtn|gptq", block=2), model, calib_of(), diagnostics=True)
    assert [r["layer"] for r in records] == [0, 1, 2, 3, 4]
    assert records[0]["chosen"] == records[1]["chosen"] and records[0]["candidates"] == records[1]["candidates"]
    assert ["errors" in r for r in records] == [False, True, False, True, True]  # a unit is compared at its end
    assert all(("losses" in r) == (r["chosen"] == "gptq") for r in records)


def test_larger_blocks_score_farther_on(make_toy):
    scores = [
        walk.quantize_model(build("cka-hybrid", pool="rtn", block=b), make_toy("llama"), calib_of())[0]["candidates"]
        for b in (1, 2)
    ]
    assert scores[1]["rtn"]["cka"] > scores[0]["rtn"]["cka"]


# ---------------------------------------------------------------------------------------------- mistakes


class Silent(Uniform):
    scheme = Scheme()

    def quantize(self, layer):
        edit = round_to_nearest(layer, self.scheme)
        return edit


def test_a_score_that_is_no_number(make_toy):
    model = make_toy("llama")
    with torch.no_grad():
        arch.embedding(model).weight[int(calib_of().tokens[0, 3]), 0] = math.inf
    view = next(walk.walk(model, calib_of(), reference=True))
    with pytest.raises(PTQError, match="layer 0: cka of candidate quiet is not a number.*constant or not finite"):
        Select(("quiet",), ((Silent(),),), "cka").quantize(view)


def test_a_member_that_has_no_rule_per_layer(make_toy, monkeypatch):
    class Coarse(Hybrid):
        pass

    monkeypatch.setitem(method._BUILTIN, "coarse", f"{__name__}:CoarseHybrid")
    with pytest.raises(PTQError, match="'coarse' has a rule for 1 units, the model has 2 layers.*one rule per layer"):
        build("cka-hybrid", pool="rtn|coarse").plan(make_toy("llama"), None)


class CoarseHybrid(Hybrid):
    """A hybrid of whole pairs of layers by default."""

    def plan(self, model, data):
        return super().plan(model, data)[::2]
