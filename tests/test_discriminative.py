"""train_discriminative.py: SD-DiT's acceptance checks; teacher, centres and losses by hand."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import close, draws, fill, forwards, recipe_tensor, small

from train_discriminative import momentum_at

K = 24  # prototypes


def sd_dit(flags=""):
    """A small SD-DiT in the middle of a run, whose teacher has weights of its own, and draws."""
    method = small("train_discriminative", flags, depth=3)
    method.step = 6000  # nothing is frozen, and the teacher is no copy
    fill(method.head, "student")
    fill(method.teacher, "teacher")
    fill(method.teacher_head, "teacher")
    return method, *draws(method)


# The network


@pytest.mark.parametrize("summary", ["none", "token"])
def test_masking_leaves_the_kept_tokens_alone_and_hidden_places_are_raw(summary):
    method, x0, y, d = sd_dit(f"--summary {summary}")
    model, class_tokens = method.model, int(summary == "token")
    first, bridge = forwards(model.blocks[0]), forwards(model.decoder_layer)
    order = d["mask"].argsort(1)
    kept, hidden = (ids[:, :, None].expand(-1, -1, 32) for ids in (order[:, :15], order[:, 15:]))
    with torch.no_grad():
        out = model(x0, d["t"], y, order[:, :15])
        embedded = model.embed(x0)
        assert torch.equal(first[0][0][0][:, class_tokens:], embedded.gather(1, kept))
        assert torch.equal(bridge[0][0][0].gather(1, hidden), embedded.gather(1, hidden))
        close(model(x0, d["t"], y, order[:, :15].flip(1)), out, rtol=1e-4, atol=1e-5)
        everything = model(x0, d["t"], y, torch.arange(16).expand(4, 16))
        close(everything, model(x0, d["t"], y), rtol=1e-4, atol=1e-5)


# The losses


def literal_terms(method, student, teacher):
    """Tokens (M, D) of both -> every term: one token after the other, in float64."""
    args, result = method.args, {}
    start, end = args.teacher_temperature
    tau_t = start + (end - start) * min(1, method.step / args.temperature_steps)
    for k, kind in enumerate(method.kinds):
        centre = method.centre[k].double()
        logits = []
        for head, tokens in ((method.head, student[kind]), (method.teacher_head, teacher[kind])):
            vectors = head.mlp(F.layer_norm(tokens, (32,), eps=1e-6)).double()
            rows = F.normalize(head.weight.double(), dim=1)
            logits.append(F.normalize(vectors, dim=1) @ rows.T)
        cross, entropy, chosen = [], [], set()
        for z_s, z_t in zip(*logits):
            p_s = (z_s / args.student_temperature).softmax(0)
            p_t = ((z_t - centre) / tau_t).softmax(0)
            cross.append(-(p_t * p_s.log()).sum())
            entropy.append(-(p_t * p_t.log()).sum())
            chosen.add(p_t.argmax().item())
        cross, entropy = torch.stack(cross).mean(), torch.stack(entropy).mean()
        result[kind] = cross
        result[f"{kind}_entropy"] = entropy
        result[f"{kind}_kl"] = cross - entropy
        result[f"{kind}_used"] = torch.tensor(len(chosen) / K)
        result[f"{kind}_centre"] = centre.norm()
    return result


TOKEN = "--summary token"
MODES = {
    "default": "",
    "token": TOKEN,
    "unmasked": "--mask-ratio 0",
    "mean": "--summary mean",
    "visible": "--gen-tokens visible",
    "detached": "--detach-encoder",
    "no centring": "--no-centring",
    "null teacher": f"{TOKEN} --teacher-label null --no-shared-noise --teacher-sigma 0.1",
    "flow": "--diffusion flow",
}


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_loss_against_its_definition(flags):
    """Views, labels, tokens, terms and total, from the networks' own outputs."""
    method, x0, y, d = sd_dit(flags)
    method.centre.copy_(recipe_tensor("centre", "centre", tuple(method.centre.shape)))
    method.step = 50_000
    encoder, runs = method.teacher, forwards(method.model)
    table = encoder.y_embedder["embedding_table"]
    calls = [forwards(m) for m in (encoder.x_embedder, encoder.t_embedder, table)]
    last = forwards(encoder.blocks[-1])
    terms = method(x0, y, **d)
    teacher_inputs = [seen[0][0][0] for seen in calls]
    (out, features), teacher = runs[0][1], last[0][1]
    args, diffusion = method.args, method.diffusion
    sent = torch.where(d["drop"] < 0.1, 10, y)
    teacher_noise = d["noise"] if args.shared_noise else d["teacher_noise"]
    teacher_labels = sent if args.teacher_label == "same" else torch.full_like(y, 10)
    for seen, noise, t, labels in (
        (runs[0][0], d["noise"], d["t"], sent),
        (teacher_inputs, teacher_noise, torch.full((4,), args.teacher_sigma), teacher_labels),
    ):
        x_t, time = diffusion.net_inputs(diffusion.add_noise(x0, noise, t), t)
        assert torch.equal(seen[0], x_t) and torch.equal(seen[1], time)
        assert torch.equal(seen[2], labels)
    token = int(args.summary == "token")
    ids_keep = torch.arange(16).expand(4, 16)
    if args.mask_ratio > 0:
        ids_keep = d["mask"].argsort(1)[:, :12]
    student = features[3]
    visible = torch.cat([row[token:][ids] for row, ids in zip(teacher, ids_keep)])
    views = []
    for tokens, patches in ((student, student[:, token:].flatten(0, 1)), (teacher, visible)):
        summary = tokens[:, 0] if token else tokens.mean(1)
        views.append({"patch": patches, "class": summary})
    expected = literal_terms(method, *views)
    for name, value in expected.items():
        own = terms[name].double()
        close(own, value.double(), rtol=2e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
    loss = diffusion.loss(out, x0, d["noise"], d["t"])
    if args.gen_tokens == "visible":
        patches = F.unfold(loss, 2, stride=2).mT  # (4, 16, 12)
        loss = torch.cat([row[ids] for row, ids in zip(patches, ids_keep)])
    close(terms["denoise"], loss.mean(), rtol=1e-5, atol=1e-6)
    align = terms["patch"] + terms.get("class", 0)
    close(terms["loss"], terms["denoise"] + 0.1 * align)
    assert set(terms) == {"loss", "denoise", *expected}


# Teacher, centres, gradients


@pytest.mark.parametrize("flag, reached", [("--detach-encoder", False), ("", True)])
def test_detached_encoder_learns_from_the_discriminative_loss_only(flag, reached):
    """The denoising loss alone reaches decoder and conditioning, not the encoder."""
    method, x0, y, d = sd_dit(flag)
    method(x0, y, **d)["denoise"].backward()
    for name, parameter in method.model.named_parameters():
        has = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        shared = name.startswith(("decoder", "final_layer", "t_embedder", "y_embedder"))
        assert has == (reached or shared), name


def test_prototypes_are_frozen_at_first():
    method, x0, y, d = sd_dit("--freeze-steps 5")
    method.teacher_head.load_state_dict(method.head.state_dict())  # as at the start of a run
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
    before = method.head.weight.detach().clone()
    for step in range(6):
        method.step = step
        method(x0, y, **d)["loss"].backward()
        assert method.head.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(step, 100)
        assert torch.equal(method.head.weight, before) == (step < 5)
        assert torch.equal(method.teacher_head.weight, before) == (step < 5)
    moved = (method.head.weight - before).abs().max().item()
    assert moved < 0.2  # one learning rate: Adam's moments have seen real gradients all along


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_teacher_follows_the_student_head_included(schedule):
    flags = f"--teacher-momentum 0.9 --teacher-momentum-schedule {schedule} --freeze-steps 0"
    method, x0, y, d = sd_dit(f"{TOKEN} {flags}")
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    method(x0, y, **d)
    method.after_step(3, 10)
    m = momentum_at(3, 10, 0.9, schedule)
    for name, value in method.named_parameters():
        if name.startswith("teacher"):
            student = before[name.replace("teacher.", "model.").replace("teacher_", "")]
            close(value, m * before[name] + (1 - m) * student, rtol=1e-5, atol=1e-7)


def test_momentum_schedule_and_the_start():
    for step, momentum in ((0, 0.996), (50, 0.998), (100, 1)):
        assert math.isclose(momentum_at(step, 100, 0.996, "cosine"), momentum)
    method, x0, y, d = sd_dit()
    method.step = 0  # the teacher starts as the student, whatever that was loaded from
    method(x0, y, **d)
    for a, b in ((method.teacher, method.model), (method.teacher_head, method.head)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def teacher_means(method, x0, y, d):
    """Mean teacher logits (2, K) of visible patches and class token, by hand."""
    last = forwards(method.teacher.blocks[-1])
    method(x0, y, **d)
    tokens, ids_keep = last[0][1], d["mask"].argsort(1)[:, :12]
    patches = torch.cat([row[1:][ids] for row, ids in zip(tokens, ids_keep)])
    heads = [method.teacher_head(view) for view in (patches, tokens[:, 0])]
    return torch.stack([(vectors @ rows.T).mean(0) for vectors, rows in heads]).detach()


@pytest.mark.parametrize("world", [1, 2])
def test_centres_follow_the_mean_logits_of_all_micro_batches_and_processes(monkeypatch, world):
    method, x0, y, d = sd_dit(TOKEN)
    monkeypatch.setattr(dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "all_reduce", lambda mean: mean.mul_(world))  # all have the same
    for _ in range(2):  # steps: the sums begin anew
        start = method.centre.clone()
        mean = teacher_means(method, x0, y, d)
        mean = (mean + teacher_means(method, x0.flip(0), y, d)) / 2  # two micro-batches
        method.after_step(10_000, 20_000)
        close(method.centre, 0.9 * start + 0.1 * mean, rtol=1e-5, atol=1e-6)
