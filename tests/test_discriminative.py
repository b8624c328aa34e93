"""train_discriminative.py: the acceptance checks of SD-DiT, its teacher, centres and losses by hand, and MaskedDiT with noisy tokens."""

import math
import os
import signal
import socket
import sys

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import recipe_tensor

import train_discriminative
from diffusion import EDM, make_diffusion
from models import MaskedDiT, build_model, parse_model
from train_discriminative import (
    Head,
    SDDiT,
    chunked_cross_entropy,
    cross_entropy,
    momentum_at,
    parse_args,
)

NETWORK = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
K = 24


def small(*flags, teacher="teacher"):
    """A small SD-DiT whose teacher has other weights than its student, unless teacher is "student"; prototypes are not frozen."""
    args = parse_args(
        ["--decoder", "2", "16", "2", "--prototypes", str(K), "--head-width", "20", *flags]
    )
    torch.manual_seed(0)
    method = SDDiT(args, NETWORK, make_diffusion(args.diffusion))
    method.step = args.freeze_steps
    parts = [
        ("student", "model"),
        ("student", "head"),
        (teacher, "teacher"),
        (teacher, "teacher_head"),
    ]
    for salt, part in parts[: 1 if args.align_weight == 0 else 4]:
        for name, parameter in getattr(method, part).named_parameters():
            parameter.data.copy_(recipe_tensor(salt, name, tuple(parameter.shape)))
    return method


def draws(n=4):
    generator = torch.Generator().manual_seed(0)
    x0, noise, teacher_noise = torch.randn(3, n, 3, 8, 8, generator=generator)
    names = {"t": (n,), "drop": (n,), "mask": (n, 16)}
    others = {k: torch.rand(shape, generator=generator) for k, shape in names.items()}
    others["drop"][1] = 0.05  # one label is dropped
    return x0, torch.arange(n) % 10, {"noise": noise, "teacher_noise": teacher_noise, **others}


def inputs_of(module, name):
    """What the calls of a module, or of a method by that name, are given: a list that grows."""
    seen = []
    if name == "forward":
        module.register_forward_hook(lambda m, inputs, output: seen.append((inputs, output)))
    else:
        original = getattr(module, name)
        setattr(
            module, name, lambda *inputs: (seen.append((inputs, original(*inputs))), seen[-1][1])[1]
        )
    return seen


def network(**options):
    model = MaskedDiT(decoder=(2, 16, 2), fill="noisy_tokens", **options, **NETWORK)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(recipe_tensor("student", name, tuple(parameter.shape)))
    return model


# The network


@pytest.mark.parametrize("class_token", [False, True])
def test_identity_encoder_puts_every_token_back(class_token):
    """A fresh encoder is the identity: the bridge then sees all embedded tokens in place, for any mask and any order of the kept ones."""
    torch.manual_seed(0)
    model = MaskedDiT(decoder=(2, 16, 2), fill="noisy_tokens", class_token=class_token, **NETWORK)
    x0, y, d = draws()
    seen = inputs_of(model.decoder_layer, "forward")
    for ids_keep in (
        None,
        d["mask"].argsort(1)[:, :12],
        d["mask"].argsort(1)[:, :1],
        d["mask"].argsort(1),
    ):
        model(x0, d["t"], y, ids_keep)
        assert torch.equal(seen[-1][0][0], model.embed(x0))


