"""train_discriminative.py: SD-DiT's acceptance checks; teacher, centres and losses by hand."""

import math

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import (
    NETWORK,
    assert_gradients,
    assert_plain,
    close,
    fill,
    free_port,
    method_state,
    network_state,
    process_group,
    recipe_tensor,
    train,
    words,
)

from diffusion import EDM, make_diffusion
from models import MaskedDiT, parse_model
from train_discriminative import (
    Head,
    SDDiT,
    chunked_cross_entropy,
    cross_entropy,
    momentum_at,
    parse_args,
)

K = 24  # prototypes


def small(flags="", teacher="teacher"):
    """A small SD-DiT whose teacher has its own weights, or the student's; nothing is frozen."""
    args = parse_args(words("--decoder 2 16 2 --head-width 20 --prototypes", K, flags))
    torch.manual_seed(0)
    method = SDDiT(args, NETWORK, make_diffusion(args.diffusion))
    method.step = args.freeze_steps
    fill(method.model, "student")
    if args.align_weight > 0:
        fill(method.head, "student")
        fill(method.teacher, teacher)
        fill(method.teacher_head, teacher)
    return method


def draws(n=4):
    generator = torch.Generator().manual_seed(0)
    x0, noise, other = torch.randn(3, n, 3, 8, 8, generator=generator)
    t, drop = torch.rand(2, n, generator=generator)
    drop[1] = 0.05  # one label is dropped
    mask = torch.rand(n, 16, generator=generator)
    fixed = {"noise": noise, "teacher_noise": other, "t": t, "drop": drop, "mask": mask}
    return x0, torch.arange(n) % 10, fixed


def forwards(module):
    """What a module is given and returns: a list that grows."""
    seen = []
    module.register_forward_hook(lambda m, inputs, output: seen.append((inputs, output)))
    return seen


def encodings(network):
    """The same for the calls of a network's `encode`."""
    seen = []
    encode = network.encode

    def recorded(*inputs):
        seen.append((inputs, encode(*inputs)))
        return seen[-1][1]

    network.encode = recorded
    return seen


def network(**options):
    model = MaskedDiT(decoder=(2, 16, 2), fill="noisy_tokens", **options, **NETWORK)
    return fill(model, "student")


# The network


@pytest.mark.parametrize("class_token", [False, True])
def test_identity_encoder_puts_every_token_back(class_token):
    """A fresh encoder is the identity: the bridge sees all tokens in place, for any mask."""
    torch.manual_seed(0)
    model = MaskedDiT(decoder=(2, 16, 2), fill="noisy_tokens", class_token=class_token, **NETWORK)
    x0, y, d = draws()
    seen = forwards(model.decoder_layer)
    order = d["mask"].argsort(1)
    for ids_keep in (None, order[:, :12], order[:, :1], order):
        model(x0, d["t"], y, ids_keep)
        assert torch.equal(seen[-1][0][0], model.embed(x0))


@pytest.mark.parametrize("class_token", [False, True])
def test_masking_leaves_the_kept_tokens_alone_and_hidden_places_are_raw(class_token):
    model, (x0, y, d) = network(class_token=class_token), draws()
    first, bridge = forwards(model.blocks[0]), forwards(model.decoder_layer)
    order = d["mask"].argsort(1)
    ids_keep, ids_hidden = order[:, :15], order[:, 15:]
    with torch.no_grad():
        out = model(x0, d["t"], y, ids_keep)
        embedded, entering = model.embed(x0), first[0][0][0][:, int(class_token) :]
        assert torch.equal(entering, embedded.gather(1, ids_keep[:, :, None].expand(-1, -1, 32)))
        hidden = ids_hidden[:, :, None].expand(-1, -1, 32)
        assert torch.equal(bridge[0][0][0].gather(1, hidden), embedded.gather(1, hidden))
        reordered = model(x0, d["t"], y, ids_keep.flip(1))
        close(reordered, out, rtol=1e-4, atol=1e-5)
        places = torch.zeros(4, 16).scatter(1, ids_hidden, 1.0).reshape(4, 1, 4, 4)
        pixels = places.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert not torch.equal(model(x0 + 0.1 * pixels, d["t"], y, ids_keep), out)
        everything = model(x0, d["t"], y, torch.arange(16).expand(4, 16))
        close(everything, model(x0, d["t"], y), rtol=1e-4, atol=1e-5)


