"""train_diversedit.py's method and the long residuals against the values of the official code, and their own rules."""

import math

import numpy as np
import pytest
import torch
from conftest import EVAL, recipe_tensor

import models
import train_sra
from diffusion import make_diffusion
from models import Block, DiT, build_model, load_official, modulate, position_embedding
from train_diversedit import (
    DiverseDiT,
    adaptive_weight,
    alignment_blocks,
    block_pairs,
    diversity_terms,
    parse_args,
)

# The diversity loss

LOSS = EVAL["diversedit_loss"]


def golden_features(g, name):
    """The recipe of the manifest: twelve blocks (2, 16, 48) that share a common part and a bias to a set's degree."""
    settings, shape = g.meta["sets"][name], g.config["shape"]
    common, bias = g.draw("common", shape), g.draw("bias", (1, 1, shape[2]))
    features = []
    for k in range(g.config["depth"]):
        sign = -1 if k == 7 else 1
        shared = np.float32(sign * settings["rho"] * (1 - 0.05 * k))
        shift = np.float32(sign * settings["tau"] * (0.5 if k % 2 else 1))
        f = g.draw(f"feat_{k}", shape) + shared * common + shift * bias
        if settings["peaky"]:
            f[:, 1:, ::3] *= 0.05
        features.append(f.requires_grad_())
    return features


def pair_mask(depth, pairs):
    mask = torch.zeros(depth, depth)
    for i, j in pairs:
        mask[i - 1, j - 1] = 1
    return mask


def anchor_of(row):
    return 10 - row["encoder_depth"] if row["projection"] else 1


def test_diversity_loss_of_the_released_code(eval_golden):
    g = eval_golden("diversedit_loss")
    rows = []
    for k, row in enumerate(g.meta["rows"]):
        features = golden_features(g, row["features"])
        pairs = pair_mask(12, block_pairs(12, "anchor", anchor_of(row)))
        orth, mi, disp = diversity_terms(torch.stack(features), pairs)
        total = (orth + mi + disp) / 3
        weight = adaptive_weight(total, 0.1, 0.5)
        rows.append([v.item() for v in (orth, mi, disp, total, weight, weight * total)])
        name = f"{row['features']}_{k % 3}"
        for kind, value in (("total", total), ("weighted", weight * total)):
            gradients = torch.autograd.grad(value, features, retain_graph=True)
            g.check(
                f"grad_norms_{kind}_{name}", torch.stack([v.norm() for v in gradients]), rtol=1e-3
            )
            for block in (1, 4, 7):
                slices = f"grad_total_{name}_feat{block}_slice"
                if kind == "total" and slices in g.outputs:
                    g.check(slices, gradients[block][0, ::4, ::4], rtol=1e-3)
    g.check("terms__f64", torch.tensor(rows, dtype=torch.float64))
    values = g.outputs["weight_L"].clone().requires_grad_()
    weights = adaptive_weight(values, 0.1, 0.5)
    g.check("weight_w", weights.detach())
    g.check("weight_wL", (weights * values).detach())
    g.check("weight_dwL_dL", torch.autograd.grad((weights * values).sum(), values)[0])
    g.checked.add("weight_L")  # the input
    g.all_checked()


@pytest.mark.parametrize("name", LOSS["pairs_zero_based"])
def test_anchor_pairs_of_the_released_code(name):
    """Where the released rule is sound, its list; where it wraps round or finds nothing, the anchor is refused."""
    depth, d, projection = (part.split("=")[1] for part in name.split(","))
    depth, anchor, expected = (
        int(depth),
        10 - int(d) if projection == "True" else 1,
        LOSS["pairs_zero_based"][name],
    )
    if anchor < 0:
        anchor = 0  # parse_args has no negative numbers
    broken = {
        "L=12,d=10,projection=True",
        "L=12,d=11,projection=True",
        "L=4,d=2,projection=True",
        "L=2,d=8,projection=True",
    }
    if name in broken:
        assert not expected or isinstance(expected, str) or any(i > j for i, j in expected)
        with pytest.raises(ValueError, match="--anchor-block"):
            small(
                "--pairs",
                "anchor",
                "--anchor-block",
                str(anchor),
                depth=depth,
                long_residual="none",
            )
        return
    if (
        name == "L=4,d=8,projection=True"
    ):  # wraps round after two pairs; ours goes on to the last one
        expected = [*expected[:2], [2, 3]]
    assert [[i - 1, j - 1] for i, j in block_pairs(depth, "anchor", anchor)] == expected


