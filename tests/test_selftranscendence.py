"""train_selftranscendence.py's method against the values of the official code, and its rules."""

import math

import pytest
import torch
from conftest import NETWORK, EvalGolden, close, fill, one_by_one, save_teacher, small, watch, words

from diffusion import Flow
from models import DiT, UserError, load_official, parse_model, position_embedding
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
def test_networks(tmp_path, form):
    for stage in (1, 2):
        g = EvalGolden(f"selftrans_stage{stage}{form}")
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
def test_losses(tmp_path, form, stage):
    """Both stages share a case of the manifest: each checks its own outputs, all of them."""
    g = EvalGolden(f"selftrans_loss{form}")
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

TIMES = torch.tensor([0.1, 0.4, 0.55, 0.7, 0.93])
INSIDE = torch.tensor([0.0, 1, 1, 1, 0])


def network(salt):
    return fill(DiT(**{**NETWORK, "depth": 6, "qk_norm": True}), salt)


@pytest.fixture
def make(tmp_path):
    """make(stage, flags): the method on a small network; the teacher's weights and EMA differ."""

    def make(stage, flags=""):
        if stage == 2 and "--teacher " not in flags:
            file = tmp_path / "teacher.pt"
            flags += f" --teacher {save_teacher(file, network('weights'), network('average'))}"
        return small("train_selftranscendence", f"--stage {stage} {flags}")

    return make


def batch(kept=(1.0, 1.0, 1.0, 1.0, 1.0)):
    """Images, labels and draws; the default drops no label."""
    x0, noise = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = {"t": TIMES, "noise": noise, "drop": torch.tensor(kept)}
    return (x0, torch.tensor([0, 3, 9, 1, 4])), draws


@pytest.mark.parametrize(
    "size, blocks, stop, width",
    [("S", (6, 8), 100_000, 768), ("B", (6, 8), 100_000, 2048), ("XL", (14, 18), 50_000, 2048)],
)
def test_published_blocks_stop_and_width(size, blocks, stop, width, monkeypatch):
    """Details 2, 3 and 5 of the script; stage 1: block 2."""
    monkeypatch.setattr(SelfTranscendence, "load_teacher", lambda self, args: None)
    shape = {"input_size": 32, "in_channels": 4, "num_classes": 10, **parse_model(f"SiT-{size}/2")}
    with torch.device("meta"):
        one, two = (
            SelfTranscendence(parse_args(["--stage", stage]), shape, Flow()) for stage in "12"
        )
    assert (one.student_block, one.stop_step) == (2, math.inf)
    assert (two.student_block, two.teacher_block, two.stop_step) == (*blocks, stop)
    assert one.head[0].out_features == two.head[0].out_features == width


