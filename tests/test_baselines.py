"""Each method against its definition: references written anew, inequalities that must hold, options that must matter.

Imports of `baselines` by name are for the numerics that the registry does not show.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from baselines.gptq import inverse_factor, solve
from suite import arch, calib, walk
from suite.errors import PTQError
from suite.grid import Grid, QuantSpec, Scheme, fake_quantize, find_grid
from suite.method import build
from suite.metrics import distances
from suite.rounding import gram_blocks, output_error, round_to_nearest, search_shrink


def calib_of(n=8, t=40, seed=0):
    return calib.from_tokens(torch.randint(512, (n, t), generator=torch.Generator().manual_seed(seed)))


def view_of(model, data=None):
    return next(walk.walk(model, data or calib_of(), reference=True))


def site_of(view, name):
    return next(site for site in view.sites if site.name == name)


def problem(o=24, i=64, tokens=400, seed=0):
    """A weight (o, i) and correlated inputs X (tokens, i), some channels large; float32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(i, i, generator=generator) / i**0.5 + torch.eye(i)
    x = (torch.randn(tokens, i, generator=generator) * torch.logspace(-0.5, 0.5, i)) @ mix
    return torch.randn(o, i, generator=generator), x


def gram_of(x):
    return x.T @ x / len(x)


def rtn_of(weight, spec):
    return fake_quantize(weight, find_grid(weight, spec))


def outliers(make_toy, kind="llama", factor=50, dtype=torch.float32):
    """Input channels scaled by the gain of the norms that feed them, in both halves of each layer."""
    model = make_toy(kind, dtype)
    with torch.no_grad():
        for layer in arch.layers(model):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[3, 40, 77]] *= factor
    return model


def error_of(view, edit) -> float:
    return distances(view.reference)(view.after(edit).outputs())["mse"]


# ============================================================================================== fp16


def test_fp16_changes_nothing(make_toy):
    model, original = make_toy("qwen"), make_toy("qwen")
    records = walk.quantize_model(build("fp16"), model, None)
    tokens = calib_of().tokens
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert [r["bits"] for r in records] == [16, 16]


# ============================================================================================== rtn


@pytest.mark.parametrize("options", [{}, dict(wbits=3, group_size=32, symmetric=False), dict(group_size=0)])
def test_rtn_takes_the_nearest_values(options, make_toy):
    model, original = make_toy("llama"), make_toy("llama")
    walk.quantize_model(made := build("rtn", **options), model, None)
    spec = made.scheme.weight
    for layer, before in zip(arch.layers(model), arch.layers(original), strict=True):
        for name in (n for site in arch.sites(model) for n in site.linears):
            weight, linear = before.get_submodule(name).weight.detach(), layer.get_submodule(name)
            assert torch.equal(linear.weight, rtn_of(weight, spec))
            step = linear.scale.repeat_interleave(spec.group_size or weight.shape[1], 1)
            assert ((linear.weight - weight).abs() <= 0.5 * step + weight.abs().max() * 2**-7).all()


# ============================================================================================== gptq


