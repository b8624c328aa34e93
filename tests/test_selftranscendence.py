"""train_selftranscendence.py's method against the values of the official code, and its rules."""

import math

import pytest
import torch
from conftest import (
    NETWORK,
    assert_gradients,
    assert_plain,
    close,
    fill,
    one_by_one,
    save_teacher,
    words,
)

from diffusion import Flow, make_diffusion
from models import DiT, UserError, load_official, position_embedding
from train_selftranscendence import LOGGED, SelfTranscendence, parse_args, window_mean


def official(golden, tmp_path, which, salt=None):
    """The official state dict of a case, and the network that load_official makes of it."""
    state = golden.weights(which, salt)
    state["pos_embed"] = position_embedding(48, 4)
    torch.save({"model": state, "ema": state}, tmp_path / "official.pt")
    model, notes = load_official(tmp_path / "official.pt", "repa", golden.config["num_heads"])
    assert ("projectors_final" in str(notes)) == ("stage1" in which)
    return state, model


def method_for(golden, tmp_path, stage, which, flags=""):
    """The method with the golden's weights; the official last projector is the head's layer 6."""
    state, model = official(golden, tmp_path, which)
    flags = f"--stage {stage} --student-block 2 --head-width 40 {flags}"
    if stage == 2:
        teacher = official(golden, tmp_path, which, golden.config.get("teacher_salt"))[1]
        file = save_teacher(tmp_path / "teacher.pt", teacher)
        flags += f" --teacher {file} --teacher-block 3"
    method = SelfTranscendence(parse_args(words(flags)), model.config, Flow())
    method.model.load_state_dict(model.state_dict())
    method.head.load_state_dict(
        {
            name.replace("projectors_final.linear", "6").removeprefix("projectors."): value
            for name, value in state.items()
            if name.startswith("projectors")
        }
    )
    return method


FORMS = pytest.mark.parametrize("form", ["", "_noqknorm"])


@FORMS
def test_networks(eval_golden, tmp_path, form):
    for stage in (1, 2):
        g = eval_golden(f"selftrans_stage{stage}{form}")
        method = method_for(g, tmp_path, stage, f"selftrans_stage{stage}{form}")
        inputs = g.inputs["x"], g.inputs["t"], g.inputs["y"]
        with torch.no_grad():
            out, features = method.model(*inputs, features=(2,))
            g.check("output", out)
            projected = method.head(features[2])
            if stage == 1:
                g.check("shallow_prediction", method.model.unpatchify(projected))
            else:
                raw = method.frozen[0].tokens_after(*inputs, 3)
                for name, tokens in (("projected", projected), ("raw", raw)):
                    g.check(f"{name}_features", tokens[:, ::3, ::5])
                    g.check(f"{name}_norm", tokens.flatten(1).norm(dim=1))
        g.all_checked()


@FORMS
@pytest.mark.parametrize("stage", [1, 2])
def test_losses(eval_golden, tmp_path, form, stage):
    """Both stages share a case of the manifest: each checks its own outputs, all of them."""
    g = eval_golden(f"selftrans_loss{form}")
    images, labels = g.inputs["images"], g.inputs["labels"]
    draws = {"t": g.inputs["t"], "noise": g.inputs["noise"], "drop": torch.ones(5)}
    which, name = f"selftrans_stage{stage}{form}", f"stage{stage}"

    def make(flags):
        return method_for(g, tmp_path, stage, which, flags)

    masked, always = make("--t-range 0.4 0.7"), make("--t-range 0 1")
    unmasked = one_by_one(always, images, labels, draws, "align")
    per_image = one_by_one(masked, images, labels, draws, "align")
    g.check(f"{name}_denoising", one_by_one(masked, images, labels, draws, "denoise"))
    g.check(f"{name}_aux_unmasked", unmasked)
    g.check(f"{name}_aux_per_sample_masked", per_image)
    inside = (per_image == unmasked).float()
    assert inside.tolist() == [0, 1, 1, 1, 0]  # both ends of the range count
    published = [
        [window_mean(v[None], m[None], torch.ones(1), "released", 0.3) for v in unmasked]
        for m in inside
    ]
    g.check(f"{name}_aux_as_published", torch.tensor(published).view(5, 1, 1, 5))
    released = make("--t-mode released")
    terms = released(images, labels, **draws)
    close(terms["loss"], terms["denoise"] + 0.5 * terms["align"])
    means = [terms["denoise"], terms["align"]]
    means.insert(1, always(images, labels, **draws)["align"])
    means.append(masked(images, labels, **draws)["align"])
    g.check(f"{name}_means", torch.stack(means))
    terms["loss"].backward()
    head, blocks = released.head, released.model.blocks
    layers = [head[0], blocks[0].attn.qkv, head[6 if stage == 1 else 4], blocks[-1].mlp.fc1]
    norms = torch.stack([layer.weight.grad.norm() for layer in layers])
    g.check(f"{name}_grad_norms", norms, rtol=1e-3)
    if stage == 2:
        conditional = make("--t-range 0 1 --feature-guidance 1")
        alone = one_by_one(conditional, images, labels, draws, "align")
        g.check("stage2_aux_unmasked_cfg1", alone)
    g.all_checked(*(other for other in g.outputs if not other.startswith(name)))