def test_parameter_counts():
    """XL with the 8 x 512 x 16 decoder: 730.1 M, as MaskDiT; and the head."""
    shape = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    with torch.device("meta"):
        model = MaskedDiT(fill="noisy_tokens", class_token=True, **shape, **parse_model("DiT-XL/2"))
        head = Head(384, 2048, 8192)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - 730.1) < 0.1
    count = sum(p.numel() for p in head.mlp.parameters())
    assert count == 385 * 2048 + 2049 * 2048 + 2049 * 256 and head.weight.shape == (8192, 256)


# The losses


@pytest.mark.parametrize("summary", ["token", "none"])
def test_with_its_terms_off_it_is_plain_edm(summary):
    method = small(f"--align-weight 0 --mask-ratio 0 --summary {summary}")
    x0, y, d = draws()
    assert not hasattr(method, "head") and not hasattr(method, "teacher")
    t = d.pop("t")
    direct = assert_plain(method, torch.where(d["drop"] < 0.1, 10, y), x0, y, t, d)
    full = small(f"--mask-ratio 0 --summary {summary}")(x0, y, t=t, **d)
    assert torch.equal(full["denoise"], direct)
    method.after_step(0, 10)


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


MODES = {
    "default": "",
    "unmasked": "--mask-ratio 0",
    "mean": "--summary mean",
    "none": "--summary none",
    "visible": "--gen-tokens visible",
    "detached": "--detach-encoder",
    "no centring": "--no-centring",
    "null teacher": "--teacher-label null --no-shared-noise --teacher-sigma 0.1",
    "flow": "--diffusion flow",
}


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_loss_against_its_definition(flags):
    """Views, labels, tokens, terms and total, from the networks' own outputs."""
    method, (x0, y, d) = small(flags), draws()
    method.centre.copy_(recipe_tensor("centre", "centre", tuple(method.centre.shape)))
    method.step = 50_000
    calls, runs = encodings(method.teacher), forwards(method.model)
    terms = method(x0, y, **d)
    args, diffusion = method.args, method.diffusion
    sent = torch.where(d["drop"] < 0.1, 10, y)
    assert (sent == 10).sum() >= 1
    teacher_noise = d["noise"] if args.shared_noise else d["teacher_noise"]
    teacher_labels = sent if args.teacher_label == "same" else torch.full_like(y, 10)
    for seen, noise, t, labels in (
        (runs[0][0], d["noise"], d["t"], sent),
        (calls[0][0], teacher_noise, torch.full((4,), args.teacher_sigma), teacher_labels),
    ):
        x_t, time = diffusion.net_inputs(diffusion.add_noise(x0, noise, t), t)
        assert torch.equal(seen[0], x_t) and torch.equal(seen[1], time)
        assert torch.equal(seen[2], labels)
    token = int(args.summary == "token")
    ids_keep = torch.arange(16).expand(4, 16)
    if args.mask_ratio > 0:
        ids_keep = d["mask"].argsort(1)[:, :12]
    (out, features), teacher = runs[0][1], calls[0][1]
    student = features[3]
    assert student.shape == (4, ids_keep.shape[1] + token, 32)
    assert teacher.shape == (4, 16 + token, 32)
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


def test_same_view_same_network_gives_the_entropy():
    """One noise level, no mask, equal temperatures, no centre: H is the entropy of P_S."""
    flags = "--mask-ratio 0 --teacher-sigma 0.5 --teacher-temperature 0.1 0.1 --no-centring"
    method, (x0, y, d) = small(flags, teacher="student"), draws()
    runs = forwards(method.model)
    terms = method(x0, y, **{**d, "t": torch.full((4,), 0.5)})
    vectors, prototypes = method.head(runs[0][1][1][3][:, 1:].flatten(0, 1))
    p = (vectors @ prototypes.T / 0.1).softmax(1)
    close(terms["patch"], -(p * p.log()).sum(1).mean(), rtol=1e-5, atol=1e-6)
    for kind in ("patch", "class"):
        assert terms[f"{kind}_kl"].abs() < 1e-5
        assert torch.isclose(terms[kind], terms[f"{kind}_entropy"], rtol=1e-5)


