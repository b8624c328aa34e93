"""train_sra.py's method against the values of the official code, and its own rules."""

import pytest
import torch
from conftest import recipe_tensor
from test_models import official_state

import train_sra
from diffusion import DDPM, Flow, make_diffusion
from train_sra import DISTANCES, SRA, alignment_blocks, alignment_weight, parse_args, teacher_time


def method_for(golden, diffusion, *flags):
    """SRA with the golden's student, teacher and head weights."""
    config = golden.config
    names = (
        "input_size",
        "patch_size",
        "in_channels",
        "hidden_size",
        "depth",
        "num_heads",
        "num_classes",
    )
    network = {k: config[k] for k in names} | {"learn_sigma": diffusion.learned_variance}
    blocks = [
        "--student-block",
        str(config["block_out_s"]),
        "--teacher-block",
        str(config["block_out_t"]),
    ]
    method = SRA(parse_args([*blocks, *flags]), network, diffusion)
    for network, salt in ((method.model, "salt"), (method.ema, "teacher_salt")):
        state = official_state(golden, salt)
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith("ap_head.")})
    state = golden.weights()
    renamed = {"0": "linear1", "2": "linear2"}
    method.head.load_state_dict(
        {
            f"{a}.{p}": state[f"ap_head.{b}.{p}"]
            for a, b in renamed.items()
            for p in ("weight", "bias")
        }
    )
    return method.train()


def watch(method):
    """Record what the teacher is fed and what it returns, and the student's projected features."""
    seen = {}
    tokens_after = method.ema.tokens_after

    def teacher(x, t, y, block):
        seen.update(x=x, t=t, y=y, tokens=tokens_after(x, t, y, block))
        return seen["tokens"]

    method.ema.tokens_after = teacher
    method.head.register_forward_hook(lambda module, inputs, output: seen.update(projected=output))
    method.model.register_forward_hook(
        lambda module, inputs, output: seen.update(x_t=inputs[0], out=output[0])
    )
    return seen


def test_without_head_features_meet_features(golden):
    g = golden("sra_loss")
    i, flow = g.inputs, Flow()
    method = SRA(parse_args(["--head", "none"]), method_for(g, flow).model.config, flow)
    seen = watch(method)
    terms = method(i["x0"], i["y"], t=i["t"], noise=i["noise"], u=i["u"], drop=i["drop_u"])
    features = method.model(seen["x_t"], i["t"], seen["y"], features=(method.student_block,))[1][
        method.student_block
    ]
    assert not list(method.head.parameters()) and set(terms) == {"loss", "denoise", "align"}
    assert torch.equal(terms["align"], DISTANCES["smooth-l1"](features, seen["tokens"]))


def test_sra_loss(golden):
    g = golden("sra_loss")
    i, flow = g.inputs, Flow()
    draws = {"t": i["t"], "noise": i["noise"], "u": i["u"], "drop": torch.ones(4)}
    method = method_for(g, flow, "--label-drop", "0.1")
    seen = watch(method)
    terms = method(i["x0"], i["y"], **draws)
    g.check("align_sml1", terms["align"].detach())
    assert torch.isclose(terms["denoise"], g.outputs["denoising_loss"].mean(), rtol=1e-4)
    assert torch.isclose(terms["loss"], terms["denoise"] + 0.2 * terms["align"])
    for name, key in (
        ("x_t", "x_t"),
        ("v_student", "out"),
        ("feat_student", "projected"),
        ("feat_teacher", "tokens"),
    ):
        g.check(name, seen[key].detach())
    for name, key in (("t_teacher", "t"), ("x_teacher", "x"), ("teacher_labels", "y")):
        g.check(name, seen[key])
    g.check(
        "align_cos_full",
        1 - torch.cosine_similarity(seen["projected"], seen["tokens"], dim=1).detach(),
    )
    drop = {**draws, "drop": i["drop_u"]}
    g.check("align_sml1_drop", method(i["x0"], i["y"], **drop)["align"].detach())
    g.check("teacher_labels_drop", seen["y"])

    cosine = method_for(g, flow, "--align-distance", "cosine-token")
    g.check("align_cos", cosine(i["x0"], i["y"], **draws)["align"].detach())
    g.check("align_cos_drop", cosine(i["x0"], i["y"], **drop)["align"].detach())

    for name, chosen in (
        ("denoising_loss", draws),
        ("denoising_loss_drop", drop),
    ):  # one image at a time gives the per-image values
        each = [
            method(
                i["x0"][k : k + 1],
                i["y"][k : k + 1],
                **{n: v[k : k + 1] for n, v in chosen.items()},
            )["denoise"]
            for k in range(4)
        ]
        g.check(name, torch.stack(each).detach())
    g.all_checked()


