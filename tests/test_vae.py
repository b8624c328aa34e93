"""The Stable-Diffusion VAE against the diffusers library's values, and reading its weights."""

import json
import struct

import pytest
import torch
from conftest import STATE_DICTS, EvalGolden, close, tiny

from models import SAFETENSORS_DTYPES, VAE_SCALE, AutoencoderKL, load_vae, read_safetensors


def write(path, tensors):
    """In the format of the suffix."""
    if path.suffix != ".safetensors":
        torch.save(tensors, path)
        return path
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        about = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": offsets}
        data += content
    return write_raw(path, json.dumps(header).encode(), data)


def write_raw(path, header, data=b"", length=None):
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


@pytest.fixture(scope="module")
def state():
    """Weights of the golden case of the small network."""
    return EvalGolden("vae_tiny").weights()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tiny_network(eval_golden, tmp_path, suffix):
    g = eval_golden("vae_tiny")
    vae, _ = load_vae(write(tmp_path / f"vae.{suffix}", g.weights()), groups=16)
    mean, logvar = vae.encode(g.inputs["x"])
    g.check("mean", mean)
    g.check("logvar", logvar)
    g.check("decoded", vae.decode(g.inputs["z"]))
    g.all_checked()
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert vae.latent_channels == 4 and vae.factor == 2


def test_released_architecture(eval_golden, tmp_path):
    g = eval_golden("vae_sd")
    vae, _ = load_vae(write(tmp_path / "vae.bin", g.weights()))
    assert vae.latent_channels == 4 and vae.factor == 8
    mean, logvar = vae.encode(g.inputs["x"])
    g.check("mean", mean)
    g.check("logvar", logvar)
    decoded = vae.decode(g.inputs["z"])
    g.check("decoded_slice", decoded[:, :, ::4, ::4])
    g.check("decoded_row_mean", decoded.mean(3))
    g.all_checked()


def test_names_and_shapes_of_the_default_network():
    with torch.device("meta"):
        vae = AutoencoderKL()
    ours = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert ours == {name: shape for name, (shape, _) in STATE_DICTS["vae_sd"].items()}
    norms = [m for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}  # 1e-5 would be within the tolerance


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_older_attention_names_give_the_same_network_and_hash(state, tmp_path, as_convolutions):
    renamed = EvalGolden("vae_tiny").meta["old_attention_names"]
    old = {}
    for name, tensor in reversed(state.items()):
        if name in renamed and as_convolutions and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        old[renamed.get(name, name)] = tensor
    digest = load_vae(write(tmp_path / "new.bin", state), groups=16)[1]
    for suffix in ("safetensors", "bin"):
        vae, again = load_vae(write(tmp_path / f"old.{suffix}", old), groups=16)
        assert again == digest
        assert all(torch.equal(tensor, state[k]) for k, tensor in vae.state_dict().items())
    changed = {**state, "quant_conv.bias": state["quant_conv.bias"].nextafter(torch.tensor(9.0))}
    assert load_vae(write(tmp_path / "other.bin", changed), groups=16)[1] != digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(state, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    vae, _ = load_vae(write(tmp_path / "vae.safetensors", state), groups=16)
    for name, tensor in vae.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float())


def test_chunks_change_nothing(state, tmp_path):
    vae, _ = load_vae(write(tmp_path / "vae.bin", state), groups=16)
    x = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    whole = vae.encode(x, chunk=5)
    assert whole[0].shape == whole[1].shape == (5, 4, 8, 12)
    images = vae.decode(whole[0], chunk=5)
    for chunk in (1, 2):
        for ours, expected in zip(vae.encode(x, chunk=chunk), whole):
            close(ours, expected, atol=2e-5, rtol=1e-5)
        close(vae.decode(whole[0], chunk=chunk), images, atol=2e-5, rtol=1e-5)


def test_log_variance_is_clamped(state, tmp_path):
    vae, _ = load_vae(write(tmp_path / "vae.bin", state), groups=16)
    vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 100, -100
    logvar = vae.encode(torch.zeros(1, 3, 16, 16))[1]
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


def test_every_dtype(tmp_path):
    tensors = {}
    for name, dtype in SAFETENSORS_DTYPES.items():
        tensors[name] = torch.arange(-3, 3).to(dtype).view(2, 3)
    tensors |= {"odd": torch.tensor([7], dtype=torch.uint8), "scalar": torch.tensor(2.5)}
    tensors |= {"none": torch.zeros(0, 3), "last": torch.ones(2)}  # not at a multiple of four
    loaded = read_safetensors(write(tmp_path / "all.safetensors", tensors))
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def header(shape, offsets):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return json.dumps({"a": entry}).encode()


BROKEN = {  # header, data, length if it is not the header's
    "header longer than the file": (header([2], [0, 8]), bytes(8), 1 << 62),
    "no JSON": (b"hello there", bytes(8)),
    "shape larger than the bytes": (header([3], [0, 8]), bytes(8)),
    "end beyond the file": (header([2], [4, 12]), bytes(8)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(tmp_path, case):
    path = write_raw(tmp_path / "broken.safetensors", *BROKEN[case])
    with pytest.raises(ValueError, match="cannot be read"):
        load_vae(path)


def test_weights_that_do_not_fit_are_named(state, tmp_path):
    bad = dict(state)
    del bad["decoder.conv_out.bias"]
    bad["surprise.weight"] = torch.zeros(2)
    bad["quant_conv.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        load_vae(write(tmp_path / "bad.bin", bad), groups=16)
    for name in ("decoder.conv_out.bias", "surprise.weight", "quant_conv.bias"):
        assert name in str(error.value)


def test_files_that_are_no_vae_are_refused(tmp_path):
    dit = tiny().state_dict()
    for name, content in (
        ("dit.safetensors", dit),
        ("empty.bin", {}),
        ("training.pt", {"model": dit, "step": 3}),
        ("list.pt", [1]),
    ):
        with pytest.raises(ValueError, match=name):
            load_vae(write(tmp_path / name, content))


def test_parity_with_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the stored values above stand for it")
    torch.manual_seed(0)
    blocks = {
        "down_block_types": 3 * ["DownEncoderBlock2D"],
        "up_block_types": 3 * ["UpDecoderBlock2D"],
        "block_out_channels": (32, 32, 64),
    }
    theirs = diffusers.AutoencoderKL(**blocks, norm_num_groups=32, latent_channels=4).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_vae(tmp_path / "diffusion_pytorch_model.safetensors")
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        expected = theirs.decode(posterior.mean).sample
        for value, other in zip(ours.encode(x), (posterior.mean, posterior.logvar)):
            close(value, other, atol=1e-5, rtol=1e-5)
        close(ours.decode(posterior.mean), expected, atol=1e-5, rtol=1e-5)
    assert VAE_SCALE == theirs.config.scaling_factor