def test_head_rows_are_unit_vectors_and_logits_are_cosines():
    torch.manual_seed(0)
    head = Head(32, 20, K)
    assert 0.015 < head.mlp[0].weight.std() < 0.025 and head.mlp[0].bias.abs().max() == 0
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    for _ in range(3):
        vectors, prototypes = head(10 * torch.randn(50, 32))
        close(prototypes.norm(dim=1), torch.ones(K))
        assert (vectors @ prototypes.T).abs().max() <= 1 + 1e-6
        optimizer.zero_grad()
        (vectors @ prototypes.T).square().sum().backward()
        optimizer.step()
    ramp = torch.arange(32.0)[None]
    assert torch.allclose(head(ramp + 3)[0], head(ramp)[0], atol=1e-4)  # LayerNorm


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunks_change_nothing(rows):
    generator = torch.Generator().manual_seed(0)
    vectors = [F.normalize(torch.randn(n, 256, generator=generator), dim=1) for n in (40, 40, K, K)]
    student, teacher, prototypes, others = vectors
    centre, results = 0.1 * torch.randn(K, generator=generator), []
    for function, options in ((cross_entropy, {}), (chunked_cross_entropy, {"rows": rows})):
        leaves = [student.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        out = function(leaves[0], teacher, leaves[1], others, centre, 0.1, 0.05, **options)
        out[0].mean().backward()
        results.append([*(o.detach() for o in out), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results):
        close(a, b, rtol=1e-5, atol=1e-7)


def test_bf16_keeps_losses_in_fp32_and_close():
    method, (x0, y, d) = small(), draws()
    exact = method(x0, y, **d)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(x0, y, **d)
    terms["loss"].backward()
    assert all(v.dtype == torch.float32 for v in (*terms.values(), method.mean_logits))
    for name in ("loss", "denoise", "patch", "class"):
        close(terms[name], exact[name], rtol=0.05, atol=0.05)


# Teacher, centres, gradients


@pytest.mark.parametrize("flags", [*MODES.values(), "--align-weight 0"], ids=[*MODES, "off"])
def test_every_trainable_parameter_has_a_gradient_and_the_teacher_none(flags):
    method, (x0, y, d) = small(flags), draws()
    method(x0, y, **d)["loss"].backward()
    assert_gradients(method, frozen=("ema.", "teacher"))
    if hasattr(method, "teacher"):  # an encoder only
        assert not any(n.startswith(("decoder", "final")) for n in method.teacher.state_dict())


@pytest.mark.parametrize("flag, reached", [("--detach-encoder", False), ("", True)])
def test_detached_encoder_learns_from_the_discriminative_loss_only(flag, reached):
    """The denoising loss alone reaches decoder and conditioning, not the encoder."""
    method, (x0, y, d) = small(flag), draws()
    method(x0, y, **d)["denoise"].backward()
    for name, parameter in method.model.named_parameters():
        has = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        shared = name.startswith(("decoder", "final_layer", "t_embedder", "y_embedder"))
        assert has == (reached or shared), name


def test_prototypes_are_frozen_at_first():
    method, (x0, y, d) = small("--freeze-steps 5"), draws()
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
    flags = f"--freeze-steps 0 --teacher-momentum 0.9 --teacher-momentum-schedule {schedule}"
    method, (x0, y, d) = small(flags), draws()
    m = momentum_at(3, 10, 0.9, schedule)
    expected = {}
    for teacher, student in (("teacher", method.model), ("teacher_head", method.head)):
        for name, value in getattr(method, teacher).named_parameters():
            own = student.get_parameter(name).detach()
            expected[f"{teacher}.{name}"] = m * value + (1 - m) * own
    student = {name: value.clone() for name, value in method.model.state_dict().items()}
    method(x0, y, **d)
    method.after_step(3, 10)
    for name, value in expected.items():
        close(method.get_parameter(name), value, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(v, student[k]) for k, v in method.model.state_dict().items())
    assert {"teacher_head.weight", "teacher.class_token"} <= expected.keys()


def test_momentum_schedules_and_the_start():
    assert momentum_at(0, 100, 0.996, "cosine") == 0.996
    assert math.isclose(momentum_at(50, 100, 0.996, "cosine"), 0.998)
    assert math.isclose(momentum_at(100, 100, 0.996, "cosine"), 1)
    assert momentum_at(70, 100, 0.9, "constant") == 0.9
    method = SDDiT(parse_args(words("--decoder 2 16 2 --prototypes 8")), NETWORK, EDM())
    for a, b in ((method.teacher, method.model), (method.teacher_head, method.head)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def teacher_means(method, x0, y, d):
    """Mean teacher logits (2, K) of visible patches and class token, by hand."""
    calls = encodings(method.teacher)
    method(x0, y, **d)
    views = method.compared(calls[0][1], d["mask"].argsort(1)[:, :12])
    del method.teacher.encode  # the recorder
    heads = [method.teacher_head(views[kind]) for kind in ("patch", "class")]
    return torch.stack([(vectors @ rows.T).mean(0) for vectors, rows in heads]).detach()


def test_centres_follow_the_mean_logits_of_all_micro_batches():
    method, (x0, y, d) = small(), draws()
    start = recipe_tensor("centre", "centre", (2, K))
    method.centre.copy_(start)
    mean = teacher_means(method, x0, y, d)
    mean = (mean + teacher_means(method, x0.flip(0), y, d)) / 2  # two micro-batches
    assert torch.equal(method.centre, start)  # moved once a step
    method.after_step(0, 10)
    close(method.centre, 0.9 * start + 0.1 * mean, rtol=1e-5, atol=1e-6)
    off = small("--no-centring")
    off(x0, y, **d)
    off.after_step(0, 10)
    assert off.centre.abs().sum() == 0


def step_as_rank(rank, port, modes, folder):
    """A step of DDP on this rank's half of the images: its gradients, centres and teacher."""
    results = []
    with process_group(rank, port):
        for flags in modes:
            method, (x0, y, d) = small(flags), draws(8)
            half = slice(4 * rank, 4 * rank + 4)
            wrapped = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
            own = {k: v[half] for k, v in d.items()}
            wrapped(x0[half], y[half], **own)["loss"].backward()
            method.after_step(0, 10)
            named = method.named_parameters()
            gradients = {name: p.grad for name, p in named if p.grad is not None}
            results.append((gradients, method.centre, method.teacher.state_dict()))
            del wrapped
        torch.save(results, f"{folder}/{rank}.pt")


def test_two_processes_agree_in_every_mode(tmp_path):
    """Gradients, centres and teacher: equal on both ranks, and those of one process."""
    modes = [flags for mode, flags in MODES.items() if mode != "flow"]
    mp.spawn(step_as_rank, (free_port(), modes, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for flags, a, b in zip(modes, *ranks):
        method, (x0, y, d) = small(flags), draws(8)
        method(x0, y, **d)["loss"].backward()
        method.after_step(0, 10)
        assert torch.equal(a[1], b[1])
        close(a[1], method.centre, rtol=1e-4, atol=1e-6)
        assert set(a[0]) == {name for name, p in method.named_parameters() if p.requires_grad}
        for name, gradient in a[0].items():
            assert torch.equal(gradient, b[0][name]), name
            close(gradient, method.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
        assert all(torch.equal(v, b[2][k]) for k, v in a[2].items())


# The script


def test_a_fifth_of_the_tokens_is_hidden():
    """204 of 256 kept; every image has its own mask, and two calls draw different ones."""
    args = parse_args(words("--decoder 1 16 2 --prototypes 8 --head-width 8"))
    method = SDDiT(args, {**NETWORK, "input_size": 32, "depth": 1}, EDM())
    seen = forwards(method.model)
    for _ in range(2):
        method(torch.randn(3, 3, 32, 32), torch.arange(3))
    ids = torch.cat([inputs[3] for inputs, _ in seen])
    assert ids.shape == (6, 204) and len({tuple(sorted(row.tolist())) for row in ids}) == 6


def test_the_checkpoint_has_teacher_and_centres_and_the_network_is_sampled_without(tmp_path):
    flags = "--steps 4 --prototypes 64 --head-width 32 --micro-batch 2"
    train(tmp_path, flags, script="train_discriminative")
    state = method_state(tmp_path, 4)
    parts = {name.split(".")[0] for name in state}
    assert parts == {"head", "teacher", "teacher_head", "centre"}
    assert state["centre"].abs().sum() > 0
    average = network_state(tmp_path, 4)
    assert any((average[k] != state[f"teacher.{k}"]).any() for k in average if k[:6] == "blocks")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--diffusion ddpm", "not ddpm"),
        ("--detach-encoder --align-weight 0", "nothing would train the encoder"),
        ("--teacher-sigma 0", "must be above 0"),
        ("--teacher-momentum 1.5", "momenta at most 1"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        small(flags)