def test_sra_dit_loss(golden):
    g = golden("sra_dit_loss")
    i, ddpm = g.inputs, DDPM()
    method = method_for(g, ddpm, "--diffusion", "ddpm", "--align-weight", "0.04")
    seen = watch(method)
    u = (i["k"] + 0.5) / 200  # the draw that becomes the golden's integer offset
    draws = {"t": i["t"], "noise": i["noise"], "u": u, "drop": torch.ones(5)}
    terms = method(i["x0"], i["y"], **draws)
    g.check("align_loss", terms["align"].detach())
    assert torch.isclose(terms["loss"], terms["denoise"] + 0.04 * terms["align"])
    for name, key in (
        ("x_t", "x_t"),
        ("model_output", "out"),
        ("t_teacher", "t"),
        ("x_teacher", "x"),
    ):
        g.check(name, seen[key].detach())
    each = [
        method(
            i["x0"][k : k + 1], i["y"][k : k + 1], **{n: v[k : k + 1] for n, v in draws.items()}
        )["denoise"]
        for k in range(5)
    ]
    g.check("loss", torch.stack(each).detach())
    out = g.outputs["model_output"]
    vb = ddpm.variational_bound(out, i["x0"], i["noise"], i["t"]).flatten(1).mean(1)
    g.check("vb", vb)
    g.check("mse", ddpm.loss(out, i["x0"], i["noise"], i["t"]).flatten(1).mean(1) - vb)
    g.all_checked()


def test_sra_distance(golden):
    g = golden("sra_distance")
    a, b = g.inputs["a"], g.inputs["b"]
    names = {
        "sml1": "smooth-l1",
        "l1": "l1",
        "l2": "l2",
        "cos_token_mean": "cosine-token",
        "cos_channel_mean": "cosine-channel",
    }
    for name, ours in names.items():
        g.check(name, DISTANCES[ours](a, b))
    # Every single cosine: along the tokens of one channel (official), along the channels of one token.
    channel = [
        [
            DISTANCES["cosine-token"](a[k, None, :, d, None], b[k, None, :, d, None])
            for d in range(24)
        ]
        for k in range(3)
    ]
    token = [
        [DISTANCES["cosine-channel"](a[k, None, n, None], b[k, None, n, None]) for n in range(16)]
        for k in range(3)
    ]
    g.check("cos_token", torch.tensor(channel))
    g.check("cos_channel", torch.tensor(token))
    g.all_checked()


def test_sra_weight(golden):
    """The official schedules, in epochs: `--align-decay` takes the same numbers in steps."""
    g = golden("sra_weight")
    epochs = g.inputs["epochs"].tolist()
    late, early = (149, 1000), (99, 800)
    for name, weight, decay in (
        ("sit256_sml1", 0.2, late),
        ("sit512_sml1", 0.2, early),
        ("sit256_cos", 0.5, None),
        ("sit512_cos", 0.5, None),
        ("dit256", 0.04, late),
        ("dit512", 0.04, early),
    ):
        g.check(
            name,
            torch.tensor([alignment_weight(e, weight, decay) for e in epochs], dtype=torch.float64),
        )
    g.all_checked()


def test_align_decay_uses_the_step_of_the_loop(golden):
    g = golden("sra_loss")
    i = g.inputs
    method = method_for(g, Flow(), "--align-decay", "10", "100")
    draws = {"t": i["t"], "noise": i["noise"], "u": i["u"], "drop": torch.ones(4)}
    for step, weight in ((0, 0.2), (10, 0.2), (110, 0.02), (210, 0.002)):
        method.step = step
        terms = method(i["x0"], i["y"], **draws)
        assert torch.isclose(terms["loss"], terms["denoise"] + weight * terms["align"])