def test_pairs_of_ten_layers():
    assert (
        len(block_pairs(10, "random", 1)) == 45 and len(block_pairs(28, "all", 5)) == 28 * 27 // 2
    )
    assert block_pairs(3, "all", 1) == [(1, 2), (1, 3), (2, 3)]


def literal_terms(features, pairs):
    """The same formulas, pair by pair and token by token, in float64."""
    features = features.double()

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item()

    orth = [cosine(features[i - 1].mean((0, 1)), features[j - 1].mean((0, 1))) for i, j in pairs]
    mi = []
    for i, j in pairs:
        a, b = features[i - 1].flatten(0, 1), features[j - 1].flatten(0, 1)
        mi.append(abs(np.mean([cosine(x, y) for x, y in zip(a, b)])))
    activity = []
    for d in range(features.shape[3]):
        columns = [f[:, :, d].flatten() for f in features]
        activity.append(np.mean([(c.abs() / c.norm()).mean().item() for c in columns]))
    activity = np.array(activity) / max(activity)
    return np.mean(orth), np.mean(mi), -min(1, activity.var() / 0.25)


def test_terms_equal_a_literal_version():
    torch.manual_seed(0)
    features = torch.randn(4, 2, 3, 8) + 0.7 * torch.randn(1, 2, 3, 8)
    features[:, :, 1:, ::2] *= 0.01
    pairs = block_pairs(4, "all", 1)
    terms = diversity_terms(features, pair_mask(4, pairs))
    np.testing.assert_allclose([v.item() for v in terms], literal_terms(features, pairs), rtol=1e-5)


def test_value_of_the_loss_is_bounded():
    """Between -2/3 and 2/3: opposite means give orth -1, mi's absolute value is never negative, disp is limited to -1."""
    torch.manual_seed(0)
    same = torch.randn(1, 2, 4, 8).expand(3, -1, -1, -1)
    mask = pair_mask(3, block_pairs(3, "all", 1))
    orth, mi, disp = diversity_terms(same, mask)
    assert abs(orth - 1) < 1e-6 and abs(mi - 1) < 1e-6 and -1 <= disp <= 0
    a = torch.randn(1, 2, 4, 8)
    opposite = torch.stack([a, -a]).squeeze(1)
    orth, mi, _ = diversity_terms(opposite, pair_mask(2, [(1, 2)]))
    assert abs(orth + 1) < 1e-6 and abs(mi - 1) < 1e-6
    peaky = torch.zeros(2, 2, 5000, 2)
    peaky[..., 0], peaky[:, 0, 0, 1] = 1.0, 1.0  # one channel constant, one a single spike
    assert diversity_terms(peaky, pair_mask(2, [(1, 2)]))[2] < -0.9


@pytest.mark.parametrize(
    "value, weight, factor",
    [(0.05, 0, 0), (0.1, 0, 0), (0.3, 0.4, 1.0), (0.4999, 0.7998, 1.7996), (0.6, 1, 1)],
)
def test_adaptive_weight(value, weight, factor):
    """(L - 0.1) / 0.5 in the middle; the live weight's gradient is 4 L - 0.2 there, exactly zero below; detached 2 L - 0.2."""
    L = torch.tensor(value, requires_grad=True)
    w = adaptive_weight(L, 0.1, 0.5)
    assert abs(w.item() - weight) < 1e-5
    gradient = torch.autograd.grad(w * L, L)[0].item()
    assert gradient == 0 if factor == 0 else abs(gradient - factor) < 1e-4
    detached = torch.autograd.grad(adaptive_weight(L, 0.1, 0.5).detach() * L, L)[0]
    assert abs(detached.item() - weight) < 1e-5


