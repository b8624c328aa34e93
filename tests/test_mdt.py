"""train_mdt.py and MaskedDiT against the values of the official code, and the method's rules."""

import math

import numpy as np
import torch
from conftest import NETWORK, call, close, draws, fill, forwards, official_state, one_by_one, small

from diffusion import EDM, Guided, ImageNoise, sample_ode
from models import MaskedDiT, load_official, load_weights, position_embedding
from train_mdt import MaskDiT, mask_ratio_at, parse_args


def official_file(golden, tmp_path):
    """A checkpoint as MaskDiT saves it: wrapped, one-hot labels, no row for the null label."""
    state = official_state(golden)
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
    fixed = {"t": sigma, "noise": i["noise"], "drop": torch.ones(4), "mask": i["mask_draw"]}
    for name, ours in (("total", "loss"), ("dsm", "denoise"), ("mae", "mae")):
        g.check(name, one_by_one(method, i["x0"], y, fixed, ours))
    runs = forwards(method.model)
    terms = method(i["x0"], y, **fixed)
    close(terms["loss"], g.outputs["total"].mean(), rtol=1e-4, atol=1e-5)
    (inputs, out), *_ = runs
    assert torch.equal(inputs[3], i["ids_keep"])
    x_t = i["x0"] + sigma.reshape(-1, 1, 1, 1) * i["noise"]
    g.check("D", edm.denoise(out, x_t, sigma))
    unmasked = MaskDiT(parse_args(["--mask-ratio", "0"]), g.network(), edm)
    load_weights(unmasked.model, "model", file, "maskdit")
    g.check("unmasked", one_by_one(unmasked, i["x0"], y, fixed, "loss"))
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


def test_dropped_tokens_are_really_dropped_and_hidden_values_reach_nothing():
    """The encoder runs on 8 of 16 tokens; hidden patches change the raw output nowhere."""
    method = small("train_mdt")
    x0, y, fixed = draws(method)
    runs = [forwards(block) for block in method.model.blocks]
    method(x0, y, **fixed)
    assert [run[0][1].shape[1] for run in runs] == [8] * 6
    ids_keep = fixed["mask"].argsort(1)[:, :8]
    hidden = torch.ones(4, 16).scatter(1, ids_keep, 0.0)
    pixels = hidden.reshape(4, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        a = method.model(x0, fixed["t"], y, ids_keep)
        assert torch.equal(method.model(x0 + 100 * pixels, fixed["t"], y, ids_keep), a)


def test_with_nothing_left_to_hide_it_is_plain_edm():
    """The ratio is 1e-18 in the last steps of this schedule: the official code saves NaN."""
    late = small("train_mdt", "--mask-schedule cosine4 --steps 100000")
    late.step = 99_997
    assert 0 < mask_ratio_at(99_997, 100_000, 0.5, "cosine4") < 1e-15
    x0, y, fixed = draws(late)
    direct = small("train_mdt", "--mask-ratio 0")(x0, y, **fixed)["loss"]
    assert torch.equal(late(x0, y, **fixed)["loss"], direct)


def test_without_reconstruction_the_mask_token_is_a_constant_zero():
    for weight, zero in (("0", True), ("0.1", False)):
        method = MaskDiT(parse_args(["--mae-weight", weight]), NETWORK, EDM())
        assert method.model.mask_token.any() != zero


def test_mask_ratio_schedules():
    assert [mask_ratio_at(k, 10, 0.5, "constant") for k in (0, 5, 10)] == [0.5] * 3
    assert [mask_ratio_at(k, 10, 0.5, "linear") for k in (0, 5, 10, 20)] == [0, 0.25, 0.5, 0.5]
    assert [mask_ratio_at(k, 10, 0.5, "fall") for k in (0, 5, 10, 20)] == [0.5, 0.25, 0, 0]
    assert math.isclose(mask_ratio_at(5, 10, 0.5, "cosine2"), 0.25)
    cosine4 = [mask_ratio_at(k, 1000, 0.5, "cosine4") for k in range(1000)]
    assert abs(sum(cosine4) / 1000 - 0.1875) < 1e-3  # mean ratio of the official tuning
