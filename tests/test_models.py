"""The backbone against official code, features and early exit, and the loading of official checkpoints."""

import argparse

import pytest
import torch
from conftest import recipe_tensor

import models
from diffusion import Guided
from models import DiT, load_official, parse_model


def official_state(golden, salt_key="salt"):
    """The official state dict of a case, pos_embed included."""
    state = golden.weights(salt_key)
    for name, shape in golden.meta["weights"]["state_dict"].items():
        if name == "pos_embed":
            state[name] = models.position_embedding(shape[2], int(shape[1] ** 0.5))
    return state


def from_checkpoint(golden, tmp_path, source, wrap=None):
    """Through a file and `load_official`, as a user would."""
    state = official_state(golden)
    torch.save(wrap(state) if wrap else state, tmp_path / "official.pt")
    return load_official(tmp_path / "official.pt", source, golden.config["num_heads"])


def test_dit_forward(golden, tmp_path):
    g = golden("dit_forward")
    model, notes = from_checkpoint(g, tmp_path, "dit")
    assert notes == [] and model.config["learn_sigma"] and model.config["num_classes"] == 10
    i = g.inputs
    with torch.no_grad():
        g.check("out", model(i["x"], i["t"], i["y"]))
        guided = Guided(model, g.config["cfg_scale"], g.config["null_label"], channels=3)(
            i["z"], i["cfg_t"], i["cfg_y"]
        )
        # The official second half carries the unconditional values of what is not guided; ours returns the first half only.
        null = torch.full_like(i["cfg_y"], g.config["null_label"])
        second = torch.cat([guided[:, :3], model(i["z"], i["cfg_t"], null)[:, 3:]], 1)
    g.check("cfg", torch.cat([guided, second]))
    g.all_checked()


def test_sit_forward(golden, tmp_path):
    """Original SiT weights are converted to our direction of time, so f(x, t) = -official(x, 1 - t), and lose the channels SiT drops."""
    g = golden("sit_forward")
    model, notes = from_checkpoint(g, tmp_path, "sit")
    assert any("reversed time" in n for n in notes) and any(
        "dropped 4 output channels" in n for n in notes
    )
    i = g.inputs
    with torch.no_grad():
        g.check("out", -model(i["x"], 1 - i["t"], i["y"]))
        guided = Guided(model, g.config["cfg_scale"], g.config["null_label"], channels=3)(
            i["z"], 1 - i["cfg_t"], i["cfg_y"]
        )
        null = torch.full_like(i["cfg_y"], g.config["null_label"])
        second = torch.cat([guided[:, :3], model(i["z"], 1 - i["cfg_t"], null)[:, 3:]], 1)
    g.check("cfg", -torch.cat([guided, second]))
    g.all_checked()


@pytest.mark.parametrize("case", ["sra_sit_forward", "sra_sit_forward_qknorm"])
def test_sra_forward(golden, tmp_path, case):
    """Training checkpoint of the SRA repository: {"ema", "model", "args": Namespace}, with its projection head."""
    from train_sra import projection_head

    g = golden(case)
    state = official_state(g)
    wrong = {k: torch.zeros_like(v) for k, v in state.items()}
    model, notes = from_checkpoint(
        g,
        tmp_path,
        "sra",
        lambda s: {"ema": s, "model": wrong, "args": argparse.Namespace(lr=1e-4)},
    )
    assert any("ap_head" in n for n in notes) and any("'ema'" in n for n in notes)
    i = g.inputs
    with torch.no_grad():
        out, kept = model(i["x"], i["t"], i["y"], features=(2, 4))
        head = projection_head(g.config["hidden_size"])
        for ours, theirs in ((0, "linear1"), (2, "linear2")):
            head[ours].weight.copy_(state[f"ap_head.{theirs}.weight"])
            head[ours].bias.copy_(state[f"ap_head.{theirs}.bias"])
        g.check("out", out)
        g.check("feat_2", kept[2])
        g.check("feat_4", kept[4])
        g.check("proj_2", head(kept[2]))
        assert torch.equal(model.tokens_after(i["x"], i["t"], i["y"], 2), kept[2])
    g.all_checked()


def tiny(**changes):
    torch.manual_seed(0)
    config = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 48,
        "depth": 4,
        "num_heads": 3,
        "num_classes": 10,
    }
    model = DiT(**{**config, **changes})
    for (
        name,
        parameter,
    ) in model.named_parameters():  # leave the all-zero initialisation of adaLN and the last layer
        parameter.data.copy_(recipe_tensor("test", name, tuple(parameter.shape)))
    return model


def draws(n=3, channels=3):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(n, channels, 8, 8, generator=generator), torch.rand(n, generator=generator)
    return x, t, torch.tensor([1, 9, 10])[:n]


