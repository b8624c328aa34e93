"""train_mdt.py and MaskedDiT against the values of the official code, and the method's rules."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    NETWORK,
    assert_gradients,
    assert_plain,
    call,
    close,
    fill,
    official_state,
    one_by_one,
    words,
)

from diffusion import EDM, Guided, ImageNoise, make_diffusion, sample_ode
from models import MaskedDiT, UserError, load_official, load_weights, position_embedding
from train_mdt import MaskDiT, mask_ratio_at, parse_args


def official_file(golden, tmp_path):
    """A checkpoint as MaskDiT saves it: wrapped, one-hot labels, no row for the null label."""
    state = official_state(golden)
    state["pos_embed"] = position_embedding(48, 4)
    state["decoder_pos_embed"] = position_embedding(512, 4)
    state = {f"model.{name}": value for name, value in state.items()}
    torch.save({"model": state, "ema": state}, tmp_path / "maskdit.pt")
    return tmp_path / "maskdit.pt"


def labels(rows):
    """One-hot rows, all zero for the null label -> integers, null = number of classes."""
    return torch.where(rows.sum(1) > 0, rows.argmax(1), rows.shape[1])


def test_maskdit_forward(golden, tmp_path):
    g = golden("maskdit_forward")
    model, notes = load_official(official_file(g, tmp_path), "maskdit", g.config["num_heads"])
    assert "null label" in str(notes) and isinstance(model, MaskedDiT)
    edm, i, y = EDM(), g.inputs, labels(g.inputs["y"])
    net_in, net_t = edm.net_inputs(i["x"], i["sigma"])
    g.check("net_in", net_in)
    g.check("net_t", net_t)
    with torch.no_grad():
        masked = model(net_in, net_t, y, i["ids_keep"])
        full = model(net_in, net_t, y)
        g.check("F_masked", masked)
        g.check("D_masked", edm.denoise(masked, i["x"], i["sigma"]))
        g.check("F_full", full)
        g.check("D_full", edm.denoise(full, i["x"], i["sigma"]))
        sigma = i["sigma_cfg"].expand(len(y))
        guided = Guided(model, g.config["cfg_scale"], 10)(*edm.net_inputs(i["x"], sigma), y)
        g.check("D_cfg", edm.denoise(guided, i["x"], sigma))
        everything = torch.arange(16).expand(4, 16).flip(1)  # any order, nothing hidden
        close(model(net_in, net_t, y, everything), full, rtol=1e-4, atol=5e-5)
    g.all_checked()


def test_maskdit_loss(golden, tmp_path):
    g = golden("maskdit_loss")
    i, y, edm = g.inputs, labels(g.inputs["y"]), EDM()
    file, method = official_file(g, tmp_path), MaskDiT(parse_args([]), g.network(), edm)
    load_weights(method.model, "model", file, "maskdit")
    sigma = (edm.p_mean + edm.p_std * i["sigma_draw"]).exp()
    g.check("sigma", sigma)
    draws = {"t": sigma, "noise": i["noise"], "drop": torch.ones(4), "mask": i["mask_draw"]}
    for name, ours in (("total", "loss"), ("dsm", "denoise"), ("mae", "mae")):
        g.check(name, one_by_one(method, i["x0"], y, draws, ours))
    seen = {}
    method.model.register_forward_hook(
        lambda module, inputs, output: seen.update(ids_keep=inputs[3], out=output)
    )
    terms = method(i["x0"], y, **draws)
    close(terms["loss"], g.outputs["total"].mean(), rtol=1e-4, atol=1e-5)
    assert torch.equal(seen["ids_keep"], i["ids_keep"])
    x_t = i["x0"] + sigma.reshape(-1, 1, 1, 1) * i["noise"]
    g.check("D", edm.denoise(seen["out"], x_t, sigma))
    unmasked = MaskDiT(parse_args(words("--mask-ratio 0")), g.network(), edm)
    load_weights(unmasked.model, "model", file, "maskdit")
    g.check("unmasked", one_by_one(unmasked, i["x0"], y, draws, "loss"))
    g.all_checked()


def test_official_weights_are_sampled_as_edm(tmp_path):
    """sample.py knows the noise process of official weights; images are the network's own."""
    shape = {**NETWORK, "in_channels": 4, "hidden_size": 128, "depth": 6, "num_heads": 4}
    model = fill(MaskedDiT(decoder=(2, 32, 16), **shape), "official")
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    table = "model.y_embedder.embedding_table.weight"
    state[table] = state[table][:-1].T.contiguous()
    torch.save({"model": state, "ema": state}, tmp_path / "maskdit.pt")
    flags = "--official maskdit --model DiT-Ti/2 --num 2 --steps 3 --latents"
    call("sample", "--ckpt", tmp_path / "maskdit.pt", flags, "--out", tmp_path / "out")
    draw = ImageNoise(0, range(2), (4, 8, 8))
    noise, y = draw(), draw.choice(range(10))
    expected = sample_ode(model, EDM(), noise, y, 3).float()
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        close(torch.from_numpy(arrays["arr_0"]), expected, rtol=1e-4, atol=1e-4)


