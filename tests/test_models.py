"""The backbone against official code, features and early exit, official checkpoints."""

import argparse

import pytest
import torch
from conftest import NETWORK, official_state, tiny

from diffusion import Guided
from models import DiT, MaskedDiT, UserError, load_official, parse_model
from train_sra import projection_head


def from_file(golden, tmp_path, source, wrap=lambda state: state):
    """Through a file and `load_official`, as a user would."""
    torch.save(wrap(official_state(golden)), tmp_path / "official.pt")
    return load_official(tmp_path / "official.pt", source, golden.config["num_heads"])


@pytest.mark.parametrize("source", ["dit", "sit"])
def test_official_forward(golden, tmp_path, source):
    """Original SiT runs the other way, f(x, t) = -official(x, 1 - t), and drops four channels."""
    g = golden(f"{source}_forward")
    model, notes = from_file(g, tmp_path, source)
    i, null, sit = g.inputs, g.config["null_label"], source == "sit"
    assert ["reversed time" in str(notes), "output channels" in str(notes)] == [sit, sit]
    t, cfg_t = (1 - time if sit else time for time in (i["t"], i["cfg_t"]))
    sign = -1 if sit else 1
    with torch.no_grad():
        g.check("out", sign * model(i["x"], t, i["y"]))
        first = Guided(model, g.config["cfg_scale"], null, channels=3)(i["z"], cfg_t, i["cfg_y"])
        # the official second half: guided channels, and the others without condition
        rest = model(i["z"], cfg_t, torch.full_like(i["cfg_y"], null))[:, 3:]
        second = torch.cat([first[:, :3], rest], 1)
        g.check("cfg", sign * torch.cat([first, second]))
    g.all_checked()


@pytest.mark.parametrize("case", ["sra_sit_forward", "sra_sit_forward_qknorm"])
def test_sra_forward(golden, tmp_path, case):
    """A training checkpoint of the SRA repository: both networks, arguments, projection head."""
    g = golden(case)
    state = official_state(g)
    wrong = {k: torch.zeros_like(v) for k, v in state.items()}
    content = {"ema": state, "model": wrong, "args": argparse.Namespace(lr=1e-4)}
    model, notes = from_file(g, tmp_path, "sra", lambda _: content)
    assert "ap_head" in str(notes) and "'ema'" in str(notes)
    head = projection_head(g.config["hidden_size"])
    names = {"linear1": "0", "linear2": "2"}
    own = {f"{names[a]}.{p}": f"ap_head.{a}.{p}" for a in names for p in ("weight", "bias")}
    head.load_state_dict({ours: state[theirs] for ours, theirs in own.items()})
    inputs = g.inputs["x"], g.inputs["t"], g.inputs["y"]
    with torch.no_grad():
        out, kept = model(*inputs, features=(2, 4))
        g.check("out", out)
        g.check("feat_2", kept[2])
        g.check("feat_4", kept[4])
        g.check("proj_2", head(kept[2]))
    g.all_checked()


@pytest.mark.parametrize("name", ["h_embedder", "r_embedder"])
def test_meanflow_forward(golden, tmp_path, name):
    """Under the names of both ports; without a length of the interval it is 0, and embedded."""
    g = golden("meanflow_forward")

    def renamed(state):
        return {key.replace("h_embedder", name): v for key, v in state.items()}

    model, _ = from_file(g, tmp_path, "meanflow", renamed)
    assert model.config["interval"] and "interval" not in tiny().config
    i = g.inputs
    with torch.no_grad():
        g.check("out", model(i["x"], i["t"], i["y"], h=i["h"]))
        g.check("out_h0", model(i["x"], i["t"], i["y"]))
    g.all_checked()


def test_repa_checkpoint_with_ddp_prefix_and_projectors(tmp_path):
    model = tiny()
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    state["module.projectors.0.0.weight"] = torch.zeros(2, 2)
    torch.save({"model": state, "ema": state, "opt": {}, "steps": 5}, tmp_path / "repa.pt")
    loaded, notes = load_official(tmp_path / "repa.pt", "repa", 3)
    assert torch.equal(loaded(*draws()), model(*draws())) and "projectors" in str(notes)


def test_official_weights_that_do_not_fit_are_named(tmp_path):
    missing, more, other = "blocks.0.attn.qkv.weight", "surprise.weight", "blocks.1.mlp.fc2.bias"
    state = {**tiny().state_dict(), more: torch.zeros(2), other: torch.zeros(5)}
    del state[missing]
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError) as error:
        load_official(tmp_path / "bad.pt", "repa", 3)
    assert all(name in str(error.value) for name in (missing, more, other))


# The network's own rules


def draws():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 3, 8, 8, generator=generator), torch.rand(3, generator=generator)
    return x, t, torch.tensor([1, 9, 10])


def test_features_of_every_block_and_early_exit():
    model, inputs, ran = tiny(), draws(), []
    out, kept = model(*inputs, features=(0, 1, 3, 4))
    assert list(kept) == [0, 1, 3, 4] and torch.equal(out, model(*inputs))
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    for block, tokens in kept.items():
        ran.clear()
        assert torch.equal(model.tokens_after(*inputs, block), tokens)
        assert len(ran) == block  # later blocks are not run


def test_every_block_starts_as_the_identity_and_the_output_as_zero():
    out, kept = DiT(**NETWORK)(*draws(), features=(0, 3))
    assert out.abs().max() == 0 and torch.equal(kept[0], kept[3])


def test_named_sizes_have_the_published_parameter_counts():
    """DiT Table 1, with learned variance; MaskDiT's with its decoder, what is trained."""
    shape = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
    published = {
        "S": (32.96, 68.1),
        "B": (130.51, 175.6),
        "L": (458.1, 509.8),
        "XL": (675.13, 730.1),
    }
    with torch.device("meta"):
        for size, (plain, masked) in published.items():
            size = parse_model(f"DiT-{size}/2")
            state = DiT(**shape, **size, learn_sigma=True).state_dict()
            assert abs(sum(v.numel() for v in state.values()) / 1e6 - plain) < 0.06
            parameters = MaskedDiT(**shape, **size).parameters()
            assert abs(sum(p.numel() for p in parameters) / 1e6 - masked) < 0.1
        mean_flow = DiT(**shape, **parse_model("SiT-XL/2"), interval=True).parameters()
        assert abs(sum(p.numel() for p in mean_flow) / 1e6 - 676) < 1
    assert parse_model("SiT-XL/2") == parse_model("DiT-XL/2")


@pytest.mark.parametrize("name", ["DiT-XXL/2", "DiT-B/3", "UNet-B/2", "DiT-B", ""])
def test_unknown_model(name):
    with pytest.raises(UserError, match="model"):
        parse_model(name)


def test_checkpointing_runs_blocks_again_in_the_backward_pass():
    """Same gradients, each block twice."""
    network, ran = tiny(), []
    for block in network.blocks:
        block.attn.register_forward_hook(lambda *_: ran.append(1))
    gradients = []
    for network.checkpointing, times in ((False, 1), (True, 2)):
        ran.clear()
        network.zero_grad()
        network(*draws()).square().sum().backward()
        assert len(ran) == times * len(network.blocks)
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