def textbook(weight, gram, spec, damp=0.01, order=None, grid=None):
    """OBQ in a fixed order, the inverse Hessian of the remaining columns computed anew for each; float64.

    Returns the rounded weight and, per row, how near any decision came to going the other way, in steps.
    """
    w, h = weight.double().clone(), gram.double() + damp * gram.double().diagonal().mean() * torch.eye(len(gram))
    size, out, near = spec.group_size or len(gram), torch.zeros_like(w), torch.full((len(w),), 0.5, dtype=torch.double)
    order = list(range(len(gram))) if order is None else order
    for k, j in enumerate(order):
        rest = order[k:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        if grid is None and j % size == 0:
            current = find_grid(w[:, j : j + size].float(), QuantSpec(spec.bits, spec.symmetric, None))
            for wiggle in (1 - 1e-5, 1 + 1e-5):  # a scale at the edge of its own rounding decides as well
                other = find_grid(w[:, j : j + size].float() * wiggle, current.spec)
                near[(other.scale != current.scale)[:, 0]] = 0
                if current.zero is not None:
                    near[(other.zero != current.zero)[:, 0]] = 0
        local = current.columns(0, 1, 1) if grid is None else grid.columns(j, j + 1, len(gram))
        exact = w[:, j] / local.scale[:, 0].double() + (0 if local.zero is None else local.zero[:, 0].double())
        near = torch.minimum(near, 0.5 - (exact - exact.round()).abs())
        out[:, j] = fake_quantize(w[:, j : j + 1].float(), local)[:, 0].double()
        w[:, rest] -= torch.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out.float(), near


CASES = list(itertools.product([(4, True), (3, False), (2, True)], [None, 16, 32]))


@pytest.mark.parametrize("kind, group", CASES)
@pytest.mark.parametrize("block", [1, 8, 16, 24, 64, 128])
def test_gptq_equals_the_unblocked_reference(kind, group, block):
    """Row by row, but for those where the reference itself was within 1e-3 of a step of deciding otherwise: a hundred
    times what float32 may add up to."""
    weight, x = problem()
    spec = QuantSpec(*kind, group)
    found, grid, damp = solve(weight, gram_of(x), spec, block_size=block)
    expected, near = textbook(weight, gram_of(x), spec)
    sure = near > 1e-3
    assert sure.float().mean() > 0.5 and damp == 0.01
    assert torch.allclose(found[sure], expected[sure], atol=1e-6)
    assert torch.equal(fake_quantize(found, grid), found)


@pytest.mark.parametrize("kind, group", CASES)
def test_gptq_with_activation_order_equals_the_reference(kind, group):
    """Columns by falling diagonal, on the grids of the unchanged weight."""
    weight, x = problem(seed=1)
    gram, spec = gram_of(x), QuantSpec(*kind, group)
    found, grid, _ = solve(weight, gram, spec, act_order=True)
    static = find_grid(weight, spec)
    order = gram.diagonal().argsort(descending=True).tolist()
    assert order != sorted(order) and torch.equal(grid.scale, static.scale)
    expected, near = textbook(weight, gram, spec, order=order, grid=static)
    sure = near > 1e-3
    assert sure.float().mean() > 0.5 and torch.allclose(found[sure], expected[sure], atol=1e-6)


@pytest.mark.parametrize(
    "size, group, block", [(192, 48, 128), (192, 64, 48), (192, 96, 64), (128, 32, 128), (128, 128, 32)]
)
def test_groups_and_blocks_need_not_fit(size, group, block):
    """A group that is no multiple or part of a block is still taken from columns that are up to date."""
    weight, x = problem(16, size, 800)
    spec = QuantSpec(4, True, group)
    found = solve(weight, gram_of(x), spec, block_size=block)[0]
    expected, near = textbook(weight, gram_of(x), spec)
    assert torch.allclose(found[near > 1e-3], expected[near > 1e-3], atol=1e-6) and (near > 1e-3).sum() >= 4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_loses_less_than_rounding_on_the_same_grid(seed, act_order):
    weight, x = problem(seed=seed)
    gram, spec = gram_of(x), QuantSpec(4, True, 16 if act_order else None)
    found, grid, _ = solve(weight, gram, spec, act_order=act_order)
    nearest = rtn_of(weight, spec)
    assert torch.equal(grid.scale, find_grid(weight, spec).scale)  # the same grid
    assert output_error(found - weight, gram) < 0.8 * output_error(nearest - weight, gram)


@pytest.mark.parametrize("name", ["gptq", "awq+gptq", "smoothquant+gptq"])
def test_its_proxy_loss_in_the_record_is_below_that_of_rounding(name, make_toy):
    view = view_of(make_toy("qwen"))
    edit = build(name).quantize(view)
    transformed = view if name == "gptq" else view.after(build(name).transformer.transform(view))
    nearest = round_to_nearest(transformed, Scheme())
    for site in view.sites:
        gram = transformed.stat("gram", site)
        for linear in site.linears:
            change = nearest.params[f"{linear}.weight"] - transformed.weight(linear)
            assert edit.note["losses"][linear] < output_error(change, gram)
            own = edit.params[f"{linear}.weight"] - transformed.weight(linear)
            assert edit.note["losses"][linear] == pytest.approx(output_error(own, gram), rel=1e-5)


def test_uncorrelated_inputs_leave_only_rounding():
    """With a diagonal Gram matrix there is nothing to make up for."""
    weight = problem()[0]
    spec = QuantSpec(4, True, 32)
    found = solve(weight, torch.diag(torch.linspace(1, 5, 64)), spec)[0]
    assert torch.equal(found, rtn_of(weight, spec))


def test_linears_of_a_site_are_solved_row_by_row(make_toy):
    view = view_of(make_toy("llama"))
    edit, site = build("gptq").quantize(view), view.sites[0]
    for linear in site.linears:
        alone = solve(view.weight(linear).float(), view.stat("gram", site), QuantSpec())
        assert torch.allclose(edit.params[f"{linear}.weight"], alone[0], atol=1e-6)
        assert torch.equal(edit.linears[linear].grid.scale, alone[1].scale)


def test_true_sequential_sees_the_quantized_sites_before(make_toy):
    view = view_of(make_toy("llama"))
    edit = build("gptq", true_sequential=True).quantize(view)
    done = {}
    for site in view.sites:
        before = view.after(type(edit)({f"{n}.weight": edit.params[f"{n}.weight"] for n in done}, dict(done)))
        weights = torch.cat([view.weight(n).float() for n in site.linears])
        expected = solve(weights, before.stat("gram", site), QuantSpec())[0]
        assert torch.allclose(torch.cat([edit.params[f"{n}.weight"] for n in site.linears]), expected, atol=1e-5)
        done |= {n: edit.linears[n] for n in site.linears}
    plain = build("gptq").quantize(view)
    assert torch.equal(plain.params["self_attn.q_proj.weight"], edit.params["self_attn.q_proj.weight"])
    assert not torch.equal(plain.params["mlp.down_proj.weight"], edit.params["mlp.down_proj.weight"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_get_weight_zero(symmetric, act_order):
    weight, x = problem()
    x[:, [5, 40]] = 0
    found, _, damp = solve(weight, gram_of(x), QuantSpec(4, symmetric, 32), act_order=act_order)
    assert (found[:, [5, 40]] == 0).all() and found.isfinite().all() and damp == 0.01
    assert (found[:, [4, 41]] != 0).any()


def test_a_gram_of_low_rank_raises_the_damping_and_says_so(make_toy):
    view = view_of(make_toy("llama"), calib_of(1, 16))
    edit = build("gptq", damp=1e-9).quantize(view)
    raised = edit.note["raised damping"]
    assert set(raised) == {"qkv", "o", "gate_up", "down"} and all(1e-9 < value <= 1 for value in raised.values())
    assert "raised damping" not in build("gptq").quantize(view_of(make_toy("llama"))).note


def test_damping_is_raised_tenfold_as_far_as_needed():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    gram = gram_of(x)
    factor, used = inverse_factor(gram, 1e-12)
    assert used in [pytest.approx(1e-12 * 10**k) for k in range(1, 13)]
    assert torch.equal(factor, factor.triu()) and factor.isfinite().all() and (factor.diagonal() > 0).all()
    factor, used = inverse_factor(gram, 0.05)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(64)
    assert used == 0.05 and torch.allclose(factor.T @ factor @ damped, torch.eye(64), atol=1e-4)


def test_a_gram_that_no_damping_saves():
    gram = torch.eye(8)
    gram[0, 0] = -10
    with pytest.raises(PTQError, match="not positive definite even with damping 1: use more calibration data"):
        solve(torch.randn(4, 8), gram, QuantSpec(4, True, None))


def test_a_gram_that_is_not_finite_names_layer_and_site(make_toy):
    model = make_toy("llama")
    with torch.no_grad():
        arch.layers(model)[1].post_attention_layernorm.weight[0] = torch.inf
    views = walk.walk(model, calib_of())
    next(views)
    with pytest.raises(PTQError, match="layer 1, site gate_up: the Gram matrix of the inputs is not finite"):
        build("gptq").quantize(next(views))


@pytest.mark.parametrize(
    "option, changes",
    [
        (dict(damp=0.2), True),
        (dict(act_order=True), True),
        (dict(true_sequential=True), True),
        (dict(clip=True), True),
        (dict(clip=True, act_order=True), True),
        (dict(symmetric=False), True),
        (dict(block_size=32), False),
    ],
)
def test_options_of_gptq(option, changes, make_toy):
    """Every option changes the result, but for the block size, which only changes the order of sums."""
    view = view_of(make_toy("llama"))
    plain, other = (build("gptq", **o).quantize(view).params["mlp.down_proj.weight"] for o in ({}, option))
    differing = float((plain != other).float().mean())
    assert (differing > 0.01) == changes


def test_clipping_lowers_the_loss_at_few_bits():
    weight, x = problem(64, 64)
    weight[:, ::9] *= 4
    gram, spec = gram_of(x), QuantSpec(2, True, 32)
    losses = [output_error(solve(weight, gram, spec, clip=c, act_order=True)[0] - weight, gram) for c in (False, True)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_are_left_alone(act_order):
    weight, x = problem()
    gram = gram_of(x)
    gram[3, :] = gram[:, 3] = 0
    copies = weight.clone(), gram.clone()
    solve(weight, gram, QuantSpec(4, True, 32), act_order=act_order, clip=True)
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])


# ============================================================================================== ranges


@pytest.mark.parametrize("symmetric", [True, False])
def test_shrink_equals_brute_force_over_the_inputs(symmetric):
    """Errors summed over tokens, one group's part of one row's output at a time, without any Gram matrix."""
    weight, x = problem(6, 64, 100, seed=2)
    weight[:, ::11] *= 3
    spec, shares = QuantSpec(3, symmetric, 16), [1 - 0.05 * k for k in range(10)]
    found = search_shrink(weight, spec, gram_blocks(gram_of(x), spec))
    for row, group in itertools.product(range(6), range(4)):
        columns = slice(16 * group, 16 * group + 16)
        w, inputs = weight[row : row + 1, columns], x[:, columns]
        local = QuantSpec(3, symmetric, None)
        errors = [float((inputs @ (fake_quantize(w, find_grid(w, local, s)) - w).T).square().sum()) for s in shares]
        chosen = errors[round((1 - float(found[row, group])) / 0.05)]
        assert chosen == pytest.approx(min(errors), rel=1e-4)
    assert found.min() < 1 and found.max() <= 1 and found.min() > 0.5


def test_shrink_options_bound_it():
    weight, x = problem(32, 64, 100)
    spec = QuantSpec(2, True, 16)
    blocks = gram_blocks(gram_of(x), spec)
    assert search_shrink(weight, spec, blocks, lowest=0.8).min() >= 0.8
    assert search_shrink(weight, spec, blocks, lowest=0.5).min() < 0.8
    steps = (1 - search_shrink(weight, spec, blocks, step=0.1)) * 10
    assert torch.allclose(steps, steps.round(), atol=1e-5)


def test_blocks_of_the_gram():
    gram = torch.arange(64.0).reshape(8, 8)
    blocks = gram_blocks(gram, QuantSpec(4, True, 4))
    assert torch.equal(blocks[0], gram[:4, :4]) and torch.equal(blocks[1], gram[4:, 4:]) and len(blocks) == 2
    assert torch.equal(gram_blocks(gram, QuantSpec(4, True, None))[0], gram)


def test_output_error_is_the_mean_squared_output_change():
    weight, x = problem()
    change = rtn_of(weight, QuantSpec(4, True, 32)) - weight
    assert output_error(change, gram_of(x)) == pytest.approx(float((x @ change.T).square().sum(1).mean()), rel=1e-4)


# ============================================================================================== awq


def awq_losses(view, site):
    """The loss of each ratio at the output of the site's scope, with Q(W s) / s in place of W."""
    magnitude, target = view.stat("absmean", site), view.scope_outputs(site, {})
    losses = []
    for k in range(20):
        s = magnitude.pow(k / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        params = {f"{n}.weight": rtn_of(view.weight(n) * s, QuantSpec()) / s for n in site.linears}
        losses.append(float((view.scope_outputs(site, params) - target).square().mean()))
    return losses


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("name", ["qkv", "gate_up"])
def test_awq_takes_the_ratio_of_least_loss(kind, name, make_toy):
    view = view_of(outliers(make_toy, kind, 10))
    note = build("awq").quantize(view).note
    losses = awq_losses(view, site_of(view, name))
    chosen = losses[round(note["ratios"][name] * 20)]
    assert chosen == pytest.approx(min(losses), rel=1e-4)
    assert chosen <= losses[0]  # ratio 0, no scale, is one of those tried
    assert note["ratios"][name] > 0


def test_awq_at_a_linear_of_its_own_measures_the_output_of_that_linear(make_toy):
    """o and down: the loss by the Gram matrix is that over all tokens."""
    view = view_of(make_toy("llama"))
    note, site = build("awq").quantize(view).note, site_of(view, "down")
    inputs = []
    layer = view._layer.get_submodule("mlp.down_proj")
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 256)))
    view.fed_by(view.inputs).outputs()
    handle.remove()
    x, weight, magnitude = torch.cat(inputs), view.weight("mlp.down_proj"), view.stat("absmean", site)
    losses = []
    for k in range(20):
        s = magnitude.pow(k / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        losses.append(float((x @ (rtn_of(weight * s, QuantSpec()) / s - weight).T).square().sum(1).mean()))
    assert losses[round(note["ratios"]["down"] * 20)] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize(
    "kind, folded",
    [
        ("llama", {"qkv", "gate_up", "down"}),
        ("llama-mha", {"qkv", "o", "gate_up", "down"}),
        ("qwen", {"qkv", "o", "gate_up", "down"}),
        ("qwen-gqa", {"qkv", "gate_up", "down"}),
    ],
)
@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_transforms_preserve_the_layer(kind, folded, name, make_toy):
    """Float64, with outliers so that the scales are far from 1; biases; v -> o where there are no grouped queries."""
    view = view_of(outliers(make_toy, kind, dtype=torch.float64))
    edit = build(name).transform(view)
    before, after = view.outputs(), view.after(edit).outputs()
    assert (after - before).norm() / before.norm() < 1e-6
    assert not edit.linears and edit.params
    if name == "awq":
        assert set(edit.note["ratios"]) == folded
    else:
        assert "self_attn.o_proj.weight" not in edit.params and "mlp.down_proj.weight" not in edit.params
    changed = {key for key, value in edit.params.items() if not torch.equal(value, view._parameter(key))}
    assert "input_layernorm.weight" in changed


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("name", ["awq", "smoothquant", "awq+gptq", "smoothquant+gptq"])
def test_planted_outliers_are_handled_better_than_by_rounding(kind, name, make_toy):
    view = view_of(outliers(make_toy, kind))
    errors = {n: error_of(view, build(n).quantize(view)) for n in ("rtn", name)}
    assert errors[name] < errors["rtn"]


def test_ranges_are_searched_on_the_inputs_after_the_folds(make_toy):
    """AWQ rescales the Gram matrices that it has in place of another pass; here they are measured."""
    view, made = view_of(outliers(make_toy)), build("awq", wbits=3)
    folds, scales = made._fold_all(view)
    folded, spec = view.after(folds), made.scheme.weight
    found = made._ranges(view, folded, scales)
    for site in view.sites:
        blocks = gram_blocks(folded.stat("gram", site), spec)
        for name in set(site.linears) & set(found):
            assert (found[name] == search_shrink(folded.weight(name), spec, blocks)).float().mean() > 0.97
    unscaled = gram_blocks(view.stat("gram", site_of(view, "qkv")), spec)
    other = search_shrink(folded.weight("self_attn.v_proj"), spec, unscaled)
    assert (found["self_attn.v_proj"] == other).float().mean() < 0.9  # it matters


def test_ratio_0_is_the_first_and_is_rounding(make_toy):
    view = view_of(outliers(make_toy))
    edit, nearest = build("awq", ratios=1, clip=False).quantize(view), build("rtn").quantize(view)
    assert set(edit.note["ratios"].values()) == {0.0}
    assert all(torch.equal(edit.params[key], nearest.params[key]) for key in nearest.params)


def test_awq_clips_all_but_queries_and_keys(make_toy):
    view = view_of(make_toy("llama"))
    plain, clipped = (build("awq", clip=c, wbits=3).quantize(view) for c in (False, True))
    for name in (n for site in view.sites for n in site.linears):
        scales = [e.linears[name].grid.scale for e in (plain, clipped)]
        assert (scales[1] <= scales[0] * 1.01).all()
        assert torch.equal(*scales) == name.endswith(("q_proj", "k_proj"))


@pytest.mark.parametrize(
    "option", [dict(ratios=2), dict(clip=False), dict(clip_lowest=0.9), dict(symmetric=False), dict(group_size=64)]
)
def test_options_of_awq(option, make_toy):
    view = view_of(outliers(make_toy, factor=5))
    plain, other = (build("awq", **{"wbits": 3, **o}).quantize(view).params["mlp.up_proj.weight"] for o in ({}, option))
    assert float((plain != other).float().mean()) > 0.01


def test_awq_without_a_finite_loss_names_layer_and_site(make_toy):
    model = make_toy("llama")
    with torch.no_grad():
        arch.layers(model)[0].input_layernorm.weight[0] = torch.inf
    with pytest.raises(PTQError, match="layer 0, site qkv: no scale gives a finite error"):
        build("awq").quantize(view_of(model))


# ============================================================================================== smoothquant


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smoothquant_divides_by_its_formula(alpha, make_toy):
    """s = max|x|^alpha / max|W|^(1 - alpha), the maximum over W taken over all linears of the site."""
    view = view_of(outliers(make_toy))
    edit = build("smoothquant", alpha=alpha).transform(view)
    for name, norm in (("qkv", "input_layernorm"), ("gate_up", "post_attention_layernorm")):
        site = site_of(view, name)
        weights = torch.cat([view.weight(n) for n in site.linears]).abs().amax(0)
        s = view.stat("absmax", site).pow(alpha) / weights.pow(1 - alpha)
        assert torch.allclose(edit.params[f"{norm}.weight"], view.weight(norm) / s, rtol=1e-4)
        for n in site.linears:
            assert torch.allclose(edit.params[f"{n}.weight"], view.weight(n) * s, rtol=1e-4)


def test_at_one_half_both_sides_have_the_same_range(make_toy):
    view = view_of(outliers(make_toy))
    smoothed = view.after(build("smoothquant").transform(view))
    site = site_of(view, "gate_up")
    weights = torch.cat([smoothed.weight(n) for n in site.linears]).abs().amax(0)
    assert torch.allclose(smoothed.stat("absmax", site), weights, rtol=1e-3)


def test_smoothquant_helps_activations_of_few_bits(make_toy):
    """Weights left alone: only the activations' outliers are in question."""
    view = view_of(outliers(make_toy))
    errors = [error_of(view, build(name, wbits=16).quantize(view)) for name in ("rtn", "smoothquant")]
    assert errors[1] < errors[0]


def test_dead_channels_stay_finite(make_toy):
    model = make_toy("llama")
    with torch.no_grad():
        arch.layers(model)[0].input_layernorm.weight[7] = 0
        arch.layers(model)[0].mlp.gate_proj.weight[:, 9] = 0
        arch.layers(model)[0].mlp.up_proj.weight[:, 9] = 0
    view = view_of(model)
    for name in ("awq", "smoothquant"):
        edit = build(name).quantize(view)
        assert all(value.isfinite().all() for value in edit.params.values())
        assert error_of(view, edit) < 0.5


def test_the_declared_grid_is_that_of_the_folded_weight(make_toy):
    view = view_of(outliers(make_toy, "qwen"))
    for name in ("awq", "smoothquant"):
        made = build(name)
        edit, folded = made.quantize(view), view.after(made.transform(view))
        for linear, quant in edit.linears.items():
            weight = edit.params[f"{linear}.weight"]
            assert isinstance(quant.grid, Grid) and torch.equal(fake_quantize(weight, quant.grid), weight)
            if name == "smoothquant":
                assert torch.equal(fake_quantize(folded.weight(linear), quant.grid), weight)