# Long residuals


def residual_model(g, wiring):
    c = g.config
    names = (
        "input_size",
        "patch_size",
        "in_channels",
        "hidden_size",
        "depth",
        "num_heads",
        "num_classes",
    )
    model = DiT(**{k: c[k] for k in names}, long_residual=wiring)
    missing, unexpected = model.load_state_dict(g.weights(), strict=False)
    assert missing == ["pos_embed"] and not unexpected
    return model.eval()


def check_forward(g, model, prefix=""):
    with torch.no_grad():
        out, features = model(g.inputs["x"], g.inputs["t"], g.inputs["y"], features=(1, 2, 3, 4))
        early = [
            model.tokens_after(g.inputs["x"], g.inputs["t"], g.inputs["y"], k) for k in (1, 2, 3, 4)
        ]
    g.check(f"{prefix}output", out)
    for k, f in features.items():
        assert torch.equal(f, early[k - 1])
        g.check(f"{prefix}feat{k - 1}_slice", f[:, ::5, ::6])
        g.check(f"{prefix}feat{k - 1}_norm", f.flatten(1).norm(dim=1))


def test_long_residuals_before_the_block(eval_golden, monkeypatch):
    """`pre` with ordinary blocks; and, with the research model's parallel blocks put in their place, its published output too."""
    g = eval_golden("diversedit_pre")
    check_forward(g, residual_model(g, "pre"), "sequential_")

    def parallel(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        a = gate_a.unsqueeze(1) * self.attn(modulate(x, shift_a, scale_a))
        return x + a + gate_m.unsqueeze(1) * self.mlp(modulate(x, shift_m, scale_m))

    monkeypatch.setattr(Block, "forward", parallel)
    check_forward(g, residual_model(g, "pre"), "parallel_")
    g.all_checked()


def test_long_residuals_after_the_block(eval_golden):
    g = eval_golden("diversedit_post")
    check_forward(g, residual_model(g, "post"))
    g.all_checked()


def test_released_checkpoints_load_as_post(eval_golden, tmp_path):
    g = eval_golden("diversedit_post")
    state = {**g.weights(), "pos_embed": position_embedding(48, 4)}
    torch.save({"ema": state, "model": state}, tmp_path / "official.pt")
    model, notes = load_official(tmp_path / "official.pt", "repa", 3)
    assert model.config["long_residual"] == "post" and any(
        "after the block" in note for note in notes
    )
    check_forward(g, model)


NETWORK = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 12,
    "num_heads": 2,
    "num_classes": 10,
}


@pytest.mark.parametrize("wiring", ["pre", "post"])
def test_which_blocks_meet(wiring, monkeypatch):
    """Blocks start as the identity; here block k adds k, so that the early half of what is fused tells where it was taken.

    pre: f_0 -> block 12, f_1 -> 11, ... f_5 -> 7, before the block; post: f_1 -> 12, ... f_6 -> 7, after it."""
    model, ran, fused = DiT(**NETWORK, long_residual=wiring), [], []
    for k, block in enumerate(model.blocks, 1):
        block.register_forward_hook(
            lambda module, inputs, output, k=k: (ran.append(k), output + k)[1]
        )

    def layer_norm(x, shape, *_, eps=None):  # the identity
        if shape == (64,):
            fused.append((len(ran), x[:, :, 32:]))
        return x

    monkeypatch.setattr(models.F, "layer_norm", layer_norm)
    embedded = model.embed(torch.randn(1, 3, 8, 8))
    for _ in model.streams(embedded, model.condition(torch.tensor([0.5]), torch.tensor([3]))):
        pass
    place = [
        done + (wiring == "pre") for done, _ in fused
    ]  # the block before, or after, which it happens
    taken = [
        round((early - embedded).mean().item()) for _, early in fused
    ]  # f_i - f_0 = 1 + ... + i
    assert place == [7, 8, 9, 10, 11, 12]
    assert taken == [
        i * (i + 1) // 2 for i in ([5, 4, 3, 2, 1, 0] if wiring == "pre" else [6, 5, 4, 3, 2, 1])
    ]


