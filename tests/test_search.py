"""Beam, refinement, choices by site, controls: what each reduces to, what it may never make worse, what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_select import calib_of, states_equal
from torch.nn import functional as F

from suite import arch, walk
from suite.errors import PTQError
from suite.method import build
from suite.metrics import distances, lens_of
from suite.search import Refinement, SiteView, beam, token_nll
from suite.select import Hybrid

POOL = "rtn|gptq|smoothquant"


@pytest.fixture
def planted(make_toy):
    """Outliers in the middle layer only, so that choices differ."""
    def make(layers=3, kind="llama", **changes):
        model = make_toy(kind, layers=layers, **changes)
        with torch.no_grad():
            norm = arch.layers(model)[1].input_layernorm.weight
            norm[:4] *= 50
        return model
    return make


def quantized(model, data, **options):
    return walk.quantize_model(build("cka-hybrid", **{"pool": POOL, **options}), model, data)


def rules_of(names, model, data, **scheme):
    return {name: build(name, **scheme).plan(model, data) for name in names}


# ---------------------------------------------------------------------------------------------- beam


def test_a_beam_of_one_is_greedy_bit_for_bit(planted):
    data, models = calib_of(), [planted(), planted()]
    greedy = quantized(models[0], data, metric="mse")
    one = quantized(models[1], data, metric="mse", search="beam", width=1)
    assert states_equal(*models)
    for a, b in zip(greedy, one, strict=True):
        assert a["chosen"] == b["chosen"] and a["margin"] == pytest.approx(b["margin"], rel=1e-6)
        assert a["candidates"] == b["candidates"]


def test_a_beam_of_all_prefixes_finds_the_best_of_all_assignments(planted):
    model, data, names = planted(), calib_of(), ("rtn", "gptq")
    rules = rules_of(names, model, data)
    *_, last = walk.walk(model, data, reference=True)
    measure, scores = distances(last.reference), {}
    for choices in itertools.product(names, repeat=3):
        copy = planted()
        walk.quantize_model(Hybrid(pool=names, choices=choices), copy, data)
        *_, end = walk.walk(copy, data)
        scores[choices] = measure(end.outputs())["cka"]
    found = beam(model, data, rules, "cka", 8, 1 << 20)
    assert found.names == min(scores, key=scores.__getitem__)
    assert found.scores[-1][found.names[-1]]["cka"] == pytest.approx(min(scores.values()), rel=1e-4)


def test_a_beam_leaves_the_model_alone(planted):
    model, other = planted(), planted()
    beam(model, calib_of(), rules_of(("rtn", "gptq"), model, None), "cka", 2, 64)
    assert states_equal(model, other)


# ---------------------------------------------------------------------------------------------- refinement


def start_of(model, names):
    return [names] * len(arch.layers(model))


@pytest.mark.parametrize("objective", ["cka", "nll"])
def test_refinement_lowers_the_objective_on_both_halves(planted, objective):
    model, data = planted(), calib_of()
    rules = rules_of(("rtn", "gptq", "smoothquant"), model, data, wbits=2)
    names, note = Refinement(model, data, rules, objective).run(start_of(model, ("rtn",)))
    assert note["kept"] and note["moves"] and names != start_of(model, ("rtn",))
    assert all(after < before for before, after in zip(note["before"], note["frozen"], strict=True))
    assert note["after"][1] < note["before"][1]


def test_refinement_tells_the_true_objective(planted):
    """The objective before is that of the starting assignment, quantized and run as a model."""
    model, data = planted(), calib_of()
    rules = rules_of(("rtn", "smoothquant"), model, data)
    _, note = Refinement(model, data, rules, "nll").run(start_of(model, ("rtn",)))
    copy = planted()
    walk.quantize_model(build("rtn"), copy, data)
    for half, value in ((slice(0, 3), note["before"][0]), (slice(3, 6), note["before"][1])):
        tokens = data.tokens[half]
        logits = copy(tokens).logits[:, :-1].detach()
        assert value == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())), rel=1e-5)


def test_a_move_that_the_other_half_does_not_confirm_is_not_made(planted, monkeypatch):
    model, data = planted(), calib_of()
    original = Refinement._value
    monkeypatch.setattr(Refinement, "_value", lambda self, a, i, half: original(self, a, i, half) if half == 0 else 1.0)
    rules = rules_of(("rtn", "gptq"), model, data, wbits=2)
    names, note = Refinement(model, data, rules, "nll").run(start_of(model, ("rtn",)))
    assert names == start_of(model, ("rtn",)) and note["moves"] == [] and not note["kept"]


def test_an_assignment_that_is_worse_once_quantized_again_is_dropped(planted, monkeypatch):
    model, data = planted(), calib_of()
    monkeypatch.setattr(Refinement, "_requantized", lambda self, assignment: (99.0, 99.0))
    rules = rules_of(("rtn", "gptq"), model, data, wbits=2)
    names, note = Refinement(model, data, rules, "nll").run(start_of(model, ("rtn",)))
    assert names == start_of(model, ("rtn",)) and note["moves"] and not note["kept"]


@pytest.mark.parametrize("unit", ["layer", "site"])
def test_a_refined_hybrid_is_quantized_as_it_was_assigned(planted, unit):
    data, model = calib_of(), planted()
    records = quantized(model, data, refine="nll", unit=unit, wbits=2)
    note = records[0]["refined"]
    assert note["objective"] == "nll" and isinstance(note["kept"], bool)
    copy = planted()
    sites = arch.sites(copy)
    for view, record in zip(walk.walk(copy, data), records, strict=True):
        if unit == "layer":
            edit = build(record["chosen"], wbits=2).quantize(view)
        else:
            edit = None
            for site in sites:
                step = build(record["chosen_by_site"][site.name], wbits=2).quantize(SiteView(view, site))
                edit = step if edit is None else edit | step
        walk.commit(copy, view, edit)
    assert states_equal(model, copy)


@pytest.mark.parametrize("unit", ["layer", "site"])
def test_a_refinement_quantizes_no_candidate_again_that_the_greedy_search_has_made(planted, unit, monkeypatch):
    """What it takes over is, bit for bit, what it would have made."""
    made, data = [], calib_of()

    def counted(self, name, site, layer, original=Refinement._edit):
        took = original(self, name, site, layer)
        assert took is self._made[layer.index, name, site]
        again = self._rules[name][layer.index].quantize(layer)
        assert took.params.keys() == again.params.keys()
        assert all(torch.equal(took.params[key], again.params[key]) for key in again.params)
        made.append((layer.index, name, site))
        return took

    monkeypatch.setattr(Refinement, "_edit", counted)
    model = planted()
    quantized(model, data, refine="nll", unit=unit, wbits=3)
    slots = 1 if unit == "layer" else len(arch.sites(model))
    assert len(made) == len(set(made)) == len(arch.layers(model)) * 3 * slots


def test_token_nll_is_the_models_own(make_toy):
    model, tokens = make_toy("qwen"), calib_of().tokens
    *_, last = walk.walk(model, calib_of())
    logits = model(tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").reshape(len(tokens), -1)
    assert torch.allclose(token_nll(model, last.outputs(), tokens), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------- by site


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("name", ["rtn", "gptq", "smoothquant"])
def test_a_pool_of_one_by_site_is_that_method(kind, name, planted):
    """AWQ is not here: by site its scales move into norms only."""
    data, models = calib_of(), [planted(kind=kind), planted(kind=kind)]
    quantized(models[0], data, pool=name, unit="site")
    walk.quantize_model(build(name), models[1], data)
    assert states_equal(*models)


def test_by_site_no_scale_moves_into_a_linear(planted):
    view = next(walk.walk(planted(kind="qwen"), calib_of()))
    for site in view.sites:
        edit = build("awq").quantize(SiteView(view, site))
        norms = {key for key in edit.params if "norm" in key}
        assert set(edit.params) - norms == {f"{name}.weight" for name in site.linears}
        assert set(edit.linears) == set(site.linears)
        assert norms <= {f"{site.feeder}.weight"}


def test_by_site_the_closest_output_wins(planted):
    model, data = planted(), calib_of()
    records = quantized(model, data, unit="site", metric="mse")
    for record in records:
        for site, scores in record["candidates_by_site"].items():
            assert record["chosen_by_site"][site] == min(scores, key=lambda name: scores[name]["mse"])
        names = set(record["chosen_by_site"].values())
        assert record["chosen"] == (names.pop() if len(names) == 1 else "mixed")


# ---------------------------------------------------------------------------------------------- metric and controls


def test_kl_by_its_formula(make_toy):
    model = make_toy("llama")
    x = torch.randn(2, 8, arch.embedding(model).weight.shape[1])
    y = x + 0.1 * torch.randn_like(x)
    p, q = (torch.softmax(lens_of(model)(h), -1).double() for h in (x, y))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert distances(x, lens_of(model))(y)["kl"] == pytest.approx(expected, rel=1e-4) and expected > 0


def test_the_worst_is_the_worst(planted):
    for record in quantized(planted(), calib_of(), pick="farthest"):
        scores = {name: found["cka"] for name, found in record["candidates"].items()}
        assert record["chosen"] == max(scores, key=scores.__getitem__) and record["margin"] <= 0


def test_random_choices_follow_their_seed(planted):
    drawn = [[r["chosen"] for r in quantized(planted(), calib_of(), pick="random", pick_seed=seed)]
             for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({tuple(names) for names in drawn}) > 1


def test_choices_are_kept(planted):
    choices = ("gptq", "rtn", "smoothquant")
    model, copy, data = planted(), planted(), calib_of()
    assert tuple(r["chosen"] for r in quantized(model, data, choices="|".join(choices))) == choices
    for view, name in zip(walk.walk(copy, data), choices, strict=True):
        walk.commit(copy, view, build(name).quantize(view))
    assert states_equal(model, copy)


# ---------------------------------------------------------------------------------------------- options


def test_a_block_as_a_unit_is_the_same_method():
    assert build("cka-hybrid", unit="block-4") == build("cka-hybrid", block=4)


@pytest.mark.parametrize("options, message", [
    ({"search": "beem"}, "unknown search 'beem': did you mean 'beam'"),
    ({"unit": "layers"}, "unknown unit 'layers'"),
    ({"refine": "ppl"}, "unknown refine 'ppl'.*cka.*nll|unknown refine 'ppl'"),
    ({"pick": "best"}, "unknown pick 'best'"),
    ({"width": 3}, "width=3 has no effect with search=greedy"),
    ({"width": 0}, "width is 0"),
    ({"pick_seed": 1}, "pick_seed=1 has no effect without pick=random"),
    ({"choices": "rtn"}, "unknown method in choices 'rtn'"),
    ({"choices": "gptq|awq", "pick": "random"}, "choices, which leave nothing to pick"),
    ({"pick": "random", "refine": "nll"}, "controls"),
    ({"block": 2, "refine": "nll"}, "block=2 goes with"),
    ({"block": 2, "unit": "site"}, "block=2 goes with"),
    ({"block": 4, "unit": "block-2"}, "give one of them"),
    ({"unit": "site", "search": "beam", "width": 2}, "unit=site goes with search=greedy"),
])
def test_options_that_would_be_without_effect_are_refused(options, message):
    with pytest.raises(PTQError, match=message):
        build("cka-hybrid", **options)


def test_choices_must_cover_the_model(make_toy):
    with pytest.raises(PTQError, match="choices names 1 layers, the model has 2"):
        build("cka-hybrid", choices="gptq").plan(make_toy("llama"), calib_of())


def test_searches_need_calibration(make_toy):
    with pytest.raises(PTQError, match="needs calibration data"):
        build("cka-hybrid", pool="rtn", refine="nll").plan(make_toy("llama"), None)