@pytest.mark.parametrize("class_token", [False, True])
def test_masking_leaves_the_kept_tokens_alone_and_hidden_places_are_raw(class_token):
    model, (x0, y, d) = network(class_token=class_token), draws()
    first, bridge = inputs_of(model.blocks[0], "forward"), inputs_of(model.decoder_layer, "forward")
    order = d["mask"].argsort(1)
    ids_keep, ids_hidden = order[:, :15], order[:, 15:]
    with torch.no_grad():
        out = model(x0, d["t"], y, ids_keep)
        entering, embedded = first[0][0][0], model.embed(x0)
        kept = embedded.gather(1, ids_keep[:, :, None].expand(-1, -1, 32))
        assert (
            torch.equal(entering[:, int(class_token) :], kept)
            and entering.shape[1] == 15 + class_token
        )
        hidden = ids_hidden[:, :, None].expand(-1, -1, 32)
        assert torch.equal(bridge[0][0][0].gather(1, hidden), embedded.gather(1, hidden))
        torch.testing.assert_close(
            model(x0, d["t"], y, ids_keep.flip(1)), out, rtol=1e-4, atol=1e-5
        )  # the order of ids does not matter
        pixels = (
            torch.zeros(4, 16)
            .scatter(1, ids_hidden, 1.0)
            .reshape(4, 1, 4, 4)
            .repeat_interleave(2, 2)
            .repeat_interleave(2, 3)
        )
        assert not torch.equal(
            model(x0 + 0.1 * pixels, d["t"], y, ids_keep), out
        )  # hidden patches reach the decoder
        torch.testing.assert_close(
            model(x0, d["t"], y, torch.arange(16).expand(4, 16)),
            model(x0, d["t"], y),
            rtol=1e-4,
            atol=1e-5,
        )


def test_features_encode_and_class_token_agree():
    model, (x0, y, d) = network(class_token=True), draws()
    ids_keep = d["mask"].argsort(1)[:, :12]
    out, features = model(x0, d["t"], y, ids_keep, features=(0, 3))
    assert features[3].shape == (4, 13, 32) and torch.equal(
        model.encode(x0, d["t"], y, ids_keep), features[3]
    )
    assert (
        torch.equal(features[0][:, 0], model.class_token[0].expand(4, -1)) and out.shape == x0.shape
    )
    assert model.encode(x0, d["t"], y).shape == (4, 17, 32)


def test_config_rebuilds_the_network_and_refuses_another_fill():
    for options in ({}, {"class_token": True}):
        model = network(**options)
        again = build_model(model.config)
        assert (
            again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
        )
        assert "mask_token" not in model.state_dict() and (
            "class_token" in model.state_dict()
        ) == bool(options)
    with pytest.raises(ValueError, match="unknown fill"):
        MaskedDiT(fill="zeros", **NETWORK)
    assert set(MaskedDiT(**NETWORK).config) == {
        *NETWORK,
        "decoder",
    }  # checkpoints of MaskDiT stay as they were


def test_parameter_counts():
    """Encoder and 8 x 512 x 16 decoder: S 68.1 M, B 175.6 M, L 509.8 M, XL 730.1 M (the class token is one row, not one decimal)."""
    with torch.device("meta"):
        for size, millions in (("S", 68.1), ("B", 175.6), ("L", 509.8), ("XL", 730.1)):
            shape = {
                "input_size": 32,
                "in_channels": 4,
                "num_classes": 1000,
                **parse_model(f"DiT-{size}/2"),
            }
            model = MaskedDiT(fill="noisy_tokens", class_token=True, **shape)
            assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.1
        head = Head(384, 2048, 8192)
        assert sum(
            p.numel() for p in head.mlp.parameters()
        ) == 385 * 2048 + 2049 * 2048 + 2049 * 256 and head.weight.shape == (8192, 256)


# The losses


@pytest.mark.parametrize("summary", ["token", "none"])
def test_with_its_terms_off_it_is_plain_edm(summary):
    method, (x0, y, d) = (
        small("--align-weight", "0", "--mask-ratio", "0", "--summary", summary),
        draws(),
    )
    assert not hasattr(method, "head") and not hasattr(method, "teacher")
    dropped, edm = torch.where(d["drop"] < 0.1, 10, y), EDM()
    x_t = edm.add_noise(x0, d["noise"], d["t"])
    direct = edm.loss(
        method.model(*edm.net_inputs(x_t, d["t"]), dropped), x0, d["noise"], d["t"]
    ).mean()
    terms = method(x0, y, **d)
    assert set(terms) == {"loss", "denoise"} and torch.equal(terms["loss"], direct)
    full = small("--mask-ratio", "0", "--summary", summary)(x0, y, **d)
    assert torch.equal(full["denoise"], direct)
    method.after_step(0, 10)