@pytest.mark.parametrize("wiring", ["pre", "post"])
def test_size_start_and_config(wiring):
    """(L/2)(2 D^2 + 5 D) more parameters; zero output at first; the wiring comes from the config; plain configs stay as they were."""
    torch.manual_seed(0)
    plain, model = DiT(**NETWORK), DiT(**NETWORK, long_residual=wiring)
    L, D = 12, 32
    count = [sum(p.numel() for p in m.parameters()) for m in (plain, model)]
    assert count[1] - count[0] == L // 2 * (2 * D**2 + 5 * D)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 10])
    assert (model(x, t, y) == 0).all()
    assert "long_residual" not in plain.config and model.config["long_residual"] == wiring
    again = build_model(model.config)
    assert again.long_residual == wiring and set(again.state_dict()) == set(model.state_dict())
    bound = math.sqrt(6 / (3 * D))  # Xavier of (2 D -> D), no identity
    weight = model.skip_linears[0]["linear"].weight
    assert (
        bound * 0.98 < weight.abs().max() <= bound
        and (model.skip_linears[0]["linear"].bias == 0).all()
    )


def test_published_parameter_counts():
    """Spec section 2: S 1.781 M, B 7.101 M, L 25.227 M, XL 37.240 M, from (L / 2)(2 D^2 + 5 D)."""
    for depth, D, millions in (
        (12, 384, 1.781),
        (12, 768, 7.101),
        (24, 1024, 25.227),
        (28, 1152, 37.240),
    ):
        with torch.device("meta"):
            model = DiT(**{**NETWORK, "depth": depth, "hidden_size": D}, long_residual="pre")
        extra = sum(p.numel() for n, p in model.named_parameters() if n.startswith("skip_"))
        assert abs(extra / 1e6 - millions) < 5e-4


def test_impossible_long_residuals_are_refused():
    with pytest.raises(ValueError, match="even number of blocks, not 3"):
        DiT(**{**NETWORK, "depth": 3}, long_residual="pre")
    with pytest.raises(ValueError, match="choose none, pre or post"):
        DiT(**NETWORK, long_residual="middle")


