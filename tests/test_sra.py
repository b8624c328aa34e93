"""train_sra.py's method against the values of the official code, and its own rules."""

import torch
from conftest import draws, official_state, one_by_one, small, watch, words

from diffusion import DDPM, Flow
from train_sra import DISTANCES, SRA, alignment_blocks, alignment_weight, parse_args


def method_for(golden, diffusion, flags=""):
    """SRA with the golden's student, teacher and head weights."""
    config = golden.config
    network = golden.network() | {"learn_sigma": diffusion.learned_variance}
    blocks = f"--student-block {config['block_out_s']} --teacher-block {config['block_out_t']}"
    method = SRA(parse_args(words(blocks, flags)), network, diffusion)
    for network, salt in ((method.model, "salt"), (method.ema, "teacher_salt")):
        state = official_state(golden, salt)
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith("ap_head.")})
    method.head.load_state_dict(
        {
            name.replace("ap_head.linear1", "0").replace("ap_head.linear2", "2"): value
            for name, value in golden.weights().items()
            if name.startswith("ap_head.")
        }
    )
    return method.train()


def test_sra_loss(golden):
    g = golden("sra_loss")
    i, flow = g.inputs, Flow()
    x0, y = i["x0"], i["y"]
    fixed = {"t": i["t"], "noise": i["noise"], "u": i["u"], "drop": torch.ones(4)}
    dropped = {**fixed, "drop": i["drop_u"]}
    method = method_for(g, flow, "--label-drop 0.1")
    g.check("denoising_loss", one_by_one(method, x0, y, fixed, "denoise"))
    g.check("denoising_loss_drop", one_by_one(method, x0, y, dropped, "denoise"))
    seen = watch(method, method.ema)
    terms = method(x0, y, **fixed)
    g.check("align_sml1", terms["align"])
    assert torch.isclose(terms["denoise"], g.outputs["denoising_loss"].mean(), rtol=1e-4)
    assert torch.isclose(terms["loss"], terms["denoise"] + 0.2 * terms["align"])
    g.check("x_t", seen["x_t"])
    g.check("v_student", seen["out"])
    g.check("feat_student", seen["projected"])
    g.check("feat_teacher", seen["tokens"])
    g.check("t_teacher", seen["t"])
    g.check("x_teacher", seen["x"])
    g.check("teacher_labels", seen["y"])
    cosine = torch.cosine_similarity(seen["projected"], seen["tokens"], dim=1)
    g.check("align_cos_full", 1 - cosine)
    g.check("align_sml1_drop", method(x0, y, **dropped)["align"])
    g.check("teacher_labels_drop", seen["y"])
    cosine = method_for(g, flow, "--align-distance cosine-token")
    g.check("align_cos", cosine(x0, y, **fixed)["align"])
    g.check("align_cos_drop", cosine(x0, y, **dropped)["align"])
    g.all_checked()


def test_sra_dit_loss(golden):
    g = golden("sra_dit_loss")
    i, ddpm = g.inputs, DDPM()
    x0, y, t, noise = i["x0"], i["y"], i["t"], i["noise"]
    u = (i["k"] + 0.5) / 200  # the draw that becomes the golden's integer offset
    fixed = {"t": t, "noise": noise, "u": u, "drop": torch.ones(5)}
    method = method_for(g, ddpm, "--diffusion ddpm --align-weight 0.04")
    g.check("loss", one_by_one(method, x0, y, fixed, "denoise"))
    seen = watch(method, method.ema)
    terms = method(x0, y, **fixed)
    g.check("align_loss", terms["align"])
    assert torch.isclose(terms["loss"], terms["denoise"] + 0.04 * terms["align"])
    g.check("x_t", seen["x_t"])
    g.check("model_output", seen["out"])
    g.check("t_teacher", seen["t"])
    g.check("x_teacher", seen["x"])
    out = g.outputs["model_output"]
    vb = ddpm.variational_bound(out, x0, noise, t).flatten(1).mean(1)
    g.check("vb", vb)
    g.check("mse", ddpm.loss(out, x0, noise, t).flatten(1).mean(1) - vb)
    g.all_checked()


def test_sra_distance(golden):
    g = golden("sra_distance")
    a, b = g.inputs["a"], g.inputs["b"]  # (3, 16, 24)
    g.check("sml1", DISTANCES["smooth-l1"](a, b))
    g.check("l1", DISTANCES["l1"](a, b))
    g.check("l2", DISTANCES["l2"](a, b))
    g.check("cos_token_mean", DISTANCES["cosine-token"](a, b))
    g.check("cos_channel_mean", DISTANCES["cosine-channel"](a, b))
    # every cosine alone: along the tokens of one channel (official), along one token's channels
    channels, tokens = [], []
    for x, y in zip(a[:, None], b[:, None]):
        pairs = [(x[..., [d]], y[..., [d]]) for d in range(24)]
        channels.append([DISTANCES["cosine-token"](*pair) for pair in pairs])
        pairs = [(x[:, [n]], y[:, [n]]) for n in range(16)]
        tokens.append([DISTANCES["cosine-channel"](*pair) for pair in pairs])
    g.check("cos_token", torch.tensor(channels))
    g.check("cos_channel", torch.tensor(tokens))
    g.all_checked()


def test_sra_weight(golden):
    """The official schedules, in epochs: `--align-decay` takes the same numbers in steps."""
    g = golden("sra_weight")
    late, early = (149, 1000), (99, 800)
    for name, weight, decay in (
        ("sit256_sml1", 0.2, late),
        ("sit512_sml1", 0.2, early),
        ("sit256_cos", 0.5, None),
        ("sit512_cos", 0.5, None),
        ("dit256", 0.04, late),
        ("dit512", 0.04, early),
    ):
        weights = [alignment_weight(e, weight, decay) for e in g.inputs["epochs"].tolist()]
        g.check(name, torch.tensor(weights, dtype=torch.float64))
    g.all_checked()


def test_published_blocks():
    """SRA section 3.2 and Table 5."""
    assert [alignment_blocks(d, False) for d in (12, 24, 28)] == [(3, 8), (6, 16), (8, 20)]
    assert [alignment_blocks(d, True) for d in (12, 24, 28)] == [(3, 7), (6, 14), (8, 16)]


# The method's own rules


def test_align_decay_uses_the_step_of_the_loop():
    method = small("train_sra", "--align-decay 10 100")
    x0, y, fixed = draws(method)
    for step, weight in ((10, 0.2), (110, 0.02)):
        method.step = step
        terms = method(x0, y, **fixed)
        assert torch.isclose(terms["loss"], terms["denoise"] + weight * terms["align"])


def test_without_head_features_meet_features():
    method = small("train_sra", "--head none")
    x0, y, fixed = draws(method)
    seen = watch(method, method.ema)
    terms = method(x0, y, **fixed)
    _, features = method.model(seen["x_t"], seen["t_s"], seen["y"], features=(2,))
    assert method.student_block == 2 and not list(method.head.parameters())
    assert torch.isclose(terms["align"], DISTANCES["smooth-l1"](features[2], seen["tokens"]))
