"""The walk: what a view shows is what is written; each token counts once; nothing is run or kept needlessly."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from dataclasses import dataclass

import pytest
import torch

from suite import arch, calib, method, walk
from suite.cka import linear_cka
from suite.errors import PTQError
from suite.grid import QuantSpec, Scheme, fake_quantize_tokens
from suite.linear import QuantLinear, RoundedLinear
from suite.method import LayerEdit, LinearQuant, Uniform, build
from suite.rounding import round_to_nearest

# what rewrites the whole model first goes through the contract, and no differently through the walk
METHODS = [
    name
    for name in method.names() + method.compositions()
    if not hasattr(method.lookup(name.split("+")[0]), "rewrites_model")
]


def tokens_of(n=6, t=32, seed=0):
    return torch.randint(512, (n, t), generator=torch.Generator().manual_seed(seed))


def calib_of(n=6, t=32, seed=0):
    return calib.from_tokens(tokens_of(n, t, seed))


class SmallBatches(calib.Calibration):
    """Two sequences a batch."""

    def step(self, tokens_per_batch: int = 0) -> int:
        return 2


def in_small_batches(data):
    return SmallBatches(**vars(data))


@torch.no_grad()
def layer_outputs(model, tokens) -> list[torch.Tensor]:
    """What each decoder layer puts out when the model runs."""
    seen = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in arch.layers(model)
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def linear_inputs(model, tokens) -> list[dict[str, torch.Tensor]]:
    """Layer by layer, what each linear is given, (tokens, in), before any rounding."""
    seen: list[dict[str, torch.Tensor]] = [{} for _ in arch.layers(model)]
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, k=k, name=name: seen[k].update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
        for k, layer in enumerate(arch.layers(model))
        for site in arch.sites(model)
        for name in site.linears
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@contextlib.contextmanager
def counted(model):
    """Tokens that enter each decoder layer."""
    counts = [0] * len(arch.layers(model))

    def hook(k):
        def count(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            counts[k] += hidden.shape[0] * hidden.shape[1]

        return count

    handles = [layer.register_forward_pre_hook(hook(k), with_kwargs=True) for k, layer in enumerate(arch.layers(model))]
    yield counts
    for handle in handles:
        handle.remove()


# ---------------------------------------------------------------------------------------------- seen = written


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind, dtype", [("llama", torch.float32), ("qwen", torch.bfloat16)])
def test_edited_view_equals_the_written_layer(name, kind, dtype, make_toy):
    """Bit for bit, for the outputs that were scored and for those that the next layer is fed."""
    model, data = make_toy(kind, dtype), calib_of()
    made, shown, fed = build(name), [], []
    rules = made.plan(model, data)
    for view, rule in zip(walk.walk(model, data, reference=True), rules, strict=True):
        fed.append(view.inputs())
        edit = rule.quantize(view)
        shown.append(view.after(edit).outputs())
        walk.commit(model, view, edit)
    written = layer_outputs(model, data.tokens)
    assert torch.equal(fed[1], shown[0])
    assert all(torch.equal(a, b) for a, b in zip(shown, written, strict=True))


@pytest.mark.parametrize(
    "scheme", [Scheme.of(4, 16), Scheme.of(16, 8), Scheme.of(3, 4, 32, False), Scheme.of(16, 16)], ids=str
)
def test_other_schemes_too(scheme, make_toy):
    model, data = make_toy("qwen"), calib_of()
    for view in walk.walk(model, data):
        edit = round_to_nearest(view, scheme)
        shown = view.after(edit).outputs()
        walk.commit(model, view, edit)
    assert torch.equal(shown, layer_outputs(model, data.tokens)[-1])
    kinds = {type(arch.layers(model)[0].get_submodule(n)) for site in arch.sites(model) for n in site.linears}
    assert kinds == {QuantLinear if scheme.weight.quantized else RoundedLinear if scheme.act else torch.nn.Linear}


def test_batches_give_the_same_outputs(toy_llama):
    whole, parts = (next(walk.walk(toy_llama, data)) for data in (calib_of(5), in_small_batches(calib_of(5))))
    assert torch.allclose(whole.outputs(), parts.outputs(), atol=1e-5)
    assert whole.outputs().shape == (5, 32, 128)


def test_first_sequences_are_those_of_all(toy_llama):
    view = next(walk.walk(toy_llama, in_small_batches(calib_of(7))))
    other = next(walk.walk(toy_llama, in_small_batches(calib_of(7))))
    few = view.outputs(4).clone()
    assert len(few) == 4 and torch.equal(few, other.outputs()[:4])
    assert torch.equal(view.outputs(), other.outputs()) and torch.equal(view.outputs(2), few[:2])
    assert torch.equal(view.inputs(3), view.inputs()[:3])


def test_an_edit_shows_in_its_view_only(toy_llama):
    view = next(walk.walk(toy_llama, calib_of()))
    before, weight = view.outputs().clone(), view.weight("mlp.up_proj").clone()
    edited = view.after(LayerEdit({"mlp.up_proj.weight": weight * 2}))
    assert torch.equal(edited.weight("mlp.up_proj"), weight * 2) and not torch.allclose(edited.outputs(), before)
    twice = edited.after(LayerEdit({"mlp.down_proj.weight": view.weight("mlp.down_proj") * 2}))
    assert torch.equal(twice.weight("mlp.up_proj"), weight * 2)
    assert torch.equal(view.weight("mlp.up_proj"), weight) and torch.equal(view.outputs(), before)
    assert torch.equal(arch.layers(toy_llama)[0].mlp.up_proj.weight, weight)


def test_outputs_are_computed_once_and_forgotten_on_request(toy_llama):
    view = next(walk.walk(toy_llama, calib_of()))
    edit = round_to_nearest(view, Scheme())
    noted = LayerEdit(edit.params, edit.linears, {"chosen": "x"})
    first = view.after(edit).outputs()
    with counted(toy_llama) as counts:
        assert view.after(edit).outputs() is first and view.after(noted).outputs() is first
        assert counts == [0, 0]
        view.forget(edit)
        assert view.after(edit).outputs() is not first and counts[0] == 6 * 32


# ---------------------------------------------------------------------------------------------- statistics


def direct_statistics(x):
    """From all inputs of a linear at once, in float64."""
    x = x.double()
    return {"gram": x.T @ x / len(x), "absmax": x.abs().amax(0), "absmean": x.abs().mean(0)}


def assert_statistics(view, inputs):
    for site in view.sites:
        expected = direct_statistics(inputs[site.linears[0]])
        assert expected["gram"].shape == view.stat("gram", site).shape
        for kind, value in expected.items():
            found = view.stat(kind, site)
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), (
                kind,
                site.name,
            )


@pytest.mark.parametrize("kind", ["llama", "qwen", "llama-mha"])
@pytest.mark.parametrize("split", [lambda data: data, in_small_batches], ids=["one-batch", "batches"])
@pytest.mark.parametrize("first", ["gram", "absmax", "absmean"])
def test_statistics_equal_a_direct_computation(kind, split, first, make_toy):
    """Each token once, though the statistic is the first thing that makes any part of the model run."""
    model, data = make_toy(kind), calib_of(5)
    inputs = linear_inputs(model, data.tokens)
    for k, view in enumerate(walk.walk(model, split(data))):
        view.stat(first, view.sites[0])
        assert_statistics(view, inputs[k])


def test_first_read_in_the_last_layer(make_toy):
    """All layers before it are run for the first time when its statistics are asked for."""
    model, data = make_toy("llama", layers=3), calib_of(5)
    inputs = linear_inputs(model, data.tokens)
    *_, last = walk.walk(model, in_small_batches(data))
    assert_statistics(last, inputs[2])


def test_statistics_of_a_quantized_prefix(make_toy):
    model, data = make_toy("qwen"), calib_of()
    views = walk.walk(model, data)
    first = next(views)
    walk.commit(model, first, round_to_nearest(first, Scheme()))
    second = next(views)
    assert_statistics(second, linear_inputs(model, data.tokens)[1])


def test_statistics_of_an_edited_view(make_toy):
    """Those of the layer as edited, its activation rounding included, before the rounding of the site itself."""
    model, data = make_toy("qwen"), calib_of()
    view = next(walk.walk(model, data))
    plain = view.stat("gram", view.sites[3]).clone()
    edit = round_to_nearest(view, Scheme.of(3, 4))
    edited = view.after(edit)
    found = {site.name: edited.stat("gram", site) for site in view.sites}
    walk.commit(model, view, edit)
    inputs = linear_inputs(model, data.tokens)[0]
    for site in view.sites:
        expected = direct_statistics(inputs[site.linears[0]])["gram"]
        assert torch.allclose(found[site.name].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(found["qkv"], view.stat("gram", view.sites[0])) and not torch.allclose(
        found["down"], plain, rtol=1e-2
    )


def test_one_pass_fills_all(toy_llama):
    view = next(walk.walk(toy_llama, calib_of()))
    view.inputs(), dict(view._kwargs)
    with counted(toy_llama) as counts:
        for kind, site in itertools.product(("gram", "absmax", "absmean"), view.sites):
            view.stat(kind, site)
        view.scope_outputs(view.sites[0], {})
    assert counts == [6 * 32, 0]


def test_unknown_statistic(toy_llama):
    view = next(walk.walk(toy_llama, calib_of()))
    with pytest.raises(ValueError, match="'mean'.*gram, absmax, absmean"):
        view.stat("mean", view.sites[0])


# ---------------------------------------------------------------------------------------------- scopes


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_scope_outputs_are_those_of_the_module(kind, make_toy):
    model, data = make_toy(kind), calib_of()
    view, seen = next(walk.walk(model, data)), {}
    layer = arch.layers(model)[0]
    handles = [
        layer.get_submodule(site.scope).register_forward_hook(
            lambda _, __, out, scope=site.scope: seen.update({scope: out[0] if isinstance(out, tuple) else out})
        )
        for site in view.sites
    ]
    for site in view.sites:
        name = f"{site.linears[-1]}.weight"
        changed = view.weight(site.linears[-1]) * 1.5
        found = view.scope_outputs(site, {}), view.scope_outputs(site, {name: changed})
        with torch.no_grad():
            model(data.tokens)
            assert torch.allclose(found[0], seen[site.scope], atol=1e-5)
            parameter = layer.get_submodule(site.linears[-1]).weight
            parameter.copy_(changed)
            model(data.tokens)
            assert torch.allclose(found[1], seen[site.scope], atol=1e-5)
            parameter.div_(1.5)
    for handle in handles:
        handle.remove()


def test_scope_outputs_round_no_activations(make_toy):
    """Also those of a view whose activations are rounded."""
    view = next(walk.walk(make_toy("llama"), calib_of()))
    edited = view.after(
        LayerEdit(linears={name: LinearQuant(None, QuantSpec(4)) for s in view.sites for name in s.linears})
    )
    inputs = view.inputs()
    assert torch.allclose(edited.scope_outputs(view.sites[0], {}), view.scope_outputs(view.sites[0], {}), atol=1e-6)
    down = view.sites[3]
    edited.stat("gram", down)
    args, _ = edited._scope_calls[down.scope]
    distinct = max(len(token.unique()) for token in args[0].reshape(-1, args[0].shape[-1])[:50])
    assert distinct > 16 and len(inputs) == 6


def test_scopes_run_on_a_sample(make_toy, monkeypatch):
    monkeypatch.setattr(walk, "SAMPLE_TOKENS", 100)
    view = next(walk.walk(make_toy("llama"), calib_of(8)))
    assert len(view.scope_outputs(view.sites[0], {})) == 3  # sequences of 32 tokens
    long = next(walk.walk(make_toy("llama"), calib_of(3, 120)))
    assert len(long.scope_outputs(long.sites[0], {})) == 1  # at least one


# ---------------------------------------------------------------------------------------------- layers that differ


def sliding_windows(make_toy, layers=4):
    """Qwen2 with a window of 8 tokens in every other layer."""
    kinds = ["full_attention", "sliding_attention"] * (layers // 2)
    return make_toy(
        "qwen", layers=layers, use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=kinds
    )


def test_each_layer_gets_its_own_mask(make_toy):
    model, data = sliding_windows(make_toy), calib_of()
    kwargs = walk.layer_kwargs(model, data.tokens)
    masks = [kw["attention_mask"] for kw in kwargs]
    assert masks[0] is None or not torch.equal(masks[0], masks[1])
    for view, expected in zip(walk.walk(model, data), layer_outputs(model, data.tokens), strict=True):
        assert torch.allclose(view.outputs(), expected, atol=1e-5)


def test_windows_matter_to_this_model(make_toy):
    """The test above would pass unnoticed on a model whose layers are alike."""
    plain, windowed = make_toy("qwen", layers=4), sliding_windows(make_toy)
    windowed.load_state_dict(plain.state_dict())
    assert not torch.allclose(layer_outputs(plain, tokens_of())[1], layer_outputs(windowed, tokens_of())[1], atol=1e-2)


@pytest.mark.parametrize("name", ["gptq", "cka-hybrid"])
def test_quantized_layers_that_differ(name, make_toy):
    model, data = sliding_windows(make_toy), calib_of()
    shown = []
    for view, rule in zip(walk.walk(model, data, reference=True), build(name).plan(model, data), strict=True):
        edit = rule.quantize(view)
        shown.append(view.after(edit).outputs())
        walk.commit(model, view, edit)
    assert all(torch.equal(a, b) for a, b in zip(shown, layer_outputs(model, data.tokens), strict=True))


def test_embeddings_that_are_changed_before_the_layers(make_toy):
    model = make_toy("llama")
    arch.layers(model)[0].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 2,), kwargs) if args else None, with_kwargs=True
    )
    with pytest.raises(PTQError, match="'llama' changes the embeddings"):
        next(walk.walk(model, calib_of())).outputs()


# ---------------------------------------------------------------------------------------- what is fed and compared


def test_quantized_inputs_are_the_written_prefix_and_full_ones_the_original(make_toy):
    data = calib_of()
    original = layer_outputs(make_toy("llama", layers=3), data.tokens)
    for policy in ("quantized", "full"):
        model = make_toy("llama", layers=3)
        for k, view in enumerate(walk.walk(model, data, inputs=policy, reference=True)):
            assert torch.equal(view.reference, original[k])
            if k > 0:
                expected = original if policy == "full" else layer_outputs(model, data.tokens)
                assert torch.equal(view.inputs(), expected[k - 1])
                assert policy == "full" or not torch.equal(view.inputs(), original[k - 1])
            walk.commit(model, view, round_to_nearest(view, Scheme()))


def test_full_inputs_change_what_gptq_does(make_toy):
    one, other, data = make_toy("llama"), make_toy("llama"), calib_of()
    walk.quantize_model(build("gptq"), one, data)
    walk.quantize_model(build("gptq"), other, data, inputs="full")
    codes = [[layer.mlp.up_proj.codes for layer in arch.layers(m)] for m in (one, other)]
    assert torch.equal(codes[0][0], codes[1][0]) and not torch.equal(codes[0][1], codes[1][1])


def test_reference_of_some_sequences(make_toy):
    data = calib_of()
    original = layer_outputs(make_toy("llama"), data.tokens)
    model = make_toy("llama")
    for k, view in enumerate(walk.walk(model, data, reference=2)):
        assert len(view.reference) == 2 and torch.allclose(view.reference, original[k][:2], atol=1e-5)
        walk.commit(model, view, round_to_nearest(view, Scheme()))


def test_reference_is_that_of_the_unquantized_layer_even_if_read_late(make_toy):
    data = calib_of()
    original = layer_outputs(make_toy("llama"), data.tokens)
    model = make_toy("llama")
    for k, view in enumerate(walk.walk(model, data, reference=True)):
        walk.commit(model, view, round_to_nearest(view, Scheme()))
        assert torch.equal(view.reference, original[k])


def test_reference_that_was_not_kept(toy_llama):
    with pytest.raises(RuntimeError, match="reference_tokens"):
        next(walk.walk(toy_llama, calib_of())).reference  # noqa: B018


def test_a_view_of_a_written_layer_is_refused(make_toy):
    """It would show the written layer with the edit applied once more."""
    model = make_toy("llama")
    view = next(walk.walk(model, calib_of()))
    edit = round_to_nearest(view, Scheme())
    walk.commit(model, view, edit)
    for act in (view.outputs, view.after(edit).outputs, lambda: view.stat("gram", view.sites[0])):
        with pytest.raises(RuntimeError, match="layer 0 was written after this view was made"):
            act()


def test_uncommitted_layers_feed_the_next(toy_llama):
    expected = layer_outputs(toy_llama, tokens_of())
    for view, outputs in zip(walk.walk(toy_llama, calib_of()), expected, strict=True):
        assert torch.equal(view.outputs(), outputs)


# ---------------------------------------------------------------------------------------------- how much is run


def passes(name, make_toy, data, n_layers=3, **options):
    """Tokens per layer, those of one sequence (to capture arguments) taken off, in passes over the calibration set."""
    model = make_toy("llama", layers=n_layers)
    with counted(model) as counts:
        walk.quantize_model(build(name, **options), model, data)
    return [(count - data.tokens.shape[1]) / data.tokens.numel() for count in counts]


def test_round_to_nearest_runs_nothing(make_toy):
    model = make_toy("llama")
    with counted(model) as counts:
        walk.quantize_model(build("rtn"), model, calib_of())
        walk.quantize_model(build("fp16"), make_toy("llama"), calib_of())
    assert counts == [0, 0]
    walk.quantize_model(build("rtn"), make_toy("llama"), None)


def test_statistics_and_outputs_are_one_pass_each(make_toy):
    assert passes("gptq", make_toy, calib_of()) == [2, 2, 1]  # the last layer feeds nobody
    assert passes("smoothquant", make_toy, calib_of()) == [2, 2, 1]
    assert passes("awq", make_toy, calib_of()) == [2, 2, 1]


def test_a_hybrid_runs_reference_statistics_and_each_candidate(make_toy):
    """Three candidates: five passes per layer, nothing for the inputs of the next."""
    assert passes("cka-hybrid", make_toy, calib_of()) == [5, 5, 5]
    assert passes("cka-hybrid", make_toy, calib_of(), pool="rtn") == [2, 2, 2]
    assert passes("cka-hybrid", make_toy, in_small_batches(calib_of())) == [5, 5, 5]


def test_a_hybrid_scored_on_a_part_completes_the_winner_only(make_toy):
    """Of six sequences four hold enough tokens: 4/6 for the reference and each candidate, 2/6 more for the winner."""
    found = passes("cka-hybrid", make_toy, in_small_batches(calib_of()), score_tokens=100)
    assert found == pytest.approx([1 + 4 * 4 / 6 + 2 / 6] * 2 + [1 + 4 * 4 / 6])


def test_scored_on_a_part_the_result_is_that_of_the_winner(make_toy):
    models, data = [make_toy("llama", layers=3) for _ in range(2)], in_small_batches(calib_of())
    walk.quantize_model(build("cka-hybrid", pool="gptq", score_tokens=100), models[0], data)
    walk.quantize_model(build("gptq"), models[1], data)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


# ---------------------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class Watched(Uniform):
    """Keeps weak references to what each view computed."""

    inner: object
    seen: list

    @property
    def scheme(self):
        return self.inner.scheme

    def plan(self, model, data):
        return [Watched(rule, self.seen) for rule in self.inner.plan(model, data)]

    @property
    def reference_tokens(self):
        return getattr(self.inner, "reference_tokens", 0)

    def quantize(self, layer):
        alive = {name for entry in self.seen[:-1] for name, ref in entry.items() if ref() is not None}
        alive |= {f"last {name}" for name, ref in (self.seen[-1] if self.seen else {}).items() if ref() is not None}
        edit = self.inner.quantize(layer)
        self.seen.append(
            {
                "gram": weakref.ref(layer.stat("gram", layer.sites[0])),
                "inputs": weakref.ref(layer.inputs()),
                "weight": weakref.ref(layer.weight("mlp.up_proj")),
                "view": weakref.ref(layer),
            }
        )
        assert alive <= {"last weight", "last inputs"}, alive
        return edit


@pytest.mark.parametrize("name", ["gptq", "cka-hybrid", "awq+gptq", "rtn"])
def test_past_layers_are_freed(name, make_toy):
    """While a layer is quantized, nothing of earlier ones is left but, at most, what feeds it."""
    seen: list = []
    walk.quantize_model(Watched(build(name), seen), make_toy("llama", layers=4), calib_of())
    assert len(seen) == 4
    assert all(ref() is None for entry in seen for key, ref in entry.items())


def test_losing_candidates_are_freed_at_once(make_toy, monkeypatch):
    """Only the view that is left and its winner are."""
    views: list = []

    def remember(self, first=None, original=walk.LayerView.outputs):
        views.append(weakref.ref(self))
        return original(self, first)

    monkeypatch.setattr(walk.LayerView, "outputs", remember)
    walked = walk.walk(make_toy("llama"), calib_of(), reference=True)
    view = next(walked)
    rule = build("cka-hybrid", pool="rtn|gptq|smoothquant").plan(make_toy("llama"), None)[0]
    views.clear()
    edit = rule.quantize(view)
    assert len(views) == 3 and [ref() for ref in views if ref() is not None] == [view.after(edit)]


# ---------------------------------------------------------------------------------------------- writing


def broken_edits(view):
    edit, key = round_to_nearest(view, Scheme()), "mlp.up_proj.weight"
    weight = edit.params[key]
    yield "missing: mlp.up_proj", LayerEdit(edit.params, {k: v for k, v in edit.linears.items() if k != "mlp.up_proj"})
    yield "unknown: mlp.other", edit | LayerEdit(linears={"mlp.other": LinearQuant(None)})
    yield "'mlp.other.weight'.*it has", edit | LayerEdit({"mlp.other.weight": weight})
    yield r"\(128, 128\).*must stay \(256, 128\)", edit | LayerEdit({key: weight[:128]})
    yield "torch.float64.*torch.float32", edit | LayerEdit({key: weight.double()})
    yield "not finite", edit | LayerEdit({key: weight / 0})


@pytest.mark.parametrize("k", range(6))
def test_nothing_is_written_when_an_edit_breaks_the_protocol(k, make_toy):
    model = make_toy("llama")
    views = walk.walk(model, calib_of())
    walk.commit(model, first := next(views), round_to_nearest(first, Scheme()))
    view = next(views)
    pattern, edit = list(broken_edits(view))[k]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PTQError, match=f"layer 1.*{pattern}"):
        walk.commit(model, view, edit)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_block_is_written_whole_or_not_at_all(make_toy):
    model = make_toy("llama")
    view = next(walk.walk(model, calib_of(), block=2))
    edit = view.quantize_with([build("rtn")] * 2)
    broken = edit | LayerEdit({"1.mlp.up_proj.weight": edit.params["1.mlp.up_proj.weight"].double()})
    with pytest.raises(PTQError, match="layer 1"):
        walk.commit(model, view, broken)
    assert type(arch.layers(model)[0].mlp.up_proj) is torch.nn.Linear


def test_written_linears_share_the_rounding_of_their_site(make_toy):
    model = make_toy("qwen")
    biases = [arch.layers(model)[0].self_attn.q_proj.bias.clone(), arch.layers(model)[0].mlp.up_proj.bias]
    walk.quantize_model(build("rtn"), model, None)
    attention, mlp = arch.layers(model)[0].self_attn, arch.layers(model)[0].mlp
    assert attention.q_proj.rounding is attention.k_proj.rounding is attention.v_proj.rounding
    assert len({id(x.rounding) for x in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)}) == 4
    assert torch.equal(attention.q_proj.bias, biases[0]) and mlp.up_proj.bias is biases[1] is None
    x = torch.randn(2, 5, 128)
    expected = torch.nn.functional.linear(
        fake_quantize_tokens(x, QuantSpec(8, True, None)), attention.q_proj.weight, biases[0]
    )
    assert torch.equal(attention.q_proj(x), expected)


def test_embeddings_norms_and_head_stay(make_toy):
    model, original = make_toy("llama-tied"), make_toy("llama-tied")
    walk.quantize_model(build("gptq"), model, calib_of())
    kept = dict(original.named_parameters())
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert set(dict(model.named_parameters())) == {name for name in kept if "proj" not in name}
    assert arch.head(model).weight is arch.embedding(model).weight


# ---------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("block, layers", [(2, 3), (4, 3)])
@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
def test_a_block_of_one_candidate_equals_the_candidate(block, layers, name, make_toy):
    data = calib_of()
    for policy in ("quantized", "full"):
        models = [make_toy("llama", layers=layers) for _ in range(2)]
        records = walk.quantize_model(build("cka-hybrid", pool=name, block=block), models[0], data, inputs=policy)
        walk.quantize_model(build(name), models[1], data, inputs=policy)
        states = [m.state_dict() for m in models]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
        assert [r["layer"] for r in records] == list(range(layers))


def test_a_block_runs_its_layers_once_per_candidate(make_toy):
    """Per layer: reference, statistics on the inputs of either candidate, and the two candidates."""
    found = passes("cka-hybrid", make_toy, calib_of(), n_layers=4, pool="gptq|smoothquant", block=2)
    assert found == [5, 5, 5, 5]


def test_a_block_view_is_a_layer_view(make_toy):
    model, data = make_toy("qwen"), calib_of()
    view, singles = next(walk.walk(model, data, block=2, reference=True)), list(walk.walk(model, data, reference=True))
    assert view.index == 0 and view.layers_spanned == 2 and len(view.sites) == 8
    assert torch.equal(view.inputs(), singles[0].inputs()) and torch.equal(view.outputs(), singles[1].outputs())
    assert torch.equal(view.reference, singles[1].reference)
    for j, k in itertools.product(range(2), range(4)):
        site, single = view.sites[4 * j + k], singles[j].sites[k]
        for kind in ("gram", "absmax", "absmean"):
            assert torch.equal(view.stat(kind, site), singles[j].stat(kind, single))
        for name, inner in zip(site.linears, single.linears, strict=True):
            assert torch.equal(view.weight(name), singles[j].weight(inner))
            bias = view.bias(name)
            assert bias is singles[j].bias(inner) is None or torch.equal(bias, singles[j].bias(inner))
        changed = {f"{site.linears[0]}.weight": view.weight(site.linears[0]) * 2}
        inner = {key.split(".", 1)[1]: value for key, value in changed.items()}
        assert torch.equal(view.scope_outputs(site, changed), singles[j].scope_outputs(single, inner))


def test_an_edit_of_a_block_reaches_its_layers(make_toy):
    model, data = make_toy("qwen"), calib_of()
    view = next(walk.walk(model, data, block=2))
    before = view.outputs().clone()
    edit = round_to_nearest(view, Scheme())  # a rule that knows nothing of blocks
    shown = view.after(edit).outputs()
    assert torch.equal(view.outputs(), before)
    walk.commit(model, view, edit)
    assert torch.equal(shown, layer_outputs(model, data.tokens)[1])
    other = make_toy("qwen")
    walk.quantize_model(build("rtn"), other, None)
    states = model.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


# ---------------------------------------------------------------------------------------------- whole model


def test_records(make_toy):
    model, data, seen = make_toy("llama"), calib_of(), []
    original = layer_outputs(model, data.tokens)
    records = walk.quantize_model(build("gptq"), model, data, progress=lambda *a: seen.append(a), diagnostics=True)
    written = layer_outputs(model, data.tokens)
    assert seen == [(1, 2, ""), (2, 2, "")]
    for k, record in enumerate(records):
        assert record["layer"] == k and record["seconds"] > 0
        assert record["weights"] == 128 * (128 + 64 + 64 + 128 + 256 + 256 + 256)
        assert record["bits"] == 4 + 16 / 128 and set(record["losses"]) == {
            n for s in arch.sites(model) for n in s.linears
        }
        x, y = original[k].reshape(-1, 128).double(), written[k].reshape(-1, 128).double()
        assert record["errors"]["mse"] == pytest.approx(float((y - x).square().sum() / x.square().sum()), rel=1e-4)
        assert record["errors"]["cka"] == pytest.approx(1 - linear_cka(x, y), rel=1e-3)


def test_the_first_layer_bears_the_time_of_the_plan(make_toy):
    class Ponders(Uniform):
        scheme = Scheme()

        def plan(self, model, data):
            time.sleep(0.5)
            return [build("rtn")] * 2

    records = walk.quantize_model(Ponders(), make_toy("llama"), None)
    assert records[0]["seconds"] >= 0.5 > records[1]["seconds"]


@pytest.mark.parametrize("name", [name for name in METHODS if build(name).scheme.weight.quantized])
@pytest.mark.parametrize("abits", [8, 16])
def test_weights_of_16_bits(name, abits, make_toy):
    """No weight is rounded; what is left are folds and the rounding of activations."""
    model = make_toy("qwen")
    before = layer_outputs(model, tokens_of())[-1]
    records = walk.quantize_model(build(name, wbits=16, abits=abits), model, calib_of())
    assert [r["bits"] for r in records] == [16, 16]
    found = layer_outputs(model, tokens_of())[-1]
    assert (found - before).norm() / before.norm() < (1e-5 if abits == 16 else 0.1)


def test_progress_names_the_choice(make_toy):
    seen = []
    walk.quantize_model(build("cka-hybrid", pool="rtn"), make_toy("llama"), calib_of(), lambda *a: seen.append(a))
    assert seen == [(1, 2, "rtn"), (2, 2, "rtn")]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fp16", "rtn"}))
def test_methods_that_need_data_say_so(name, make_toy):
    model = make_toy("llama")
    with pytest.raises(PTQError, match="needs calibration data: pass --calib"):
        walk.quantize_model(build(name), model, None)
    assert type(arch.layers(model)[0].mlp.up_proj) is torch.nn.Linear


def test_diagnostics_without_data_are_left_out(make_toy):
    assert all("errors" not in r for r in walk.quantize_model(build("rtn"), make_toy("llama"), None, diagnostics=True))


class Fails(Uniform):
    scheme = Scheme()

    def quantize(self, layer):
        if layer.index == 1:
            raise PTQError("layer 1: no")
        return round_to_nearest(layer, self.scheme)


def test_a_failure_leaves_the_mode_and_no_hooks(make_toy):
    model = make_toy("llama").train()
    with pytest.raises(PTQError, match="layer 1: no"):
        walk.quantize_model(Fails(), model, calib_of())
    assert model.training and all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_forward_leaves_no_hooks(make_toy, monkeypatch):
    model = make_toy("llama")
    view = next(walk.walk(model, calib_of()))
    edited = view.after(round_to_nearest(view, Scheme()))
    view.inputs(), dict(view._kwargs)
    monkeypatch.setattr(type(arch.layers(model)[0].mlp.down_proj), "forward", lambda *_: 1 / 0)
    for act in (lambda: view.stat("gram", view.sites[0]), edited.outputs, lambda: edited.stat("gram", view.sites[0])):
        with pytest.raises(ZeroDivisionError):
            act()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda model: next(walk.walk(model, calib_of(), inputs="fulll")), ["'fulll'", "'quantized' and 'full'"]),
        (lambda model: next(walk.walk(model, calib_of(), block=0)), ["block is 0", "1 to 2"]),
        (
            lambda model: walk.quantize_model(build("rtn", group_size=96), model, None),
            ["96", "128", "self_attn.q_proj"],
        ),
        (lambda model: walk.quantize_model(TooFew(), model, None), ["1 rules", "2 layers", "2 rules expected"]),
    ],
)
def test_mistakes(act, words, toy_llama):
    with pytest.raises(PTQError) as error:
        act(toy_llama)
    assert all(word in str(error.value) for word in words)
    assert type(arch.layers(toy_llama)[0].mlp.up_proj) is torch.nn.Linear


class TooFew(Fails):
    def plan(self, model, data):
        return [self]


def test_a_note_overrides_nothing_that_is_counted(make_toy):
    @dataclass(frozen=True)
    class Boasting(Uniform):
        scheme: Scheme = Scheme()

        def quantize(self, layer):
            boast = LayerEdit(note={"bits": 2.0, "layer": 7, "weights": 1, "own": "kept"})
            return round_to_nearest(layer, self.scheme) | boast

    honest = walk.quantize_model(build("rtn"), make_toy("llama"), None)
    boasted = walk.quantize_model(Boasting(), make_toy("llama"), None)
    for a, b in zip(honest, boasted, strict=True):
        assert [b[key] for key in ("bits", "layer", "weights")] == [a[key] for key in ("bits", "layer", "weights")]
        assert b["own"] == "kept"