def test_edm_weight_times_c_out_squared_is_one():
    """w(sigma) (D - x_0)^2 is the squared error of the raw output."""
    sigma = torch.logspace(-3, 2, 200)
    edm = EDM()
    weight = (sigma.square() + 0.25) / (sigma * 0.5).square()
    torch.testing.assert_close(
        weight * edm.preconditioning(sigma)[1].square(), torch.ones(200), rtol=2e-6, atol=0
    )
    x0, noise, out = torch.randn(3, 200, 1, 2, 2, dtype=torch.float64)
    x_t, sigma = edm.add_noise(x0, noise, sigma.double()), sigma.double()
    weighted = weight.double().reshape(-1, 1, 1, 1) * (edm.denoise(out, x_t, sigma) - x0).square()
    torch.testing.assert_close(
        edm.loss(out, x0, noise, sigma).double(), weighted, rtol=1e-4, atol=1e-6
    )


def literal_terms(method, student, teacher):
    """Tokens (M, D) of both -> H, entropy, KL, share of prototypes: one token after the other, plain softmax in float64."""
    centre = {kind: method.centre[k].double() for k, kind in enumerate(method.kinds)}
    start, end = method.args.teacher_temperature
    tau_t = start + (end - start) * min(1, method.step / method.args.temperature_steps)
    result = {}
    for kind in method.kinds:
        logits = []
        for head, tokens in ((method.head, student[kind]), (method.teacher_head, teacher[kind])):
            vectors = head.mlp(F.layer_norm(tokens, (32,), eps=1e-6)).double()
            rows = head.weight.double()
            logits.append(
                (vectors / vectors.norm(dim=1, keepdim=True))
                @ (rows / rows.norm(dim=1, keepdim=True)).T
            )
        h, e, chosen = [], [], set()
        for z_s, z_t in zip(*logits):
            p_s, p_t = (
                (z_s / method.args.student_temperature).softmax(0),
                ((z_t - centre[kind]) / tau_t).softmax(0),
            )
            h.append(-(p_t * p_s.log()).sum())
            e.append(-(p_t * p_t.log()).sum())
            chosen.add(p_t.argmax().item())
        h, e = torch.stack(h).mean(), torch.stack(e).mean()
        result |= {
            kind: h,
            f"{kind}_entropy": e,
            f"{kind}_kl": h - e,
            f"{kind}_used": torch.tensor(len(chosen) / K),
        }
        result |= {f"{kind}_centre": centre[kind].norm()}
    return result


