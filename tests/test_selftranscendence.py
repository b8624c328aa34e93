"""train_selftranscendence.py's method against the values of the official code, and its own rules."""

import math
from pathlib import Path

import pytest
import torch
from conftest import recipe_tensor
from test_end_to_end import run_in_process
from test_training import assert_same, checkpoint, log_lines

from diffusion import Flow, make_diffusion
from models import DiT, MaskedDiT, load_official, position_embedding
from train_selftranscendence import LOGGED, SelfTranscendence, parse_args, window_mean


def save_teacher(path, model, ema=None, diffusion="flow"):
    """A checkpoint as the scaffold writes it."""
    content = {
        "model": model.state_dict(),
        "ema": (ema or model).state_dict(),
        "method": {},
        "optimizer": {},
        "step": 1,
    }
    content |= {"args": {"network": model.config, "diffusion": diffusion}, "log": torch.zeros(0)}
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return str(path)


# Reference values


def official(golden, tmp_path, which, salt=None):
    """The official state dict of a case, and the network that load_official reads from a file of it."""
    state = golden.weights(which, salt)
    state["pos_embed"] = position_embedding(48, 4)
    torch.save({"model": state, "ema": state}, tmp_path / "official.pt")
    model, notes = load_official(tmp_path / "official.pt", "repa", golden.config["num_heads"])
    assert any("projectors" in note for note in notes) and ("projectors_final" in str(notes)) == (
        "stage1" in which
    )
    return state, model


def method_for(golden, tmp_path, stage, which, *flags):
    """The method with the golden's weights: official projectors.{0,2,4} are our head.{0,2,4}, projectors_final.linear is our head.6."""
    state, model = official(golden, tmp_path, which)
    flags = ["--stage", str(stage), "--student-block", "2", "--head-width", "40", *flags]
    if stage == 2:
        teacher = official(golden, tmp_path, which, golden.config.get("teacher_salt"))[1]
        flags += [
            "--teacher",
            save_teacher(tmp_path / "teacher.pt", teacher),
            "--teacher-block",
            "3",
        ]
    method = SelfTranscendence(parse_args(flags), model.config, Flow())
    method.model.load_state_dict(model.state_dict())
    names = {f"projectors.{k}.": f"{k}." for k in (0, 2, 4)} | {"projectors_final.linear.": "6."}
    method.head.load_state_dict(
        {n.replace(a, b): v for n, v in state.items() for a, b in names.items() if n.startswith(a)}
    )
    return method


FORMS = pytest.mark.parametrize("form", ["", "_noqknorm"])


@FORMS
def test_stage1_network(eval_golden, tmp_path, form):
    g = eval_golden(f"selftrans_stage1{form}")
    method = method_for(g, tmp_path, 1, f"selftrans_stage1{form}")
    with torch.no_grad():
        out, features = method.model(g.inputs["x"], g.inputs["t"], g.inputs["y"], features=(2,))
        g.check("output", out)
        g.check("shallow_prediction", method.model.unpatchify(method.head(features[2])))
    g.all_checked()


@FORMS
def test_stage2_network(eval_golden, tmp_path, form):
    g = eval_golden(f"selftrans_stage2{form}")
    method = method_for(g, tmp_path, 2, f"selftrans_stage2{form}")
    inputs = g.inputs["x"], g.inputs["t"], g.inputs["y"]
    with torch.no_grad():
        out, features = method.model(*inputs, features=(2,))
        g.check("output", out)
        for name, tokens in (
            ("projected", method.head(features[2])),
            ("raw", method.frozen.tokens_after(*inputs, 3)),
        ):
            g.check(f"{name}_features", tokens[:, ::3, ::5])
            g.check(f"{name}_norm", tokens.flatten(1).norm(dim=1))
    g.all_checked()