# The method's own rules

SHAPE = {**NETWORK, "depth": 6, "qk_norm": True}
TEACHER = 4  # the teacher's default block at depth 6
TIMES = torch.tensor([0.1, 0.4, 0.55, 0.7, 0.93])
INSIDE = torch.tensor([0.0, 1, 1, 1, 0])
EARLY = torch.full((5,), 0.1)  # no image in range


def network(salt, **changes):
    return fill(DiT(**{**SHAPE, **changes}), salt)


@pytest.fixture
def small(tmp_path):
    """small(stage, flags): the method on a small network; the teacher's weights and EMA differ."""

    def make(stage, flags="", **changes):
        args = parse_args(words("--stage", stage, flags))
        if stage == 2 and args.teacher is None and args.align_weight > 0:
            teacher = network("weights"), network("average")
            file = save_teacher(tmp_path / "teacher.pt", *teacher, diffusion=args.diffusion)
            args.teacher = str(file)
        diffusion = make_diffusion(args.diffusion)
        torch.manual_seed(0)
        config = {**SHAPE, "qk_norm": args.qk_norm, "learn_sigma": diffusion.learned_variance}
        method = SelfTranscendence(args, {**config, **changes}, diffusion)
        fill(method.model, "student")
        return method

    return make


def batch(drop=(1.0,) * 5, t=TIMES):
    """Images, labels and draws; the default drops no label."""
    x0, noise = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = {"t": t, "noise": noise, "drop": torch.tensor(drop)}
    return (x0, torch.tensor([0, 3, 9, 1, 4])), draws


def watch(method):
    """Records the teacher's inputs and tokens, the student's labels and projected features."""
    seen = {"calls": 0}
    tokens_after = method.frozen[0].tokens_after

    def teacher(x, t, y, block):
        seen.update(x=x, t=t, y=y, tokens=tokens_after(x, t, y, block), calls=seen["calls"] + 1)
        return seen["tokens"]

    def student(module, inputs, output):
        seen.update(x_t=inputs[0], y_student=inputs[2])

    method.frozen[0].tokens_after = teacher
    method.head.register_forward_hook(lambda module, inputs, output: seen.update(projected=output))
    method.model.register_forward_hook(student)
    return seen


def guided(tokens, scale=30):
    conditional, null = tokens.chunk(2)
    return null + scale * (conditional - null)


def errors(seen):
    return (seen["projected"] - guided(seen["tokens"])).square().flatten(1).mean(1)


def gradients(method):
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage, block", [(1, 2), (1, 4), (2, 3), (2, 5)])
def test_the_term_reaches_the_head_and_the_blocks_up_to_it(small, stage, block):
    """Later blocks and the last layer learn from L_gen alone."""
    method, (images, draws) = small(stage, f"--student-block {block}"), batch()
    method(*images, **draws)["align"].backward()
    later = ("model.final_layer", *(f"model.blocks.{k}." for k in range(block, 6)))
    for name, grad in gradients(method).items():
        reached = grad is not None and grad.abs().sum() > 0
        assert reached != name.startswith(later), name


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["flow", "gvp", "edm", "ddpm"])
def test_weight_zero_is_the_plain_model(small, stage, kind):
    """No head, no teacher, no file of one; loss and gradients bit for bit."""
    plain = small(stage, f"--diffusion {kind} --align-weight 0")
    assert not hasattr(plain, "head") and not plain.frozen
    images, draws = batch(drop=(0.5, 0.01, 0.5, 0.5, 0.5), t=plain.diffusion.draw_t(5, "cpu"))
    t = draws.pop("t")
    direct = assert_plain(plain, torch.tensor([0, 10, 9, 1, 4]), *images, t, draws)
    if kind in ("flow", "gvp"):
        method = small(stage, f"--diffusion {kind}")
        assert torch.equal(method(*images, t=t, **draws)["denoise"], direct)