MODES = {
    "default": [],
    "unmasked": ["--mask-ratio", "0"],
    "mean": ["--summary", "mean"],
    "none": ["--summary", "none"],
    "visible": ["--gen-tokens", "visible"],
    "detached": ["--detach-encoder"],
    "no centring": ["--no-centring"],
    "null teacher": ["--teacher-label", "null", "--no-shared-noise", "--teacher-sigma", "0.1"],
    "flow": ["--diffusion", "flow"],
}


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_loss_against_its_definition(flags):
    """Views, labels, tokens, terms and total, from the networks' own outputs."""
    method, (x0, y, d) = small(*flags), draws()
    method.centre.copy_(recipe_tensor("centre", "centre", tuple(method.centre.shape)))
    method.step = 50_000
    calls, runs = inputs_of(method.teacher, "encode"), inputs_of(method.model, "forward")
    terms = method(x0, y, **d)
    args, diffusion = method.args, method.diffusion
    x_s, x_t, (out, features) = *(diffusion.net_inputs(diffusion.add_noise(x0, *view), view[1]) for view in (
        (d["noise"], d["t"]),
        (d["noise"] if args.shared_noise else d["teacher_noise"], torch.full((4,), args.teacher_sigma)),
    )), runs[0][1]  # fmt: skip
    dropped = torch.where(d["drop"] < 0.1, 10, y)
    assert (dropped == 10).sum() >= 1
    for seen, expected, labels in (
        (runs[0][0], x_s, dropped),
        (calls[0][0], x_t, dropped if args.teacher_label == "same" else y * 0 + 10),
    ):
        assert (
            torch.equal(seen[0], expected[0])
            and torch.equal(seen[1], expected[1])
            and torch.equal(seen[2], labels)
        )
    token, masked = args.summary == "token", args.mask_ratio > 0
    ids_keep = d["mask"].argsort(1)[:, :12] if masked else torch.arange(16).expand(4, 16)
    student, teacher = features[3], calls[0][1]
    assert student.shape == (4, ids_keep.shape[1] + token, 32) and teacher.shape == (
        4,
        16 + token,
        32,
    )
    views = []
    for tokens, ids in ((student, None), (teacher, ids_keep)):
        patches = torch.cat(
            [row[token:] if ids is None else row[token:][ids[n]] for n, row in enumerate(tokens)]
        )
        views.append({"patch": patches, "class": tokens[:, 0] if token else tokens.mean(1)})
    expected = literal_terms(method, *views)
    for name, value in expected.items():
        torch.testing.assert_close(
            terms[name].double(), value.double(), rtol=2e-4, atol=1e-5, msg=lambda m: f"{name}: {m}"
        )
    loss = diffusion.loss(out, x0, d["noise"], d["t"])
    if args.gen_tokens == "visible":
        places = [(n, i) for n in range(4) for i in ids_keep[n].tolist()]
        patches = [
            loss[n, :, 2 * (i // 4) : 2 * (i // 4) + 2, 2 * (i % 4) : 2 * (i % 4) + 2]
            for n, i in places
        ]
        loss = torch.stack(patches)
    torch.testing.assert_close(terms["denoise"], loss.mean(), rtol=1e-5, atol=1e-6)
    align = terms["patch"] + terms.get("class", 0)
    torch.testing.assert_close(terms["loss"], terms["denoise"] + 0.1 * align)
    assert set(terms) == {"loss", "denoise", *expected}


def test_same_view_same_network_gives_the_entropy():
    """sigma_T = sigma_S, no mask, equal temperatures, no centre, teacher == student: H is the entropy of P_S."""
    flags = [
        "--mask-ratio",
        "0",
        "--teacher-sigma",
        "0.5",
        "--teacher-temperature",
        "0.1",
        "0.1",
        "--no-centring",
    ]
    method, (x0, y, d) = small(*flags, teacher="student"), draws()
    runs = inputs_of(method.model, "forward")
    terms = method(x0, y, **(d | {"t": torch.full((4,), 0.5)}))
    vectors, prototypes = method.head(runs[0][1][1][3][:, 1:].flatten(0, 1))
    p = (vectors @ prototypes.T / 0.1).softmax(1)
    torch.testing.assert_close(terms["patch"], -(p * p.log()).sum(1).mean(), rtol=1e-5, atol=1e-6)
    for kind in ("patch", "class"):
        assert terms[f"{kind}_kl"].abs() < 1e-5 and torch.isclose(
            terms[kind], terms[f"{kind}_entropy"], rtol=1e-5
        )


def test_head_rows_are_unit_vectors_and_logits_are_cosines():
    torch.manual_seed(0)
    head = Head(32, 20, K)
    assert 0.015 < head.mlp[0].weight.std() < 0.025 and head.mlp[0].bias.abs().max() == 0
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    for _ in range(3):
        vectors, prototypes = head(10 * torch.randn(50, 32))
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(K))
        assert (vectors @ prototypes.T).abs().max() <= 1 + 1e-6
        optimizer.zero_grad()
        (vectors @ prototypes.T).square().sum().backward()
        optimizer.step()
    assert torch.allclose(
        head(torch.ones(1, 32) * 3 + torch.arange(32.0))[0],
        head(torch.arange(32.0)[None])[0],
        atol=1e-4,
    )  # LayerNorm


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunks_change_nothing(rows):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        F.normalize(torch.randn(40, 256, generator=generator), dim=1) for _ in range(2)
    )
    prototypes, others = (
        F.normalize(torch.randn(K, 256, generator=generator), dim=1) for _ in range(2)
    )
    centre, results = 0.1 * torch.randn(K, generator=generator), []
    for function, options in ((cross_entropy, {}), (chunked_cross_entropy, {"rows": rows})):
        leaves = [student.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        out = function(leaves[0], teacher, leaves[1], others, centre, 0.1, 0.05, **options)
        out[0].mean().backward()
        results.append([*(o.detach() for o in out), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_chunked_logits_are_not_kept_for_the_backward_pass():
    """What autograd holds grows with M alone, not with M K."""
    vectors = F.normalize(torch.randn(64, 256), dim=1).requires_grad_()
    prototypes, held = F.normalize(torch.randn(5000, 256), dim=1), []
    for function, options in ((cross_entropy, {}), (chunked_cross_entropy, {"rows": 16})):
        sizes = []

        def pack(tensor):
            sizes.append(0 if 256 in tensor.shape else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(
                vectors,
                vectors.detach(),
                prototypes,
                prototypes,
                torch.zeros(5000),
                0.1,
                0.05,
                **options,
            )[0].mean()
        held.append(max(sizes))  # but vectors and prototypes, which exist anyway
    assert held[0] == 64 * 5000 and held[1] <= 5000


def test_bf16_keeps_losses_in_fp32_and_close():
    method, (x0, y, d) = small(), draws()
    exact = method(x0, y, **d)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(x0, y, **d)
    terms["loss"].backward()
    assert (
        all(v.dtype == torch.float32 for v in terms.values())
        and method.mean_logits.dtype == torch.float32
    )
    for name in ("loss", "denoise", "patch", "class"):
        torch.testing.assert_close(terms[name], exact[name], rtol=0.05, atol=0.05)


# Teacher, centres, gradients


@pytest.mark.parametrize("flags", [*MODES.values(), ["--align-weight", "0"]], ids=[*MODES, "off"])
def test_every_trainable_parameter_has_a_gradient_and_the_teacher_none(flags):
    method, (x0, y, d) = small(*flags), draws()
    method(x0, y, **d)["loss"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith(("ema.", "teacher")):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert {n.split(".")[0] for n, _ in method.named_parameters() if n.startswith("teacher")} <= {
        "teacher",
        "teacher_head",
    }
    if hasattr(method, "teacher"):
        assert not [
            n for n in method.teacher.state_dict() if n.startswith(("decoder", "final"))
        ]  # an encoder only


def test_detached_encoder_learns_from_the_discriminative_loss_only():
    """The denoising loss alone reaches decoder and conditioning, neither blocks' input, patches nor class token."""
    for flag, reached in (("--detach-encoder", False), ("--no-detach-encoder", True)):
        method, (x0, y, d) = small(flag), draws()
        method(x0, y, **d)["denoise"].backward()
        grads = {
            name: p.grad is not None and bool(p.grad.abs().sum() > 0)
            for name, p in method.model.named_parameters()
        }
        for name, has in grads.items():
            shared = name.startswith(("decoder", "final_layer", "t_embedder", "y_embedder"))
            assert has == (reached or shared), name


def test_prototypes_are_frozen_at_first():
    method, (x0, y, d) = small("--freeze-steps", "5"), draws()
    method.teacher_head.load_state_dict(method.head.state_dict())  # as at the start of a run
    optimizer = torch.optim.AdamW(
        [p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0
    )
    before = method.head.weight.detach().clone()
    for step in range(6):
        method.step = step
        method(x0, y, **d)["loss"].backward()
        assert (
            method.head.weight.grad.abs().sum() > 0
            and method.head.mlp[0].weight.grad.abs().sum() > 0
        )
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(step, 100)
        assert torch.equal(method.head.weight, before) == (step < 5)
        assert torch.equal(method.teacher_head.weight, before) == (step < 5)
    moved = (method.head.weight - before).abs().max().item()
    assert moved < 0.2  # about one learning rate: Adam's moments have seen real gradients all along


def test_teacher_momentum():
    assert momentum_at(0, 100, 0.996, "cosine") == 0.996 and math.isclose(
        momentum_at(50, 100, 0.996, "cosine"), 0.998
    )
    assert (
        math.isclose(momentum_at(100, 100, 0.996, "cosine"), 1)
        and momentum_at(70, 100, 0.9, "constant") == 0.9
    )
    constant = ["--teacher-momentum-schedule", "constant"]
    for flags, m in (
        (["--teacher-momentum", "0.9"], momentum_at(3, 10, 0.9, "cosine")),
        (constant, 0.996),
    ):
        method, (x0, y, d) = small("--freeze-steps", "0", *flags), draws()
        pairs = [
            (part, name)
            for part in ("teacher", "teacher_head")
            for name, _ in getattr(method, part).named_parameters()
        ]
        source = {"teacher": method.model, "teacher_head": method.head}
        expected = [
            m * getattr(method, a).get_parameter(n) + (1 - m) * source[a].get_parameter(n).detach()
            for a, n in pairs
        ]
        student = {k: v.clone() for k, v in method.model.state_dict().items()}
        method(x0, y, **d)
        method.after_step(3, 10)
        for (part, name), value in zip(pairs, expected):
            torch.testing.assert_close(
                getattr(method, part).get_parameter(name), value, rtol=1e-5, atol=1e-7
            )
        assert all(torch.equal(v, student[k]) for k, v in method.model.state_dict().items())
        assert ("teacher_head", "weight") in pairs and ("teacher", "class_token") in pairs


def test_teacher_starts_as_the_student():
    method = SDDiT(parse_args(["--decoder", "2", "16", "2", "--prototypes", "8"]), NETWORK, EDM())
    for a, b in ((method.teacher, method.model), (method.teacher_head, method.head)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def teacher_means(method, x0, y, d):
    """Mean teacher logits (2, K) of visible patches and class token, by hand."""
    calls = inputs_of(method.teacher, "encode")
    method(x0, y, **d)
    views = method.compared(calls[0][1], d["mask"].argsort(1)[:, :12])
    del method.teacher.encode  # the hook
    return torch.stack(
        [
            (lambda v, p: (v @ p.T).mean(0))(*method.teacher_head(views[kind]))
            for kind in ("patch", "class")
        ]
    ).detach()


def test_centres_follow_the_mean_logits_of_all_micro_batches():
    method, (x0, y, d) = small(), draws()
    start = recipe_tensor("centre", "centre", (2, K))
    method.centre.copy_(start)
    mean = teacher_means(method, x0, y, d)
    mean = (mean + teacher_means(method, x0.flip(0), y, d)) / 2  # two micro-batches
    assert torch.equal(method.centre, start)  # moved once a step
    method.after_step(0, 10)
    torch.testing.assert_close(method.centre, 0.9 * start + 0.1 * mean, rtol=1e-5, atol=1e-6)
    assert (
        method.mean_logits.abs().sum() == 0
        and "mean_logits" not in method.state_dict()
        and "centre" in method.state_dict()
    )
    off = small("--no-centring")
    off(x0, y, **d)
    off.after_step(0, 10)
    assert off.centre.abs().sum() == 0


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def step_as_rank(rank, world, port, flags, folder):
    """One step of DDP on this rank's half of the images: its gradients, centres and teacher."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    results = []
    for words in flags:
        method, (x0, y, d) = small(*words), draws(8)
        share = slice(4 * rank, 4 * rank + 4)
        wrapped = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        for _ in range(2):  # unused parameters would fail in the second forward
            method.zero_grad()
            wrapped(x0[share], y[share], **{k: v[share] for k, v in d.items()})["loss"].backward()
        method.mean_logits /= method.micro_batches  # the same batch twice
        method.micro_batches = 1
        method.after_step(0, 10)
        gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        results.append((gradients, method.centre, method.teacher.state_dict()))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_in_every_mode(tmp_path):
    """Gradients, centres and teacher are equal on both ranks, and those of the whole batch in one process."""
    modes = [m for m in MODES.values() if "flow" not in m]
    mp.spawn(step_as_rank, (2, free_port(), modes, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for words, a, b in zip(modes, *ranks):
        method, (x0, y, d) = small(*words), draws(8)
        method(x0, y, **d)["loss"].backward()
        method.after_step(0, 10)
        assert torch.equal(a[1], b[1])
        torch.testing.assert_close(a[1], method.centre, rtol=1e-4, atol=1e-6)
        assert set(a[0]) == {name for name, p in method.named_parameters() if p.requires_grad}
        for name, gradient in a[0].items():
            assert torch.equal(gradient, b[0][name]), name
            torch.testing.assert_close(
                gradient,
                method.get_parameter(name).grad,
                rtol=1e-3,
                atol=1e-5,
                msg=lambda m: f"{name}: {m}",
            )
        assert all(torch.equal(v, b[2][k]) for k, v in a[2].items())


# The script


def test_a_fifth_of_the_tokens_is_hidden():
    """204 of 256 kept; every image has its own mask, and two calls draw different ones."""
    args = parse_args(["--decoder", "1", "16", "2", "--prototypes", "8", "--head-width", "8"])
    method = SDDiT(args, {**NETWORK, "input_size": 32, "depth": 1}, EDM())
    seen = inputs_of(method.model, "forward")
    for _ in range(2):
        method(torch.randn(3, 3, 32, 32), torch.arange(3))
    ids = [call[0][3] for call in seen]
    assert (
        ids[0].shape == (3, 204)
        and len({tuple(sorted(row.tolist())) for row in torch.cat(ids)}) == 6
    )


def test_temperature_rises_linearly():
    method, (x0, y, d) = (
        small("--teacher-temperature", "0.02", "0.5", "--temperature-steps", "10"),
        draws(),
    )
    entropies = []
    for step in (0, 5, 10, 20):
        method.step = step
        entropies.append(method(x0, y, **d)["patch_entropy"].item())
    assert entropies[0] < entropies[1] < entropies[2] == entropies[3] <= math.log(K)


def test_refusals_and_defaults():
    for flags, message in (
        (["--diffusion", "ddpm"], "not ddpm"),
        (["--mask-ratio", "1"], "must be below 1"),
        (["--detach-encoder", "--align-weight", "0"], "nothing would train the encoder"),
        (["--teacher-sigma", "0"], "must be above 0"),
        (["--teacher-temperature", "0", "0.1"], "must be above 0"),
        (["--student-temperature", "0"], "must be above 0"),
        (["--prototypes", "0"], "must be above 0"),
        (["--teacher-momentum", "1.5"], "momenta at most 1"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            SDDiT(parse_args(flags), NETWORK, make_diffusion(parse_args(flags).diffusion))
        assert "\n" not in str(refusal.value)
    args = parse_args([])
    assert (args.diffusion, args.clip_grad, args.ema_warmup, args.batch_size, args.lr) == (
        "edm",
        0,
        False,
        256,
        1e-4,
    )
    assert (args.mask_ratio, args.teacher_sigma, args.prototypes, args.head_width) == (
        0.2,
        0.002,
        8192,
        2048,
    )


TINY = [
    "--model",
    "DiT-Ti/4",
    "--image-size",
    "16",
    "--batch-size",
    "4",
    "--lr",
    "1e-3",
    "--log-every",
    "2",
    "--steps",
    "6",
]
TINY += [
    "--decoder",
    "1",
    "32",
    "2",
    "--prototypes",
    "64",
    "--head-width",
    "32",
    "--freeze-steps",
    "2",
    "--micro-batch",
    "2",
]


def train(out, method=SDDiT):
    """Train in this process; the signal handlers of pytest are put back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, ["train_discriminative.py"]
    try:
        train_discriminative.main(method, parse_args([*TINY, "--out", str(out)]))
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)


def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path):
    """Teacher, its head and the centres are part of the checkpoint; the network is rebuilt from it, without them."""

    class Interrupted(SDDiT):
        def after_step(self, step, steps):
            super().after_step(step, steps)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    train(tmp_path / "a")
    train(tmp_path / "b", Interrupted)
    assert int(max((tmp_path / "b" / "checkpoints").iterdir()).stem) < 6
    train(tmp_path / "b")
    a, b = (
        torch.load(tmp_path / run / "checkpoints" / "0000006.pt", weights_only=True) for run in "ab"
    )
    for part in ("model", "ema", "method"):
        assert a[part].keys() == b[part].keys() and all(
            torch.equal(v, b[part][k]) for k, v in a[part].items()
        ), part
    for k, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][k][name]) for name, v in state.items())
    assert torch.equal(a["log"], b["log"]) and a["method"]["centre"].abs().sum() > 0
    assert {name.split(".")[0] for name in a["method"]} == {
        "head",
        "teacher",
        "teacher_head",
        "centre",
    }
    assert any(
        not torch.equal(v, a["model"][k.removeprefix("teacher.")])
        for k, v in a["method"].items()
        if k.startswith("teacher.")
    )
    model = build_model(a["args"]["network"])
    model.load_state_dict(a["ema"])
    assert model(torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 10])).shape == (
        2,
        3,
        16,
        16,
    )
