"""train_mdt.py and MaskedDiT against the values of the official code, and the method's own rules."""

import math

import numpy as np
import pytest
import torch
from conftest import recipe_tensor

import sample
import train_mdt
from diffusion import EDM, Guided, ImageNoise, make_diffusion, sample_ode
from models import MaskedDiT, build_model, load_official, position_embedding
from train_mdt import (
    MaskDiT,
    mask_ratio_at,
    parse_args,
    patchify,
    reconstruction_loss,
    visible_loss,
)


def official_file(golden, tmp_path):
    """A checkpoint as MaskDiT saves it: names of the preconditioned wrapper, one-hot label layer, no row for the null label."""
    state = golden.weights()
    state["pos_embed"], state["decoder_pos_embed"] = (
        position_embedding(48, 4),
        position_embedding(512, 4),
    )
    state = {f"model.{name}": value for name, value in state.items()}
    torch.save({"model": state, "ema": state}, tmp_path / "maskdit.pt")
    return tmp_path / "maskdit.pt"


def labels(rows):
    """One-hot rows, all zero for the null label -> integer labels, null = number of classes."""
    return torch.where(rows.sum(1) > 0, rows.argmax(1), rows.shape[1])


def test_maskdit_forward(golden, tmp_path):
    g = golden("maskdit_forward")
    model, notes = load_official(official_file(g, tmp_path), "maskdit", g.config["num_heads"])
    assert any("null label" in n for n in notes) and isinstance(model, MaskedDiT)
    edm, i, y = EDM(), g.inputs, labels(g.inputs["y"])
    net_in, net_t = edm.net_inputs(i["x"], i["sigma"])
    g.check("net_in", net_in)
    g.check("net_t", net_t)
    with torch.no_grad():
        masked, full = model(net_in, net_t, y, i["ids_keep"]), model(net_in, net_t, y)
        g.check("F_masked", masked)
        g.check("D_masked", edm.denoise(masked, i["x"], i["sigma"]))
        g.check("F_full", full)
        g.check("D_full", edm.denoise(full, i["x"], i["sigma"]))
        sigma = i["sigma_cfg"].expand(len(y))
        guided = Guided(model, g.config["cfg_scale"], 10)(*edm.net_inputs(i["x"], sigma), y)
        g.check("D_cfg", edm.denoise(guided, i["x"], sigma))
        everything = torch.arange(16).expand(4, 16)
        torch.testing.assert_close(
            model(net_in, net_t, y, everything.flip(1)), full, rtol=1e-4, atol=5e-5
        )  # any order, nothing hidden
    g.all_checked()


def test_official_weights_are_sampled_as_edm(tmp_path):
    """sample.py knows the noise process of official MaskDiT weights, and its images are those of the network under EDM."""
    model = MaskedDiT(
        decoder=(2, 32, 16),
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=128,
        depth=6,
        num_heads=4,
        num_classes=10,
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(recipe_tensor("official", name, tuple(parameter.shape)))
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    table = "model.y_embedder.embedding_table.weight"
    state[table] = state[table][:-1].T.contiguous()
    torch.save({"model": state, "ema": state}, tmp_path / "maskdit.pt")
    flags = [
        "--ckpt",
        tmp_path / "maskdit.pt",
        "--official",
        "maskdit",
        "--model",
        "DiT-Ti/2",
        "--num",
        2,
        "--steps",
        3,
        "--latents",
    ]
    sample.main(sample.parse_args(list(map(str, [*flags, "--out", tmp_path / "out"]))))
    draw = ImageNoise(0, range(2), (4, 8, 8))
    noise, y = draw(), draw.choice(range(10))
    expected = sample_ode(model, EDM(), noise, y, 3).float()
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        torch.testing.assert_close(
            torch.from_numpy(arrays["arr_0"]), expected, rtol=1e-4, atol=1e-4
        )


def method_for(golden, tmp_path, *flags):
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
    flags = ["--init-from", str(official_file(golden, tmp_path)), *flags]
    return MaskDiT(parse_args(flags), {k: config[k] for k in names}, EDM())


def test_maskdit_loss(golden, tmp_path):
    g = golden("maskdit_loss")
    i, y = g.inputs, labels(g.inputs["y"])
    method = method_for(g, tmp_path)
    sigma = (EDM().p_mean + EDM().p_std * i["sigma_draw"]).exp()
    g.check("sigma", sigma)
    draws = {"t": sigma, "noise": i["noise"], "drop": torch.ones(4), "mask": i["mask_draw"]}
    seen = {}
    method.model.register_forward_hook(
        lambda module, inputs, output: seen.update(ids_keep=inputs[3], out=output.detach())
    )

    def per_image(method, name):
        one = [
            method(i["x0"][k : k + 1], y[k : k + 1], **{n: v[k : k + 1] for n, v in draws.items()})[
                name
            ]
            for k in range(4)
        ]
        return torch.stack(one).detach()

    terms = method(i["x0"], y, **draws)
    assert torch.equal(seen["ids_keep"], i["ids_keep"])
    x_t = i["x0"] + sigma.reshape(-1, 1, 1, 1) * i["noise"]
    g.check("D", EDM().denoise(seen["out"], x_t, sigma))
    for name, ours in (("total", "loss"), ("dsm", "denoise"), ("mae", "mae")):
        values = per_image(method, ours)
        g.check(name, values)
        torch.testing.assert_close(terms[ours].detach(), values.mean(), rtol=1e-5, atol=1e-6)
    unmasked = method_for(g, tmp_path, "--mask-ratio", "0")
    g.check("unmasked", per_image(unmasked, "loss"))
    g.all_checked()


NETWORK = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}