# The method's own rules


def small(flags=""):
    args = parse_args(words("--decoder 2 16 2", flags))
    method = MaskDiT(args, NETWORK, make_diffusion(args.diffusion))
    fill(method.model, "mdt")
    return method


def draws():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    t, drop = torch.rand(2, 4, generator=generator)
    drop[1] = 0.05  # one label is dropped
    mask = torch.rand(4, 16, generator=generator)
    return x0, torch.arange(4), {"noise": noise, "t": t, "drop": drop, "mask": mask}


def test_dropped_tokens_are_really_dropped_and_hidden_values_reach_nothing():
    """The encoder runs on 8 of 16 tokens; hidden patches change the raw output nowhere."""
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


def test_without_masking_and_with_nothing_left_to_hide_it_is_plain_edm():
    x0, y, d = draws()
    sent = torch.where(d["drop"] < 0.1, 10, y)
    late = small("--mask-schedule cosine4 --steps 100000")
    late.step = 99_997  # the ratio is 1e-18 here: the official code saves NaN
    assert 0 < mask_ratio_at(99_997, 100_000, 0.5, "cosine4") < 1e-15
    t = d.pop("t")
    direct = assert_plain(small("--mask-ratio 0"), sent, x0, y, t, d)
    assert torch.equal(late(x0, y, t=t, **d)["loss"], direct)


@pytest.mark.parametrize(
    "flags", ["", "--mask-ratio 0", "--diffusion flow --mask-ratio 0.75", "--mae-weight 0"]
)
def test_every_trainable_parameter_has_a_gradient(flags):
    """Without the reconstruction the mask token is a constant zero."""
    method, (x0, y, d) = small(flags), draws()
    method(x0, y, **d)["loss"].backward()
    token = ("model.mask_token",)
    constant = flags == "--mae-weight 0"
    assert_gradients(method, ("ema.", *token * constant), token * (flags == "--mask-ratio 0"))
    args = parse_args(words(flags))
    start = MaskDiT(args, NETWORK, make_diffusion(args.diffusion)).model.mask_token
    assert (start.abs().sum() == 0) == constant


def test_mask_ratio_schedules():
    assert [mask_ratio_at(k, 10, 0.5, "constant") for k in (0, 5, 10)] == [0.5] * 3
    assert [mask_ratio_at(k, 10, 0.5, "linear") for k in (0, 5, 10, 20)] == [0, 0.25, 0.5, 0.5]
    assert [mask_ratio_at(k, 10, 0.5, "fall") for k in (0, 5, 10, 20)] == [0.5, 0.25, 0, 0]
    assert math.isclose(mask_ratio_at(5, 10, 0.5, "cosine2"), 0.25)
    cosine4 = [mask_ratio_at(k, 1000, 0.5, "cosine4") for k in range(1000)]
    assert abs(sum(cosine4) / 1000 - 0.1875) < 1e-3  # mean ratio of the official tuning


def test_kept_count_is_truncated_and_masks_differ_by_image():
    method, seen = small("--mask-ratio 0.45"), []
    method.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[3]))
    method(*draws()[:2])
    assert seen[0].shape == (4, 8)  # int(16 * 0.55) = 8
    assert len({tuple(sorted(row.tolist())) for row in seen[0]}) == 4


UNFIT = ["--diffusion ddpm", "--mask-ratio 1", "--mask-schedule exp"]


@pytest.mark.parametrize("flags", UNFIT)
def test_impossible_flags_are_refused(flags):
    with pytest.raises(UserError, match=flags.split()[0]):
        small(flags)