@FORMS
def test_losses(eval_golden, tmp_path, form):
    g = eval_golden(f"selftrans_loss{form}")
    i = g.inputs
    batch = i["images"], i["labels"]
    draws = {"t": i["t"], "noise": i["noise"], "drop": torch.ones(5)}

    def each(method, name):
        one = [
            method(*(v[k : k + 1] for v in batch), **{n: v[k : k + 1] for n, v in draws.items()})[
                name
            ]
            for k in range(5)
        ]
        return torch.stack(one).detach()

    for stage in (1, 2):
        which = f"selftrans_stage{stage}{form}"
        masked = method_for(g, tmp_path, stage, which, "--t-range", "0.4", "0.7")
        always = method_for(g, tmp_path, stage, which, "--t-range", "0", "1")
        released = method_for(g, tmp_path, stage, which, "--t-mode", "released")
        unmasked = each(always, "align")
        g.check(f"stage{stage}_denoising", each(masked, "denoise"))
        g.check(f"stage{stage}_aux_unmasked", unmasked)
        g.check(f"stage{stage}_aux_per_sample_masked", each(masked, "align"))
        inside = (each(masked, "align") == unmasked).float()
        assert inside.tolist() == [0, 1, 1, 1, 0]  # both ends of the range count
        parts = [
            window_mean(v[None], m[None], torch.ones(1), "released", 0.3)
            for m in inside
            for v in unmasked
        ]
        g.check(f"stage{stage}_aux_as_published", torch.stack(parts).view(5, 1, 1, 5))
        terms = released(*batch, **draws)
        means = [
            terms["denoise"],
            always(*batch, **draws)["align"],
            terms["align"],
            masked(*batch, **draws)["align"],
        ]
        g.check(f"stage{stage}_means", torch.stack(means).detach())
        torch.testing.assert_close(terms["loss"], terms["denoise"] + 0.5 * terms["align"])
        terms["loss"].backward()
        head, blocks = released.head, released.model.blocks
        weights = [head[0], blocks[0].attn.qkv, head[6 if stage == 1 else 4], blocks[-1].mlp.fc1]
        g.check(
            f"stage{stage}_grad_norms",
            torch.stack([layer.weight.grad.norm() for layer in weights]),
            rtol=1e-3,
        )
    conditional = method_for(
        g, tmp_path, 2, which, "--t-range", "0", "1", "--feature-guidance", "1"
    )
    g.check("stage2_aux_unmasked_cfg1", each(conditional, "align"))
    g.all_checked()


# The method's own rules

NETWORK = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 6,
    "num_heads": 2,
    "num_classes": 10,
}
TEACHER = 4  # the teacher's default block at depth 6


def network(salt, cls=DiT, **changes):
    model = cls(**{**NETWORK, "qk_norm": True, **changes})
    for name, parameter in model.named_parameters():
        parameter.data.copy_(recipe_tensor(salt, name, tuple(parameter.shape)))
    return model


@pytest.fixture
def small(tmp_path):
    """small(stage, *flags): the method on a small network; the teacher's weights and EMA differ."""

    def make(stage, *flags, **changes):
        flags = ["--stage", str(stage), *flags]
        args = parse_args(flags)
        if stage == 2 and args.teacher is None and args.align_weight > 0:
            args.teacher = save_teacher(
                tmp_path / "teacher.pt", network("weights"), network("average"), args.diffusion
            )
        diffusion = make_diffusion(args.diffusion)
        torch.manual_seed(0)
        config = {
            **NETWORK,
            "qk_norm": args.qk_norm,
            "learn_sigma": diffusion.learned_variance,
            **changes,
        }
        method = SelfTranscendence(args, config, diffusion)
        for name, parameter in method.model.named_parameters():
            parameter.data.copy_(recipe_tensor("student", name, tuple(parameter.shape)))
        return method

    return make


TIMES = torch.tensor([0.1, 0.4, 0.55, 0.7, 0.93])
INSIDE = torch.tensor([0.0, 1, 1, 1, 0])


def batch(drop=(1.0,) * 5, t=TIMES):
    """Images, labels and draws; the default drops no label."""
    x0, noise = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return (x0, torch.tensor([0, 3, 9, 1, 4])), {"t": t, "noise": noise, "drop": torch.tensor(drop)}


def watch(method):
    """Record what the teacher is fed and returns, the student's labels and its projected features; `calls` counts teacher passes."""
    seen = {"calls": 0}
    tokens_after = method.frozen.tokens_after

    def teacher(x, t, y, block):
        seen.update(x=x, t=t, y=y, tokens=tokens_after(x, t, y, block), calls=seen["calls"] + 1)
        return seen["tokens"]

    method.frozen.tokens_after = teacher
    method.head.register_forward_hook(lambda module, inputs, output: seen.update(projected=output))
    method.model.register_forward_hook(
        lambda module, inputs, output: seen.update(x_t=inputs[0], y_student=inputs[2])
    )
    return seen