def test_published_blocks():
    """SRA section 3.2 and Table 5."""
    assert [alignment_blocks(d, False) for d in (12, 24, 28)] == [(3, 8), (6, 16), (8, 20)]
    assert [alignment_blocks(d, True) for d in (12, 24, 28)] == [(3, 7), (6, 14), (8, 16)]
    for depth in (2, 6, 32):
        student, teacher = alignment_blocks(depth, False)
        assert 1 <= student <= teacher <= depth


def test_teacher_time():
    """t' <= t always; a tenth of the teachers sees clean data at a gap of 0.2; DDPM steps stay in 1 .. 999."""
    torch.manual_seed(0)
    n = 400_000
    t, u = torch.rand(2, n)
    earlier = teacher_time(t, u, 0.2)
    assert (earlier <= t).all() and (earlier >= 0).all()
    assert abs((earlier == 0).float().mean() - 0.1) < 0.002
    assert torch.equal(teacher_time(t, u, 0.0), t)
    steps = DDPM().draw_t(n, "cpu")
    earlier = teacher_time(steps, u, 0.2)
    assert earlier.dtype == torch.int64 and earlier.min() == 1 and (steps - earlier).max() == 199
    assert (earlier[steps > 0] <= steps[steps > 0]).all() and (earlier[steps == 0] == 1).all()


NETWORK = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 6,
    "num_heads": 2,
    "num_classes": 10,
}


def small(*flags):
    args = parse_args(list(flags))
    diffusion = make_diffusion(args.diffusion)
    torch.manual_seed(0)
    method = SRA(args, {**NETWORK, "learn_sigma": diffusion.learned_variance}, diffusion)
    for name, parameter in method.model.named_parameters():
        parameter.data.copy_(recipe_tensor("student", name, tuple(parameter.shape)))
    for name, parameter in method.ema.named_parameters():
        parameter.data.copy_(recipe_tensor("teacher", name, tuple(parameter.shape)))
    return method


@pytest.mark.parametrize("kind", ["flow", "gvp", "ddpm"])
def test_every_trainable_parameter_has_a_gradient_and_the_teacher_none(kind):
    method = small("--diffusion", kind)
    x0, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 9, 1])
    method(x0, y)["loss"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("ema."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_teacher_stops_at_its_block():
    method, ran = small(), []
    for k, block in enumerate(method.ema.blocks, 1):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    method(torch.randn(2, 3, 8, 8), torch.tensor([0, 3]))
    assert ran == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["flow", "gvp", "edm", "ddpm"])
def test_weight_zero_is_the_plain_model(kind):
    """No head, no teacher pass; the same loss and gradients as SRA's own denoising term, and as the network trained directly."""
    plain = small("--diffusion", kind, "--align-weight", "0")
    assert not hasattr(plain, "head")
    plain.ema.tokens_after = None  # a call would fail
    diffusion, torch_draws = plain.diffusion, torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=torch_draws)
    y, t = torch.tensor([0, 3, 9, 1]), diffusion.draw_t(4, "cpu")
    draws = {"t": t, "noise": noise, "drop": torch.tensor([0.5, 0.01, 0.5, 0.5])}
    terms = plain(x0, y, **draws)
    terms["loss"].backward()
    dropped = torch.tensor([0, 10, 9, 1])
    direct = diffusion.loss(
        plain.model(*diffusion.net_inputs(diffusion.add_noise(x0, noise, t), t), dropped),
        x0,
        noise,
        t,
    ).mean()
    assert torch.equal(terms["loss"], direct)
    if kind != "edm":
        full = small("--diffusion", kind)
        assert torch.equal(full(x0, y, **draws)["denoise"], direct)


def test_edm_and_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="flow, gvp and ddpm"):
        small("--diffusion", "edm")
    for flags in (
        ("--student-block", "5", "--teacher-block", "4"),
        ("--teacher-block", "7"),
        ("--student-block", "0"),
    ):
        with pytest.raises(ValueError, match="1 <= student <= teacher <= 6"):
            small(*flags)


def test_impossible_decay_is_refused():
    with pytest.raises(ValueError, match="--align-decay 5 0"):
        small("--align-decay", "5", "0")


def test_cosine_distances_default_to_weight_one_half():
    assert small("--align-distance", "cosine-channel").weight == 0.5 and small().weight == 0.2
    assert train_sra.parse_args([]).align_weight is None