@pytest.mark.parametrize("kind", ["flow", "gvp"])
def test_velocity_and_x0_target_are_one_error_in_two_units(make, kind):
    """x_0 = x_t - t v on the linear path: an error of v counts t^2 times; gvp (2 s / pi)^2."""
    images, draws = batch()
    values = []
    for target in ("velocity", "x0"):
        method = make(1, f"--diffusion {kind} --t-range 0 1 --stage1-target {target}")
        values.append(one_by_one(method, *images, draws, "align"))
    factor = TIMES if kind == "flow" else (math.pi / 2 * TIMES).sin() * 2 / math.pi
    close(values[1], values[0] * factor.square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_t_modes(make, stage):
    """Values by definition, and the gradient each image gets, seen through its own pixels."""
    images, draws = batch()

    def align(mode, t=TIMES, t_range="0.4 0.7"):
        method = make(stage, f"--t-mode {mode} --t-range {t_range}")
        x0 = images[0].clone().requires_grad_()
        value = method(x0, images[1], **{**draws, "t": t})["align"]
        value.backward()
        head = sum(p.grad.abs().sum() for p in method.head.parameters())  # DDP needs all of them
        return value.detach(), x0.grad.flatten(1).abs().sum(1), head

    each = one_by_one(make(stage, "--t-range 0 1"), *images, draws, "align")
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
        ours, reach, head = align(mode, torch.tensor([0.1, 0.2, 0.3, 0.8, 0.9]))
        assert ours == 0 and (reach == 0).all() and head == 0


def test_teacher_is_frozen_and_no_part_of_the_state(make):
    method, averaged = make(2), make(2, "--teacher-weights ema")
    for chosen, other in ((method, "weights"), (averaged, "average")):
        stored, held = network(other).state_dict(), chosen.frozen[0].state_dict()
        assert all(torch.equal(v, stored[name]) for name, v in held.items())
    assert not any(p.requires_grad for p in method.frozen[0].parameters())
    parts = {name.split(".")[0] for name in method.state_dict()}
    assert parts == {"model", "ema", "head"}


@pytest.mark.parametrize("mode, rows", [("masked", [1, 2, 3]), ("all", [0, 1, 2, 3, 4])])
@pytest.mark.parametrize("policy", ["conditional", "unconditional", "skip"])
def test_what_the_teacher_sees_and_what_counts(make, mode, rows, policy):
    """[conditional; null], null label 10 of 10 classes; images out of range cost nothing."""
    kept = torch.tensor([0.0, 1, 0, 1, 1])
    (x0, y), draws = batch(kept.tolist())
    method = make(2, f"--t-mode {mode} --drop-target {policy}")
    seen = watch(method, method.frozen[0])
    terms = method(x0, y, **draws)
    sent = torch.where(kept > 0, y, 10)
    assert torch.equal(seen["y_student"], sent)
    labels = (sent if policy == "unconditional" else y)[rows]
    null = torch.full_like(labels, 10)
    assert torch.equal(seen["y"], torch.cat([labels, null]))
    x_t, t = seen["x_t"][rows], TIMES[rows]
    assert torch.equal(seen["x"], x_t.repeat(2, 1, 1, 1)) and torch.equal(seen["t"], t.repeat(2))
    f_c, f_u = seen["tokens"].chunk(2)
    with torch.no_grad():
        for half, sent in ((f_c, labels), (f_u, null)):
            close(half, network("weights").tokens_after(x_t, t, sent, 4), rtol=1e-4, atol=1e-5)
    f_g = f_u + 30 * (f_c - f_u)
    error = (seen["projected"] - f_g).square().flatten(1).mean(1)
    if policy == "skip":
        error = error * kept[rows]
    expected = error.sum() / 5 if mode == "masked" else 0.3 * error.mean()
    close(terms["align"], expected, rtol=1e-4, atol=0)
    close(terms["guidance_gap"], (f_c - f_u).norm() / f_u.norm())
    close(terms["guided_norm"], f_g.norm() / f_u.norm(), rtol=1e-4, atol=0)


def test_stop_step(make):
    """From it on L_gen alone, no teacher pass, the same keys; the teacher is freed."""
    method, (images, draws) = make(2, "--stop-step 5"), batch()
    seen = watch(method, method.frozen[0])
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


def test_teacher_precision(make):
    """Under bf16 autocast the teacher runs in fp32 unless asked otherwise."""
    images, draws = batch()
    tokens = {}
    for precision, outer in (("fp32", False), ("fp32", True), ("bf16", True)):
        method = make(2, f"--teacher-precision {precision}")
        seen = watch(method, method.frozen[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            method(*images, **draws)
        tokens[precision, outer] = seen["tokens"]
    assert torch.equal(tokens["fp32", True], tokens["fp32", False])
    assert not torch.equal(tokens["bf16", True], tokens["fp32", False])


UNFIT_TEACHERS = {"--label-drop": {"label_drop": 0}, "diffusion": {"diffusion": "gvp"}}
UNFIT_TEACHERS["VAE"] = {"vae_hash": "of another one"}


@pytest.mark.parametrize("name", UNFIT_TEACHERS)
def test_unfit_teachers_are_refused(make, tmp_path, name):
    """Of another network: see test_bad_input.py."""
    file = save_teacher(tmp_path / "unfit.pt", network("weights"), **UNFIT_TEACHERS[name])
    with pytest.raises(UserError, match=name):
        make(2, f"--teacher {file}")
