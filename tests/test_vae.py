"""The Stable-Diffusion VAE against the diffusers library's values, and reading its weights."""

import json
import struct

import pytest
import torch
from conftest import EvalGolden

from models import UserError, load_vae

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(path, tensors):
    """In the format of the suffix."""
    if path.suffix != ".safetensors":
        torch.save(tensors, path)
        return path
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        about = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": offsets}
        data += content
    return write_raw(path, header, data)


def write_raw(path, header, data):
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.fixture(scope="module")
def state():
    """Weights of the golden case of the small network."""
    return EvalGolden("vae_tiny").weights()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tiny_network(tmp_path, suffix):
    g = EvalGolden("vae_tiny")
    vae = load_vae(write(tmp_path / f"vae.{suffix}", g.weights()), groups=16)
    mean, logvar = vae.encode(g.inputs["x"])
    g.check("mean", mean)
    g.check("logvar", logvar)
    g.check("decoded", vae.decode(g.inputs["z"]))
    one_by_one = (*vae.encode(g.inputs["x"], chunk=1), vae.decode(g.inputs["z"], chunk=1))
    for name, value in zip(("mean", "logvar", "decoded"), one_by_one):
        g.check(name, value)
    g.all_checked()
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert vae.latent_channels == 4 and vae.factor == 2


def test_released_architecture(tmp_path):
    g = EvalGolden("vae_sd")
    vae = load_vae(write(tmp_path / "vae.bin", g.weights()))
    assert vae.latent_channels == 4 and vae.factor == 8
    mean, logvar = vae.encode(g.inputs["x"])
    g.check("mean", mean)
    g.check("logvar", logvar)
    decoded = vae.decode(g.inputs["z"])
    g.check("decoded_slice", decoded[:, :, ::4, ::4])
    g.check("decoded_row_mean", decoded.mean(3))
    g.all_checked()
    norms = [m for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}  # 1e-5 would be within the tolerance


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_older_attention_names_give_the_same_network(state, tmp_path, as_convolutions):
    renamed = EvalGolden("vae_tiny").meta["old_attention_names"]
    old = {}
    for name, tensor in reversed(state.items()):
        if name in renamed and as_convolutions and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        old[renamed.get(name, name)] = tensor
    vae = load_vae(write(tmp_path / "old.safetensors", old), groups=16)
    assert all(torch.equal(tensor, state[k]) for k, tensor in vae.state_dict().items())


def test_digests_of_encoder_and_decoder(state, tmp_path):
    """Latents depend on the encoder alone, which sd-vae-ft-ema and -mse share."""
    first = load_vae(write(tmp_path / "vae.bin", state), groups=16)
    for name, other, same in (
        ("quant_conv.bias", "encoder", "decoder"),
        ("decoder.conv_out.bias", "decoder", "encoder"),
    ):
        changed = {**state, name: state[name].nextafter(torch.tensor(9.0))}
        vae = load_vae(write(tmp_path / "other.safetensors", changed), groups=16)
        assert vae.digest(other) != first.digest(other) and vae.digest(same) == first.digest(same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_other_precisions_become_float32(state, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    vae = load_vae(write(tmp_path / "vae.safetensors", state), groups=16)
    for name, tensor in vae.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float())


def test_log_variance_is_clamped(state, tmp_path):
    vae = load_vae(write(tmp_path / "vae.bin", state), groups=16)
    vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 100, -100
    logvar = vae.encode(torch.zeros(1, 3, 16, 16))[1]
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


def test_shape_beyond_the_bytes_of_a_safetensors_file(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        load_vae(write_raw(tmp_path / "broken.safetensors", header, bytes(8)))