def gradients(method):
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage,block", [(1, 2), (1, 4), (2, 3), (2, 5)])
def test_the_term_reaches_the_head_and_the_blocks_up_to_it(small, stage, block):
    """Later blocks and the last layer learn from L_gen alone."""
    method, (images, draws) = small(stage, "--student-block", str(block)), batch()
    method(*images, **draws)["align"].backward()
    for name, grad in gradients(method).items():
        reached = not name.startswith("model.final_layer") and not (
            name.startswith("model.blocks") and int(name.split(".")[2]) >= block
        )
        assert (grad is not None and grad.abs().sum() > 0) if reached else grad is None, name
    method.zero_grad()
    method(*images, **draws)["loss"].backward()
    whole = gradients(method)
    plain = small(stage, "--align-weight", "0")
    plain(*images, **draws)["loss"].backward()
    for name, grad in gradients(plain).items():
        later = name.startswith("model.final_layer") or (
            name.startswith("model.blocks") and int(name.split(".")[2]) >= block
        )
        assert torch.equal(grad, whole[name]) == later, name


def test_stage1_head_predicts_an_image(small):
    method, (images, draws) = small(1), batch()
    seen = {}
    method.head.register_forward_hook(lambda module, inputs, output: seen.update(out=output))
    method(*images, **draws)
    assert method.model.unpatchify(seen["out"]).shape == images[0][INSIDE == 1].shape
    assert not list(method.head[5].parameters()) and method.head[5].eps == 1e-6


@pytest.mark.parametrize("stage,linear", [(1, 4), (2, 3)])
def test_head_starts_as_xavier_with_zero_bias(small, stage, linear):
    layers = [layer for layer in small(stage).head if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == linear
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.9 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0).all()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["flow", "gvp", "edm", "ddpm"])
def test_weight_zero_is_the_plain_model(small, stage, kind):
    """No head, no teacher, no file of one; loss and gradients bit for bit those of the network trained directly."""
    plain = small(stage, "--diffusion", kind, "--align-weight", "0")
    assert not hasattr(plain, "head") and plain.frozen is None
    diffusion, (images, draws) = plain.diffusion, batch(drop=(0.5, 0.01, 0.5, 0.5, 0.5))
    draws["t"] = diffusion.draw_t(5, "cpu")
    terms = plain(*images, **draws)
    assert set(terms) == {"loss", "denoise"}
    terms["loss"].backward()
    ours = gradients(plain)
    plain.model.zero_grad()
    x_t = diffusion.add_noise(images[0], draws["noise"], draws["t"])
    out = plain.model(*diffusion.net_inputs(x_t, draws["t"]), torch.tensor([0, 10, 9, 1, 4]))
    direct = diffusion.loss(out, images[0], draws["noise"], draws["t"]).mean()
    direct.backward()
    assert torch.equal(terms["loss"], direct)
    assert all(torch.equal(grad, ours[name]) for name, grad in gradients(plain).items())
    if kind in ("flow", "gvp"):
        assert torch.equal(small(stage, "--diffusion", kind)(*images, **draws)["denoise"], direct)