def small(*flags):
    args = parse_args(["--decoder", "2", "16", "2", *flags])
    method = MaskDiT(args, NETWORK, make_diffusion(args.diffusion))
    for name, parameter in method.model.named_parameters():
        parameter.data.copy_(recipe_tensor("mdt", name, tuple(parameter.shape)))
    return method


def draws(n=4):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, n, 3, 8, 8, generator=generator)
    names = {"t": (n,), "drop": (n,), "mask": (n, 16)}
    return (
        x0,
        torch.arange(n),
        {
            "noise": noise,
            **{k: torch.rand(shape, generator=generator) for k, shape in names.items()},
        },
    )


def test_dropped_tokens_are_really_dropped_and_hidden_values_reach_nothing():
    """The encoder runs on 8 of 16 tokens; changing the hidden patches of the input changes the raw output nowhere."""
    method, (x0, y, d) = small(), draws()
    lengths = []
    for block in method.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    method(x0, y, **d)
    assert lengths == [8, 8, 8]
    ids_keep = d["mask"].argsort(1)[:, :8]
    hidden = torch.ones(4, 16).scatter(1, ids_keep, 0.0)
    pixels = hidden.reshape(4, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        a = method.model(x0, d["t"], y, ids_keep)
        assert torch.equal(method.model(x0 + 100 * pixels, d["t"], y, ids_keep), a)
        assert not torch.equal(method.model(x0 + 0.1 * (1 - pixels), d["t"], y, ids_keep), a)


def test_hidden_values_reach_the_denoised_output_through_c_skip():
    method, (x0, y, d) = small(), draws()
    x_t = EDM().add_noise(x0, d["noise"], d["t"])
    with torch.no_grad():
        out = method.model(*EDM().net_inputs(x_t, d["t"]), y, d["mask"].argsort(1)[:, :8])
    changed = EDM().denoise(out, x_t + 1, d["t"]) - EDM().denoise(out, x_t, d["t"])
    c_skip = EDM().preconditioning(d["t"])[0]
    torch.testing.assert_close(
        changed, c_skip.reshape(-1, 1, 1, 1).expand_as(changed), rtol=1e-4, atol=1e-5
    )


def test_losses_against_their_definition():
    """Each term, literally: patch by patch in Python."""
    generator = torch.Generator().manual_seed(0)
    loss, denoised, x_t = torch.randn(3, 2, 3, 8, 8, generator=generator)
    hidden = (torch.rand(2, 16, generator=generator) < 0.4).float()
    for n in range(2):
        dsm, mae = [], []
        for k in range(16):
            rows, columns = (
                slice(2 * (k // 4), 2 * (k // 4) + 2),
                slice(2 * (k % 4), 2 * (k % 4) + 2),
            )
            if hidden[n, k]:
                patch = x_t[n, :, rows, columns]
                mae.append(
                    (
                        (
                            denoised[n, :, rows, columns]
                            - (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                        )
                        ** 2
                    ).mean()
                )
            else:
                dsm.append(loss[n, :, rows, columns].mean())
        assert torch.isclose(visible_loss(loss, hidden, 2)[n], torch.stack(dsm).mean(), atol=1e-6)
        assert torch.isclose(
            reconstruction_loss(denoised, x_t, hidden, 2)[n], torch.stack(mae).mean(), rtol=1e-4
        )
    assert patchify(loss, 2).shape == (2, 16, 12)


def test_without_masking_and_with_nothing_left_to_hide_it_is_plain_edm():
    x0, y, d = draws()
    plain, late = (
        small("--mask-ratio", "0"),
        small("--mask-schedule", "cosine4", "--steps", "100000"),
    )
    late.step = 99_997  # the ratio is 1e-18 here: the official code saves NaN
    assert 0 < mask_ratio_at(99_997, 100_000, 0.5, "cosine4") < 1e-15
    dropped = torch.where(d["drop"] < 0.1, 10, y)
    edm = EDM()
    x_t = edm.add_noise(x0, d["noise"], d["t"])
    direct = edm.loss(
        plain.model(*edm.net_inputs(x_t, d["t"]), dropped), x0, d["noise"], d["t"]
    ).mean()
    for method in (plain, late):
        assert torch.equal(method(x0, y, **d)["loss"], direct)


MODES = [
    [],
    ["--mask-ratio", "0"],
    ["--diffusion", "flow", "--mask-ratio", "0.75"],
    ["--mae-weight", "0"],
]


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_every_trainable_parameter_has_a_gradient(flags):
    method, (x0, y, d) = small(*flags), draws()
    method(x0, y, **d)["loss"].backward()
    for name, parameter in method.model.named_parameters():
        assert parameter.grad is not None, name
        if name != "mask_token" or "--mask-ratio" not in flags or "0" not in flags:
            assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in method.ema.parameters())


def test_mask_ratio_schedules():
    assert [mask_ratio_at(k, 10, 0.5, "constant") for k in (0, 5, 10)] == [0.5] * 3
    assert [mask_ratio_at(k, 10, 0.5, "linear") for k in (0, 5, 10, 20)] == [0.5, 0.25, 0, 0]
    cosine4 = [mask_ratio_at(k, 1000, 0.5, "cosine4") for k in range(1000)]
    assert (
        abs(sum(cosine4) / 1000 - 0.1875) < 1e-3 and cosine4[750] < 0.011
    )  # papers/maskdit: mean ratio of the official tuning
    assert math.isclose(mask_ratio_at(5, 10, 0.5, "cosine2"), 0.25)
    for name in ("cos4", "cosine", "exp"):
        with pytest.raises(ValueError, match="unknown --mask-schedule"):
            mask_ratio_at(0, 1, 0.5, name)


def test_kept_count_is_truncated_and_masks_differ_by_image():
    method, (x0, y, d) = small("--mask-ratio", "0.45"), draws()
    seen = []
    method.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[3]))
    del d["mask"]  # the method's own draw
    method(x0, y, **d)
    assert seen[0].shape == (4, 8)  # int(16 * 0.55) = 8
    assert len({tuple(sorted(row.tolist())) for row in seen[0]}) == 4


def test_parameter_counts_of_the_paper():
    """Table of papers' sizes with the 8 x 512 x 16 decoder, trainable: S 68.1 M, B 175.6 M, L 509.8 M, XL 730.1 M."""
    from models import parse_model

    with torch.device("meta"):
        for size, millions in (("S", 68.1), ("B", 175.6), ("L", 509.8), ("XL", 730.1)):
            model = MaskedDiT(
                input_size=32, in_channels=4, num_classes=1000, **parse_model(f"DiT-{size}/2")
            )
            assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.1


def test_config_rebuilds_the_network():
    model = small().model
    again = build_model(model.config)
    assert isinstance(again, MaskedDiT) and again.state_dict().keys() == model.state_dict().keys()


def test_refusals():
    with pytest.raises(ValueError, match="not ddpm"):
        small("--diffusion", "ddpm")
    with pytest.raises(ValueError, match="must be below 1"):
        small("--mask-ratio", "1")
    with pytest.raises(ValueError, match="cannot be read"):
        small("--init-from", "/nowhere.pt")
    for decoder in (("1", "30", "2"), ("1", "32", "5"), ("1", "0", "1"), ("0", "32", "2")):
        with pytest.raises(ValueError, match="all at least 1"):
            small("--decoder", *decoder)
    assert train_mdt.parse_args([]).clip_grad == 0 and train_mdt.parse_args([]).batch_size == 1024