def test_long_residual_norm_is_fp32_under_autocast():
    """The stream stays in fp32, as in the plain network, and only the linear layer runs in bf16."""
    torch.manual_seed(0)
    model = DiT(**NETWORK, long_residual="pre")
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 10])
    with torch.autocast("cpu", torch.bfloat16):
        _, features = model(x, t, y, features=(6, 7, 12))
    assert all(f.dtype == torch.float32 for f in features.values())
    _, exact = model(x, t, y, features=(12,))
    assert (features[12] - exact[12]).norm() / exact[12].norm() < 0.02
    assert all(norm.eps == 1e-6 for norm in model.skip_norms)
    model, early, late = model.bfloat16(), *torch.randn(2, 1, 4, 32).bfloat16()
    both = torch.cat([late, early], -1).float()
    normed = (both - both.mean(-1, keepdim=True)) / (
        both.var(-1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    fused = model.long_residual_at(7, late, [early])
    assert torch.equal(fused, model.skip_linears[0]["linear"](normed.bfloat16()))


# The method


def small(*flags, random_weights=False, depth=12, long_residual=None):
    args = parse_args([*flags, *(["--long-residual", long_residual] if long_residual else [])])
    diffusion = make_diffusion(args.diffusion)
    torch.manual_seed(0)
    method = DiverseDiT(
        args, {**NETWORK, "depth": depth, "learn_sigma": diffusion.learned_variance}, diffusion
    )
    if random_weights:
        for network, salt in ((method.model, "student"), (method.ema, "teacher")):
            for name, parameter in network.named_parameters():
                parameter.data.copy_(recipe_tensor(salt, name, tuple(parameter.shape)))
    return method


def draws(n=4):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, n, 3, 8, 8, generator=generator)
    u = torch.rand(n, generator=generator)
    drop = torch.tensor([0.5, 0.01, 0.5, 0.5])
    return (
        x0,
        torch.tensor([0, 3, 9, 1]),
        {"t": torch.tensor([0.1, 0.4, 0.7, 0.9]), "noise": noise, "drop": drop, "u": u},
    )


def test_at_the_start_identical_blocks_are_alike():
    """Identity blocks: without long residuals orth = MI = 1 and the weight is 1; with them the second half starts apart."""
    x0, y, fixed = draws()
    terms = small("--long-residual", "none")(x0, y, **fixed)
    assert abs(terms["orth"] - 1) < 1e-5 and abs(terms["mi"] - 1) < 1e-5 and terms["weight"] == 1
    assert -1 <= terms["disp"] <= 0
    apart = small("--pairs", "all")(x0, y, **fixed)
    assert apart["mi"] < 0.5 and apart["weight"] < 0.5


@pytest.mark.parametrize("wiring", ["pre", "post", "none"])
def test_total_is_denoising_and_weighted_diversity(wiring):
    x0, y, fixed = draws()
    method = small("--long-residual", wiring, random_weights=True)
    terms = method(x0, y, **fixed)
    mean = (terms["orth"] + terms["mi"] + terms["disp"]) / 3
    assert torch.isclose(terms["diversity"], mean)
    assert torch.isclose(terms["weight"], adaptive_weight(mean, 0.1, 0.5))
    assert torch.isclose(terms["loss"], terms["denoise"] + terms["weight"] * mean)
    constant = small("--long-residual", wiring, "--diversity-weight", "0.25", random_weights=True)(
        x0, y, **fixed
    )
    assert (
        torch.isclose(constant["loss"], constant["denoise"] + 0.25 * mean)
        and constant["weight"] == 0.25
    )


def test_detached_weight_changes_gradients_only():
    x0, y, fixed = draws()
    live, detached = (
        small("--long-residual", "none", "--weight-range", "0", "2", *f)
        for f in ((), ("--detach-weight",))
    )
    results = []
    for method in (live, detached):
        terms = method(x0, y, **fixed)
        gradient = torch.autograd.grad(
            terms["loss"] - terms["denoise"], method.model.x_embedder.proj.bias
        )
        results.append((terms, gradient[0]))
    assert torch.equal(results[0][0]["loss"], results[1][0]["loss"])
    # w = L / 2: live 2 L / 2 = L, detached L / 2
    torch.testing.assert_close(results[0][1], 2 * results[1][1], rtol=1e-4, atol=1e-8)


def test_term_weights():
    x0, y, fixed = draws()
    terms = small("--term-weights", "0.5", "0.2", "0", random_weights=True)(x0, y, **fixed)
    assert torch.isclose(terms["diversity"], 0.5 * terms["orth"] + 0.2 * terms["mi"])


def test_random_layers():
    """Ten distinct blocks of the twelve, ascending, new in every step, the same for every rank and micro-batch of a step, by the seed."""
    method, other, seen = small(), small("--seed", "1"), []
    for step in range(200):
        method.step = other.step = step
        chosen = method.choose_layers()
        torch.rand(1)  # other draws, as on another rank, do not matter
        assert chosen == method.choose_layers() == sorted(set(chosen)) and len(chosen) == 10
        assert set(chosen) <= set(range(1, 13))
        seen.append((tuple(chosen), tuple(other.choose_layers())))
    counts = np.bincount([k for chosen, _ in seen for k in chosen], minlength=13)[1:]
    assert len({a for a, _ in seen}) > 40 and any(a != b for a, b in seen)
    assert counts.min() > 140 and counts.max() < 190  # 200 * 10 / 12 = 167 each
    assert list(small(depth=6).choose_layers()) == [1, 2, 3, 4, 5, 6]
    assert len(small("--pair-layers", "3").choose_layers()) == 3


def test_only_the_chosen_layers_are_kept():
    method = small("--pair-layers", "3", random_weights=True)
    asked = []
    forward = method.model.forward
    method.model.forward = lambda *inputs, features=(): (
        asked.append(features),
        forward(*inputs, features=features),
    )[1]
    x0, y, fixed = draws()
    terms = method(x0, y, layers=(2, 5, 11), **fixed)
    assert asked == [(2, 5, 11)]
    i = method.diffusion.net_inputs(
        method.diffusion.add_noise(x0, fixed["noise"], fixed["t"]), fixed["t"]
    )
    _, features = forward(*i, torch.tensor([0, 10, 9, 1]), features=(2, 5, 11))
    expected = literal_terms(
        torch.stack([features[k] for k in (2, 5, 11)]).detach(), block_pairs(3, "all", 1)
    )
    np.testing.assert_allclose(
        [terms[k].item() for k in ("orth", "mi", "disp")], expected, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["flow", "gvp", "edm", "ddpm"])
def test_own_terms_off_is_the_plain_model(kind):
    """The same loss as the network trained directly; no feature is kept and no teacher runs."""
    method = small(
        "--diffusion",
        kind,
        "--long-residual",
        "none",
        "--diversity-weight",
        "0",
        random_weights=True,
    )
    assert not hasattr(method, "head") and not hasattr(method, "pairs")
    method.ema.tokens_after = None
    x0, y, fixed = draws()
    diffusion, t = method.diffusion, make_diffusion(kind).draw_t(4, "cpu")
    fixed["t"] = t
    terms = method(x0, y, **fixed)
    flags = train_sra.parse_args(["--diffusion", kind, "--align-weight", "0"])
    sra = train_sra.SRA(flags, {**NETWORK, "learn_sigma": diffusion.learned_variance}, diffusion)
    sra.model.load_state_dict(method.model.state_dict())
    plain = sra(x0, y, t, fixed["noise"], fixed["drop"])
    assert torch.equal(terms["loss"], plain["loss"]) and set(terms) == {"loss", "denoise"}
    terms["loss"].backward()
    plain["loss"].backward()
    for (name, a), b in zip(method.model.named_parameters(), sra.model.parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_sra_head_starts_as_in_its_script():
    ours, theirs = small("--align-weight", "0.2").head, train_sra.projection_head(32)
    assert [m.weight.shape for m in (ours[0], ours[2])] == [
        m.weight.shape for m in (theirs[0], theirs[2])
    ]
    for layer in (ours[0], ours[2]):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert (layer.bias == 0).all() and 0.95 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("weight, gap", [("0.2", "0.2"), ("0.5", "0.35")])
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_alignment_on_top_is_sra(kind, weight, gap):
    """`--align-weight` adds what train_sra.py computes on the same network, head, draws and EMA."""
    flags = ["--diffusion", kind, "--align-weight", weight, "--time-gap", gap]
    method = small(*flags, "--long-residual", "none", random_weights=True)
    sra = train_sra.SRA(
        train_sra.parse_args(flags),
        {**NETWORK, "learn_sigma": method.diffusion.learned_variance},
        method.diffusion,
    )
    sra.load_state_dict(method.state_dict())
    x0, y, fixed = draws()
    times = (
        ([0.02, 0.3, 0.7, 0.99], [0.02, 0.1, 0.2, 0.3])
        if kind == "flow"
        else ([0, 5, 700, 999], [1, 30, 60, 150])
    )
    for t in times:  # near the data the teacher's time is clamped
        fixed |= {"t": torch.tensor(t), "u": torch.tensor([0.99, 0.2, 0.7, 0.999])}
        ours, theirs = method(x0, y, **fixed), sra(x0, y, **fixed)
        assert torch.equal(ours["align"], theirs["align"]) and torch.equal(
            ours["denoise"], theirs["denoise"]
        )
        assert torch.isclose(ours["loss"], theirs["loss"] + ours["weight"] * ours["diversity"])
    assert (method.student_block, method.teacher_block) == (sra.student_block, sra.teacher_block)
    for depth in (2, 6, 12, 24, 28, 32):
        assert all(
            alignment_blocks(depth, ddpm) == train_sra.alignment_blocks(depth, ddpm)
            for ddpm in (False, True)
        )


MODES = {
    "default": [],
    "post": ["--long-residual", "post"],
    "no residuals": ["--long-residual", "none"],
    "no loss": ["--diversity-weight", "0"],
    "anchor": ["--pairs", "anchor", "--anchor-block", "2"],
    "with SRA": ["--align-weight", "0.2"],
    "SRA on plain": ["--align-weight", "0.2", "--diversity-weight", "0", "--long-residual", "none"],
    "ddpm": ["--diffusion", "ddpm"],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_trainable_parameter_has_a_gradient_and_the_ema_none(mode):
    method = small(*MODES[mode], random_weights=True)
    x0, y, _ = draws()
    method(x0, y)["loss"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("ema."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_both_blocks_of_a_pair_get_a_gradient():
    """No stop-gradient on either side, and none through denoising here: block 2 and block 5 both move towards a lower L_div."""
    features = [torch.randn(2, 4, 8, requires_grad=True) for _ in range(2)]
    sum(diversity_terms(torch.stack(features), pair_mask(2, [(1, 2)]))).backward()
    assert all(f.grad.abs().sum() > 0 for f in features)


def test_no_gradient_below_the_range():
    """L_div under its lower bound: the loss is the denoising loss, with bitwise its gradients."""
    x0, y, fixed = draws()
    method = small("--weight-range", "0.9", "0.95", random_weights=True)
    terms = method(x0, y, **fixed)
    assert terms["weight"] == 0 and torch.equal(terms["loss"], terms["denoise"])
    parameters = list(method.model.parameters())
    a = torch.autograd.grad(terms["loss"], parameters, retain_graph=True)
    b = torch.autograd.grad(terms["denoise"], parameters)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_the_loss_leaves_no_trace_in_what_is_sampled():
    """The network's config and weights at the start are the same with the loss, without it, and with SRA."""
    methods = [
        small(*flags) for flags in ([], ["--diversity-weight", "0"], ["--align-weight", "0.2"])
    ]
    states = [method.ema.state_dict() for method in methods]
    assert methods[0].model.config == methods[1].model.config == methods[2].model.config
    for state in states[1:]:
        assert set(state) == set(states[0]) and all(
            torch.equal(v, states[0][k]) for k, v in state.items()
        )


def test_terms_run_in_fp32_under_autocast():
    torch.manual_seed(0)
    features = torch.randn(4, 2, 16, 32) + torch.randn(1, 2, 16, 32)
    pairs = pair_mask(4, block_pairs(4, "all", 1))
    exact = diversity_terms(features, pairs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(diversity_terms(features, pairs), exact))
    assert all(v.dtype == torch.float32 for v in diversity_terms(features.bfloat16(), pairs))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pair-layers", "1"], "--pair-layers 2 or more"),
        (["--pairs", "anchor", "--anchor-block", "12"], "1 <= --anchor-block < 12"),
        (["--weight-range", "0.5", "0.1"], "--weight-range 0.5 0.1"),
        (["--term-weights", "1", "nan", "1"], "--term-weights 1.0 nan 1.0"),
        (["--align-weight", "0.2", "--diffusion", "edm"], "flow, gvp and ddpm"),
        (["--align-weight", "0.2", "--student-block", "9"], "1 <= student <= teacher <= 12"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        small(*flags)


def test_defaults_are_the_papers():
    args = parse_args([])
    assert (
        args.diffusion == "flow"
        and not args.flip
        and not args.ema_warmup
        and args.pairs == "random"
        and args.long_residual == "pre"
    )
    assert (args.pair_layers, args.align_weight, args.diversity_weight, args.detach_weight) == (
        10,
        0,
        None,
        False,
    )