@pytest.mark.parametrize("kind", ["flow", "gvp"])
def test_velocity_and_x0_target_are_one_error_in_two_units(small, kind):
    """x_0 = x_t - t v on the linear path: an error of v counts t^2 times in x_0; on the other path (2 s / pi)^2 times."""
    images, draws = batch()
    for k, t in enumerate(TIMES.tolist()):
        one = [v[k : k + 1] for v in images], {n: v[k : k + 1] for n, v in draws.items()}
        flags = ("--diffusion", kind, "--t-range", "0", "1")
        velocity, x0 = (
            small(1, *flags, "--stage1-target", target)(*one[0], **one[1])["align"]
            for target in ("velocity", "x0")
        )
        factor = t**2 if kind == "flow" else (math.sin(math.pi / 2 * t) * 2 / math.pi) ** 2
        torch.testing.assert_close(x0, velocity * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_t_modes(small, stage):
    """Values by definition, and the gradient each image gets, seen through its own pixels."""
    images, draws = batch()

    def align(mode, t=TIMES, t_range=("0.4", "0.7")):
        method = small(stage, "--t-mode", mode, "--t-range", *t_range)
        x0 = images[0].clone().requires_grad_()
        value = method(x0, images[1], **{**draws, "t": t})["align"]
        value.backward()
        grads = [grad for grad in gradients(method).values() if grad is not None]
        return value.detach(), x0.grad.flatten(1).abs().sum(1), grads

    always = small(stage, "--t-range", "0", "1")
    one = [
        always(*(v[k : k + 1] for v in images), **{n: v[k : k + 1] for n, v in draws.items()})[
            "align"
        ]
        for k in range(5)
    ]
    each = torch.stack(one).detach()
    everywhere = align("masked", t_range=("0", "1"))
    torch.testing.assert_close(everywhere[0], each.mean())
    expected = {
        "masked": (each * INSIDE).mean(),
        "selected": each[1:4].mean(),
        "all": 0.3 * each.mean(),
        "released": 0.6 * each.mean(),
    }
    weights = {
        "masked": INSIDE,
        "selected": INSIDE / 0.6,
        "all": torch.full((5,), 0.3),
        "released": torch.full((5,), 0.6),
    }
    for mode, value in expected.items():
        ours, reach, _ = align(mode)
        torch.testing.assert_close(ours, value)
        torch.testing.assert_close(reach, weights[mode] * everywhere[1], rtol=1e-4, atol=0)
        assert (reach[weights[mode] == 0] == 0).all()
    outside = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.9])
    for mode in ("masked", "selected", "released"):
        ours, reach, grads = align(mode, outside)
        assert ours == 0 and (reach == 0).all() and all((grad == 0).all() for grad in grads)


def test_window_mean_with_skipped_images():
    values, inside, counted = (
        torch.tensor([1.0, 2, 4, 8]),
        torch.tensor([1.0, 1, 0, 0]),
        torch.tensor([1.0, 0, 1, 1]),
    )
    expected = {"masked": 1 / 4, "selected": 1.0, "all": 0.3 * 13 / 4, "released": 0.5 * 13 / 4}
    for mode, value in expected.items():
        assert math.isclose(window_mean(values, inside, counted, mode, 0.3), value, rel_tol=1e-6)
    assert window_mean(values, inside, torch.zeros(4), "selected", 0.3) == 0


def test_teacher_is_frozen_and_holds_nothing_unused(small, tmp_path):
    method = small(2)
    state, stored = method.frozen.state_dict(), network("weights").state_dict()
    unused = {n for n in stored if n.startswith(("blocks.4.", "blocks.5.", "final_layer."))}
    assert set(state) == set(stored) - unused and all(
        torch.equal(v, stored[n]) for n, v in state.items()
    )
    assert not method.frozen.training and not any(
        p.requires_grad for p in method.frozen.parameters()
    )
    assert {n for n in method.state_dict() if n.startswith("frozen.")} == {
        f"frozen.{n}" for n in state
    }
    averaged = small(2, "--teacher-weights", "ema").frozen.state_dict()
    assert torch.equal(
        averaged["blocks.0.mlp.fc1.weight"],
        network("average").state_dict()["blocks.0.mlp.fc1.weight"],
    )
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    images, draws = batch()
    before = {n: p.clone() for n, p in method.named_parameters()}
    for step in range(20):
        method.step = step
        method(*images, **draws)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step, 20)
    for name, parameter in method.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(("frozen.", "ema.")), name
        assert parameter.grad is None


def test_student_starts_from_a_fresh_initialisation(tmp_path):
    args = parse_args(
        ["--stage", "2", "--teacher", save_teacher(tmp_path / "teacher.pt", network("weights"))]
    )
    torch.manual_seed(5)
    student = SelfTranscendence(
        args, {**NETWORK, "qk_norm": True, "learn_sigma": False}, Flow()
    ).model
    torch.manual_seed(5)
    fresh = DiT(**NETWORK, qk_norm=True)
    assert all(torch.equal(v, fresh.state_dict()[n]) for n, v in student.state_dict().items())