def test_features_of_every_block_and_early_exit():
    model, inputs = tiny(), draws()
    out, kept = model(*inputs, features=(0, 1, 3, 4))
    assert list(kept) == [0, 1, 3, 4] and torch.equal(out, model(*inputs))
    for block, tokens in kept.items():
        assert tokens.shape == (3, 16, 48)
        assert torch.equal(model.tokens_after(*inputs, block), tokens)
    ran = []
    for k, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    model.tokens_after(*inputs, 2)
    assert ran == [1, 2]  # later blocks are not run


def test_train_and_eval_mode_agree_and_initial_output_is_zero():
    model, inputs = tiny(), draws()
    assert torch.equal(model.train()(*inputs), model.eval()(*inputs))
    torch.manual_seed(0)
    fresh = DiT(**model.config)
    out, kept = fresh(*inputs, features=(0, 4))
    assert out.abs().max() == 0 and torch.equal(
        kept[0], kept[4]
    )  # every block starts as the identity


def test_patches_keep_their_place():
    """unpatchify inverts patchify: with an orthogonal patch embedding undone by the last layer, the network returns its input."""
    model = tiny(hidden_size=48)
    x = draws()[0]
    tokens = model.x_embedder.proj.weight.new_zeros(3, 16, 12)
    for row in range(4):
        for column in range(4):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # (N, C, p, p)
            tokens[:, 4 * row + column] = patch.permute(0, 2, 3, 1).flatten(
                1
            )  # row, column, channel
    assert torch.equal(model.unpatchify(tokens), x)


def test_named_sizes_have_the_published_parameter_counts():
    """DiT Table 1 counts (learned variance, 1000 classes, 32 x 32 x 4 latents): S 33 M, B 130 M, L 458 M, XL 675 M."""
    with torch.device("meta"):
        for name, millions in (("S", 32.96), ("B", 130.51), ("L", 458.1), ("XL", 675.13)):
            model = DiT(
                32,
                in_channels=4,
                num_classes=1000,
                learn_sigma=True,
                **parse_model(f"DiT-{name}/2"),
            )
            count = sum(v.numel() for v in model.state_dict().values())
            assert abs(count / 1e6 - millions) < 0.06, (name, count)
    assert parse_model("SiT-XL/2") == parse_model("DiT-XL/2")


@pytest.mark.parametrize("name", ["DiT-XXL/2", "DiT-B/3", "UNet-B/2", "DiT-B", "B/2", ""])
def test_unknown_model(name):
    with pytest.raises(ValueError, match="unknown model"):
        parse_model(name)


def test_load_official_names_every_key_that_does_not_fit(tmp_path):
    state = tiny().state_dict()
    del state["blocks.2.mlp.fc1.bias"], state["blocks.0.attn.qkv.weight"]
    state["surprise.weight"] = torch.zeros(2)
    state["blocks.1.mlp.fc2.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error:
        load_official(tmp_path / "bad.pt", "repa", 3)
    for name in (
        "blocks.2.mlp.fc1.bias",
        "blocks.0.attn.qkv.weight",
        "surprise.weight",
        "blocks.1.mlp.fc2.bias (5,) for (48,)",
    ):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_load_official_refuses_what_is_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"ema": torch.zeros(3)}, tmp_path / "bare.pt")
    cases = {
        "text.pt": "cannot be read",
        "none.pt": "cannot be read",
        "other.pt": "not a DiT or SiT",
    }
    cases |= {"bare.pt": "holds no state dict", "list.pt": "holds no state dict"}
    for name, words in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            load_official(tmp_path / name, "dit", 3)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_repa_checkpoint_with_ddp_prefix_and_projectors(tmp_path):
    model = tiny()
    state = {f"module.{k}": v for k, v in model.state_dict().items()} | {
        "module.projectors.0.0.weight": torch.zeros(2, 2)
    }
    torch.save({"model": state, "ema": state, "opt": {}, "steps": 5}, tmp_path / "repa.pt")
    loaded, notes = load_official(tmp_path / "repa.pt", "repa", 3)
    assert torch.equal(loaded(*draws()), model(*draws())) and any("projectors" in n for n in notes)


def test_checkpointing_runs_blocks_again_in_the_backward_pass():
    """Same gradients, each block twice; no gradient, no second run."""
    network, ran = tiny(), []
    for block in network.blocks:
        block.attn.register_forward_hook(lambda *_: ran.append(1))
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    gradients = []
    for network.checkpointing, times in ((False, 1), (True, 2)):
        ran.clear()
        network.zero_grad()
        network(x, t, y).square().sum().backward()
        assert len(ran) == times * len(network.blocks)
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    ran.clear()
    with torch.no_grad():
        network(x, t, y)
    assert len(ran) == len(network.blocks)