@pytest.mark.parametrize("kind", ["flow", "gvp"])
def test_velocity_and_x0_target_are_one_error_in_two_units(small, kind):
    """x_0 = x_t - t v on the linear path: an error of v counts t^2 times; gvp (2 s / pi)^2."""
    images, draws = batch()
    values = []
    for target in ("velocity", "x0"):
        method = small(1, f"--diffusion {kind} --t-range 0 1 --stage1-target {target}")
        values.append(one_by_one(method, *images, draws, "align"))
    factor = TIMES if kind == "flow" else (math.pi / 2 * TIMES).sin() * 2 / math.pi
    close(values[1], values[0] * factor.square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_t_modes(small, stage):
    """Values by definition, and the gradient each image gets, seen through its own pixels."""
    images, draws = batch()

    def align(mode, t=TIMES, t_range="0.4 0.7"):
        method = small(stage, f"--t-mode {mode} --t-range {t_range}")
        x0 = images[0].clone().requires_grad_()
        value = method(x0, images[1], **{**draws, "t": t})["align"]
        value.backward()
        grads = [grad for grad in gradients(method).values() if grad is not None]
        return value.detach(), x0.grad.flatten(1).abs().sum(1), grads

    each = one_by_one(small(stage, "--t-range 0 1"), *images, draws, "align")
    everywhere = align("masked", t_range="0 1")
    close(everywhere[0], each.mean())
    for mode, value, weight in (
        ("masked", (each * INSIDE).mean(), INSIDE),
        ("selected", each[1:4].mean(), INSIDE / 0.6),
        ("all", 0.3 * each.mean(), torch.full((5,), 0.3)),
        ("released", 0.6 * each.mean(), torch.full((5,), 0.6)),
    ):
        ours, reach, _ = align(mode)
        close(ours, value)
        close(reach, weight * everywhere[1], rtol=1e-4, atol=0)
        assert (reach[weight == 0] == 0).all()
    for mode in ("masked", "selected", "released"):
        ours, reach, grads = align(mode, torch.tensor([0.1, 0.2, 0.3, 0.8, 0.9]))
        assert ours == 0 and (reach == 0).all() and all((grad == 0).all() for grad in grads)


def test_teacher_is_frozen_and_no_part_of_the_state(small):
    method, averaged = small(2), small(2, "--teacher-weights ema")
    for chosen, other in ((method, "weights"), (averaged, "average")):
        stored, held = network(other).state_dict(), chosen.frozen[0].state_dict()
        assert all(torch.equal(v, stored[name]) for name, v in held.items())
    assert not any(p.requires_grad for p in method.frozen[0].parameters())
    parts = {name.split(".")[0] for name in method.state_dict()}
    assert parts == {"model", "ema", "head"}


@pytest.mark.parametrize("mode, rows", [("masked", [1, 2, 3]), ("all", [0, 1, 2, 3, 4])])
def test_teacher_sees_the_same_noise_true_labels_and_the_null_label(small, mode, rows):
    """[conditional; null], null label 10 of 10 classes; only images that count."""
    method, (images, draws) = small(2, f"--t-mode {mode}"), batch(drop=(0.0,) * 5)
    seen = watch(method)
    terms = method(*images, **draws)
    x_t, t, y = seen["x_t"][rows], TIMES[rows], images[1][rows]
    assert seen["y_student"].tolist() == [10] * 5  # all dropped
    assert seen["y"].tolist() == y.tolist() + [10] * len(rows)  # none dropped
    assert torch.equal(seen["x"], x_t.repeat(2, 1, 1, 1)) and torch.equal(seen["t"], t.repeat(2))
    full = network("weights")
    with torch.no_grad():
        for half, sent in zip(seen["tokens"].chunk(2), (y, torch.full_like(y, 10))):
            features = full(x_t, t, sent, features=(TEACHER,))[1]
            close(half, features[TEACHER], rtol=1e-4, atol=1e-5)
    error = errors(seen)
    expected = error.sum() / 5 if mode == "masked" else 0.3 * error.mean()
    close(terms["align"], expected, rtol=1e-4, atol=0)
    f_c, f_u = seen["tokens"].chunk(2)
    close(terms["guidance_gap"], (f_c - f_u).norm() / f_u.norm())
    close(terms["guided_norm"], guided(seen["tokens"]).norm() / f_u.norm(), rtol=1e-4, atol=0)


def test_target_of_students_without_label(small):
    drop = (0.0, 1.0, 0.0, 1.0, 1.0)
    images, draws = batch(drop=drop, t=torch.full((5,), 0.5))
    for policy in ("conditional", "unconditional", "skip"):
        method = small(2, f"--drop-target {policy}")
        seen = watch(method)
        terms = method(*images, **draws)
        sent = [10, 3, 10, 1, 4]
        assert seen["y_student"].tolist() == sent
        expected = sent if policy == "unconditional" else images[1].tolist()
        assert seen["y"][:5].tolist() == expected
        error = errors(seen)
        mean = (error * torch.tensor(drop)).mean() if policy == "skip" else error.mean()
        close(terms["align"], mean, rtol=1e-4, atol=1e-5)


def test_images_out_of_range_cost_neither_head_nor_teacher(small):
    """None in range: one image goes through all the same, with weight 0, for its gradients."""
    for stage in (1, 2):
        method, (images, draws) = small(stage), batch()
        rows = []
        method.head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        for t in (TIMES, EARLY):
            method.zero_grad()
            method(*images, **{**draws, "t": t})["loss"].backward()
        assert rows == [3, 1]
        assert all((p.grad == 0).all() for p in method.head.parameters())


def test_stop_step(small):
    """From it on L_gen alone, no teacher pass, the same keys; the teacher is freed."""
    method, (images, draws) = small(2, "--stop-step 5"), batch()
    seen = watch(method)
    method.step = 4
    before = method(*images, **draws)
    close(before["loss"], before["denoise"] + 0.5 * before["align"])
    method.step = 5
    terms = method(*images, **draws)
    assert list(terms) == list(before) and before["align"] > 0 and seen["calls"] == 1
    assert torch.equal(terms["loss"], terms["denoise"]) and not any(terms[k] for k in LOGGED)
    method.after_step(3, 10)
    assert method.frozen
    method.after_step(4, 10)
    assert not method.frozen


MODES = [
    (1, "--t-mode masked --diffusion gvp"),
    (1, "--t-mode selected --stage1-target x0"),
    (1, "--t-mode released --no-qk-norm"),
    (2, "--t-mode selected --drop-target skip"),
    (2, "--t-mode all --drop-target unconditional"),
    (2, "--stop-step 0"),
]


@pytest.mark.parametrize("stage, flags", MODES)
def test_every_trainable_parameter_has_a_gradient_and_the_teacher_none(small, stage, flags):
    """Also where no image is in range or counted; then the head's are zero."""
    method, (images, draws) = small(stage, flags), batch()
    heads = tuple(f"head.{name}" for name, _ in method.head.named_parameters())
    for t, drop in ((TIMES, (1.0, 0.0, 1.0, 1.0, 1.0)), (EARLY, (0.0,) * 5)):
        method.zero_grad()
        terms = method(*images, **{**draws, "t": t, "drop": torch.tensor(drop)})
        terms["loss"].backward()
        assert all(torch.isfinite(v) for v in terms.values())
        unused = heads if terms["align"] == 0 else ()
        assert_gradients(method, unused=unused)


def test_teacher_precision(small):
    """Under bf16 autocast the teacher runs in fp32 unless asked otherwise; the loss always."""
    images, draws = batch()
    tokens = {}
    for precision, outer in (("fp32", False), ("fp32", True), ("bf16", True)):
        method = small(2, f"--teacher-precision {precision}")
        seen = watch(method)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            terms = method(*images, **draws)
        assert all(v.dtype == torch.float32 for v in terms.values())
        tokens[precision, outer] = seen["tokens"]
    assert torch.equal(tokens["fp32", True], tokens["fp32", False])
    assert not torch.equal(tokens["bf16", True], tokens["fp32", False])


SIZES = [
    ("Ti", (3, 4), 100_000, 256),
    ("S", (6, 8), 100_000, 768),
    ("B", (6, 8), 100_000, 2048),
    ("XL", (14, 18), 50_000, 2048),
]


UNFIT_TEACHERS = [  # what the message names, what the checkpoint says, the student
    ("--label-drop", {"label_drop": 0}, "", {}),
    ("qk_norm", {}, "--no-qk-norm", {}),
    ("hidden_size", {}, "", {"hidden_size": 16}),
    ("num_classes", {}, "", {"num_classes": 4}),
    ("diffusion", {"diffusion": "gvp"}, "", {}),
]


@pytest.mark.parametrize("name, about, flags, changes", UNFIT_TEACHERS)
def test_unfit_teachers_are_refused(small, tmp_path, name, about, flags, changes):
    file = save_teacher(tmp_path / "unfit.pt", network("weights"), **about)
    with pytest.raises(UserError, match=name):
        small(2, f"--teacher {file} {flags}", **changes)


UNFIT = ["--diffusion edm", "--t-range 0.7 0.4", "--stop-step 10", "--stage1-target x0 --stage 2"]


@pytest.mark.parametrize("flags", UNFIT)
def test_impossible_flags_are_refused(small, flags):
    with pytest.raises(UserError, match=flags.split()[0]):
        small(1, flags)