@pytest.mark.parametrize("mode", ["masked", "all"])
def test_teacher_sees_the_same_noise_true_labels_and_the_null_label(small, mode):
    """Same x_t and t in both halves, [conditional; null] in this order, null label 10 for 10 classes, early exit at the teacher's block.

    Only the images in range, unless all of them count."""
    method, (images, draws) = small(2, "--t-mode", mode), batch(drop=(0.0,) * 5)
    seen = watch(method)
    terms = method(*images, **draws)
    rows = [1, 2, 3] if mode == "masked" else [0, 1, 2, 3, 4]
    x_t, t, y = seen["x_t"][rows], TIMES[rows], images[1][rows]
    assert seen["y_student"].tolist() == [10] * 5  # all dropped
    assert seen["y"].tolist() == y.tolist() + [10] * len(rows)  # none dropped
    assert torch.equal(seen["x"], x_t.repeat(2, 1, 1, 1)) and torch.equal(seen["t"], t.repeat(2))
    with torch.no_grad():
        full = network("weights")
        for half, labels in zip(seen["tokens"].chunk(2), (y, torch.full_like(y, 10))):
            _, features = full(x_t, t, labels, features=(TEACHER,))
            torch.testing.assert_close(half, features[TEACHER], rtol=1e-4, atol=1e-5)
        doubled = full(seen["x"], seen["t"], seen["y"], features=(TEACHER,))[1][TEACHER]
    assert torch.equal(seen["tokens"], doubled)
    f_c, f_u = seen["tokens"].chunk(2)
    error = (seen["projected"] - (f_u + 30 * (f_c - f_u))).square().flatten(1).mean(1)
    expected = error.sum() / 5 if mode == "masked" else 0.3 * error.mean()
    torch.testing.assert_close(terms["align"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["guidance_gap"], (f_c - f_u).norm() / f_u.norm())
    torch.testing.assert_close(
        terms["guided_norm"], (f_u + 30 * (f_c - f_u)).norm() / f_u.norm(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("scale,half", [("1", 0), ("0", 1)])
def test_guidance_one_and_zero_are_exactly_the_conditional_and_the_null_features(
    small, scale, half
):
    method, (images, draws) = small(2, "--feature-guidance", scale, "--t-range", "0", "1"), batch()
    tokens_after, apart = (
        method.frozen.tokens_after,
        torch.tensor([1.0] * 5 + [1e4] * 5)[:, None, None],
    )
    method.frozen.tokens_after = lambda *inputs: (
        tokens_after(*inputs) * apart
    )  # f_u + (f_c - f_u) would lose digits of f_c
    seen = watch(method)
    terms = method(*images, **draws)
    error = (seen["projected"] - seen["tokens"].chunk(2)[half]).square().flatten(1).mean(1)
    assert torch.equal(terms["align"], error.mean())
    with torch.no_grad():  # swap test: not the other half
        alone = network("weights").tokens_after(
            seen["x_t"], TIMES, images[1] if half == 0 else torch.full((5,), 10), TEACHER
        )
    expected = (seen["projected"] - alone * apart[5 * half]).square().mean()
    torch.testing.assert_close(terms["align"], expected, rtol=1e-5, atol=0)


def test_target_of_students_without_label(small):
    drop = (0.0, 1.0, 0.0, 1.0, 1.0)
    images, draws = batch(drop=drop, t=torch.full((5,), 0.5))
    kept = torch.tensor(drop)
    errors = {}
    for policy in ("conditional", "unconditional", "skip"):
        method = small(2, "--drop-target", policy)
        seen = watch(method)
        terms = method(*images, **draws)
        assert seen["y_student"].tolist() == [10, 3, 10, 1, 4]
        assert seen["y"][:5].tolist() == (
            [10, 3, 10, 1, 4] if policy == "unconditional" else [0, 3, 9, 1, 4]
        )
        f_c, f_u = seen["tokens"].chunk(2)
        f_g = f_u + 30 * (f_c - f_u)
        if policy == "unconditional":
            torch.testing.assert_close(f_g[[0, 2]], f_u[[0, 2]], rtol=1e-3, atol=1e-3)
        error = errors[policy] = (seen["projected"] - f_g).square().flatten(1).mean(1)
        expected = (error * kept).mean() if policy == "skip" else error.mean()
        torch.testing.assert_close(terms["align"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors["skip"], errors["conditional"])
    assert (errors["unconditional"][[0, 2]] < 0.9 * errors["conditional"][[0, 2]]).all()


@pytest.mark.parametrize("mode", ["masked", "all"])
def test_logged_splits(small, mode):
    """Sums over the images of a group, divided by the number expected: averages over many steps are the groups' means, however small."""
    images, draws = batch(drop=(1.0, 1.0, 0.0, 1.0, 0.0))
    method = small(2, "--t-mode", mode)
    seen = watch(method)
    terms = method(*images, **draws)
    f_c, f_u = seen["tokens"].chunk(2)
    rows = [1, 2, 3] if mode == "masked" else [0, 1, 2, 3, 4]
    error = torch.zeros(5)
    error[rows] = (
        (seen["projected"] - torch.lerp(f_u, f_c, 30.0)).square().flatten(1).mean(1).detach()
    )
    share = 0.3 if mode == "masked" else 1.0
    groups = {
        "align_in": ([1, 2, 3], 0.3),
        "align_kept": ([0, 1, 3], 0.9 * share),
        "align_dropped": ([2, 4], 0.1 * share),
    }
    for name, (chosen, expected) in groups.items():
        torch.testing.assert_close(
            terms[name], error[chosen].sum() / (5 * expected), rtol=1e-4, atol=0
        )
    assert set(terms) == {"loss", "denoise", *LOGGED}
    outside = method(*images, **{**draws, "t": torch.full((5,), 0.1)})
    assert (outside["align"] == 0) == (mode == "masked") and all(
        torch.isfinite(v) for v in outside.values()
    )
    assert torch.isfinite(small(2, "--label-drop", "0")(*images, **draws)["align_dropped"])


def test_images_out_of_range_cost_neither_head_nor_teacher(small):
    """None in range: one image goes through both all the same, with weight 0, so that every parameter gets a gradient."""
    for stage in (1, 2):
        method, (images, draws) = small(stage), batch()
        rows = []
        method.head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        if stage == 2:
            seen = watch(method)
        for t in (TIMES, torch.full((5,), 0.1)):
            method(*images, **{**draws, "t": t})["loss"].backward()
        assert rows == [3, 1] and (stage == 1 or len(seen["x"]) == 2)
        method.zero_grad()
        method(*images, **{**draws, "t": torch.full((5,), 0.1)})["loss"].backward()
        assert all((p.grad == 0).all() for p in method.head.parameters())


def test_stop_step(small):
    """Before it weight 0.5; from it on L_gen alone, no teacher pass, zero gradients for the head, the same keys; the teacher is freed."""
    method, (images, draws) = small(2, "--stop-step", "5"), batch()
    seen = watch(method)
    parameters = list(method.frozen.parameters())
    keys = []
    for step in (3, 4):
        method.step = step
        terms = method(*images, **draws)
        keys.append(list(terms))
        torch.testing.assert_close(terms["loss"], terms["denoise"] + 0.5 * terms["align"])
        assert terms["align"] > 0
    assert seen["calls"] == 2
    method.after_step(3, 10)
    assert method.frozen is not None
    for freed in (
        False,
        True,
    ):  # a run resumed after the stop still has the teacher in its first step
        method.step = 5
        method.zero_grad()
        terms = method(*images, **draws)
        terms["loss"].backward()
        assert torch.equal(terms["loss"], terms["denoise"]) and list(terms) == keys[0]
        assert all(terms[name] == 0 for name in LOGGED) and seen["calls"] == 2
        for name, grad in gradients(method).items():
            assert (grad == 0).all() if name.startswith("head.") else grad.abs().sum() > 0, name
        assert (method.frozen is None) == freed
        method.after_step(4, 10)
    assert all(p.numel() == 0 for p in parameters)  # also for whoever else refers to them
    method.after_step(5, 10)
    assert not any(name.startswith("frozen.") for name in method.state_dict())


@pytest.mark.parametrize(
    "stage,flags",
    [
        (1, ["--t-mode", "masked"]),
        (1, ["--t-mode", "selected", "--stage1-target", "x0"]),
        (1, ["--t-mode", "all", "--diffusion", "gvp"]),
        (1, ["--t-mode", "released", "--no-qk-norm"]),
        (2, ["--t-mode", "masked"]),
        (2, ["--t-mode", "selected", "--drop-target", "skip", "--feature-guidance", "1"]),
        (2, ["--t-mode", "all", "--diffusion", "gvp", "--drop-target", "unconditional"]),
        (
            2,
            [
                "--t-mode",
                "released",
                "--teacher-weights",
                "ema",
                "--teacher-precision",
                "bf16",
                "--feature-guidance",
                "0",
            ],
        ),
        (2, ["--stop-step", "0"]),
    ],
)
def test_every_trainable_parameter_has_a_gradient_and_the_teacher_none(small, stage, flags):
    """Also where no image is in range or counted."""
    method, (images, draws) = small(stage, *flags), batch()
    for t, drop in ((TIMES, (1.0, 0.0, 1.0, 1.0, 1.0)), (torch.full((5,), 0.2), (0.0,) * 5)):
        method.zero_grad()
        terms = method(*images, **{**draws, "t": t, "drop": torch.tensor(drop)})
        terms["loss"].backward()
        assert all(torch.isfinite(v) for v in terms.values())
        for name, parameter in method.named_parameters():
            if name.startswith(("ema.", "frozen.")):
                assert parameter.grad is None and not parameter.requires_grad
            else:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().sum() > 0 or not name.startswith("model."), name


def test_teacher_precision(small):
    """Under bf16 autocast the teacher runs in fp32 unless asked otherwise, and features and loss are fp32 in both cases."""
    images, draws = batch()
    reference = watch(plain := small(2))
    plain(*images, **draws)
    for precision, same in (("fp32", True), ("bf16", False)):
        method = small(2, "--teacher-precision", precision)
        seen = watch(method)
        with torch.autocast("cpu", torch.bfloat16):
            terms = method(*images, **draws)
            stage1 = small(1)(*images, **draws)
        assert torch.equal(seen["tokens"], reference["tokens"]) == same
        guided = [torch.lerp(*s["tokens"].chunk(2)[::-1], 30.0) for s in (seen, reference)]
        assert (guided[0] - guided[1]).norm() < 0.05 * guided[
            1
        ].norm()  # 0.02 here, 0.01 on a trained network
        assert all(v.dtype == torch.float32 for v in (*terms.values(), *stage1.values()))


def test_defaults_by_size(tmp_path):
    """Blocks, stop and width of the docstring: B 6 -> 8, L 12 -> 16, XL 14 -> 18."""
    for depth, blocks, stop in (
        (6, (3, 4), 100_000),
        (12, (6, 8), 100_000),
        (24, (12, 16), 50_000),
        (28, (14, 18), 50_000),
    ):
        config = {**NETWORK, "hidden_size": 8, "depth": depth, "qk_norm": True}
        teacher = save_teacher(tmp_path / f"{depth}.pt", DiT(**config))
        method = SelfTranscendence(
            parse_args(["--stage", "2", "--teacher", teacher]),
            {**config, "learn_sigma": False},
            Flow(),
        )
        assert (method.student_block, method.teacher_block) == blocks and method.stop_step == stop
    for dim, width in ((128, 256), (384, 768), (768, 2048), (1152, 2048)):
        with torch.device("meta"):
            config = {**NETWORK, "hidden_size": dim, "depth": 2, "num_heads": 4, "qk_norm": True}
            method = SelfTranscendence(parse_args([]), config, Flow())
        assert method.student_block == 2 and method.head[2].weight.shape == (width, width)
    args = parse_args([])
    assert (
        args.qk_norm
        and not args.flip
        and not args.ema_warmup
        and args.t_mode == "masked"
        and args.feature_guidance == 30
    )


def test_newest_checkpoint_of_a_run_folder(small, tmp_path):
    """It is recorded by its name, so that resuming with another one is seen."""
    (tmp_path / "run").mkdir()
    for name in ("0000001.pt", "0000010.pt"):
        save_teacher(tmp_path / "run" / "checkpoints" / name, network(name))
    args = parse_args(["--stage", "2", "--teacher", str(tmp_path / "run")])
    method = SelfTranscendence(args, {**NETWORK, "qk_norm": True, "learn_sigma": False}, Flow())
    assert args.teacher == str(tmp_path / "run" / "checkpoints" / "0000010.pt")
    assert torch.equal(
        method.frozen.blocks[0].mlp.fc1.weight, network("0000010.pt").blocks[0].mlp.fc1.weight
    )


def test_unfit_teachers_are_refused(small, tmp_path):
    def refused(words, path=None, flags=(), **changes):
        with pytest.raises(ValueError, match=words) as error:
            small(2, *([] if path is None else ["--teacher", str(path)]), *flags, **changes)
        assert "\n" not in str(error.value)

    with pytest.raises(ValueError, match="--stage 2 needs --teacher"):
        SelfTranscendence(parse_args(["--stage", "2"]), {**NETWORK, "qk_norm": True}, Flow())
    refused("no such file or folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no checkpoint in this folder", tmp_path / "empty")
    (tmp_path / "text.pt").write_text("hello")
    refused("cannot be read", tmp_path / "text.pt")
    torch.save({"ema": {}}, tmp_path / "other.pt")
    refused("not a checkpoint of the training scripts", tmp_path / "other.pt")
    damaged = bytearray(
        Path(save_teacher(tmp_path / "damaged.pt", network("weights"))).read_bytes()
    )
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(damaged)
    refused("wrong checksum", tmp_path / "damaged.pt")
    without = torch.load(
        save_teacher(tmp_path / "without.pt", network("weights")), weights_only=True
    )
    without["args"]["label_drop"] = 0
    torch.save(without, tmp_path / "without.pt")
    refused("no unconditional features", tmp_path / "without.pt")
    small(2, "--teacher", str(tmp_path / "without.pt"), "--feature-guidance", "1")
    without["args"] |= {"label_drop": 0.1, "vae_hash": "abc"}
    torch.save(without, tmp_path / "latent.pt")
    refused(r"VAE abc \(here None\)", tmp_path / "latent.pt")
    refused(r"qk_norm True \(here False\)", flags=["--no-qk-norm"])
    refused(r"hidden_size 32 \(here 16\)", hidden_size=16)
    refused(r"depth 6 \(here 8\)", depth=8)
    refused(r"num_classes 10 \(here 4\)", num_classes=4)
    refused(
        r"diffusion gvp \(here flow\)",
        save_teacher(tmp_path / "gvp.pt", network("weights"), diffusion="gvp"),
    )
    masked = network("weights", cls=MaskedDiT, decoder=(1, 16, 2))
    refused(r"decoder \[1, 16, 2\] \(here None\)", save_teacher(tmp_path / "masked.pt", masked))


@pytest.mark.parametrize(
    "stage,flags,words",
    [
        (1, ["--diffusion", "edm"], "flow or gvp"),
        (2, ["--diffusion", "ddpm"], "flow or gvp"),
        (1, ["--student-block", "7"], "--student-block 7: need blocks from 1 to 6"),
        (1, ["--student-block", "0"], "--student-block 0: need blocks from 1 to 6"),
        (2, ["--student-block", "7"], "need blocks from 1 to 6"),
        (2, ["--teacher-block", "0"], "--teacher-block 0: need blocks from 1 to 6"),
        (2, ["--teacher-block", "7"], "need blocks from 1 to 6"),
        (1, ["--t-range", "0.7", "0.4"], "0 <= LOW <= HIGH <= 1"),
        (1, ["--t-range", "-0.1", "0.4"], "0 <= LOW <= HIGH <= 1"),
        (2, ["--t-range", "0.5", "1.1"], "0 <= LOW <= HIGH <= 1"),
        (2, ["--t-range", "nan", "1"], "0 <= LOW <= HIGH <= 1"),
        (1, ["--teacher", "x.pt"], "--teacher belongs to stage 2"),
        (1, ["--teacher-block", "3"], "--teacher-block belongs to stage 2"),
        (1, ["--stop-step", "10"], "--stop-step belongs to stage 2"),
        (2, ["--stage1-target", "x0"], "--stage1-target belongs to stage 1"),
    ],
)
def test_impossible_flags_are_refused(small, stage, flags, words):
    with pytest.raises(ValueError, match=words):
        small(stage, *flags)


def test_both_stages_from_the_command_line(tmp_path):
    """Stage 2 interrupted before and after its stop and resumed is bitwise the same; its checkpoints do not hold the teacher."""
    run_in_process("train_selftranscendence", tmp_path / "one", "--steps", "2")
    flags = ["--steps", "6", "--stage", "2", "--teacher", str(tmp_path / "one"), "--stop-step", "4"]
    run_in_process("train_selftranscendence", tmp_path / "a", *flags)
    for stop in (2, 5):
        run_in_process("train_selftranscendence", tmp_path / "b", *flags, interrupt_at=stop)
    run_in_process("train_selftranscendence", tmp_path / "b", *flags)
    a, b = checkpoint(tmp_path / "a", 6), checkpoint(tmp_path / "b", 6)
    for part in ("model", "ema", "method", "optimizer", "step", "log"):
        assert_same(a[part], b[part], part)
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")
    assert set(a["method"]) == {f"head.{k}.{p}" for k in (0, 2, 4) for p in ("weight", "bias")}
    assert a["args"]["teacher"].endswith("0000002.pt")
