"""The Stable-Diffusion VAE against the diffusers library's values, and the reading of its weight files, well-meant or not."""

import hashlib
import json
import os
import pickle
import struct

import pytest
import torch
from conftest import STATE_DICTS, EvalGolden

import models
from models import SAFETENSORS_DTYPES, AutoencoderKL, DiT, load_vae, read_safetensors

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_safetensors(path, tensors, pad=0, **metadata):
    """pad: spaces after the header, which move the data away from multiples of eight."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        data += content
    write_raw(path, json.dumps(header).encode() + b" " * pad, data)


def write_raw(path, header, data=b"", length=None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def write(path, tensors):
    (write_safetensors if path.suffix == ".safetensors" else lambda p, t: torch.save(t, p))(
        path, tensors
    )
    return path


def one_line_error(function, path, *words):
    with pytest.raises(ValueError) as error:
        function(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1500 and path.name in message, message
    for word in words:
        assert word in message, message


def old_names(g, state, as_convolutions):
    """The same weights under the older names of the attention."""
    old = g.meta["old_attention_names"]
    reshape = (
        (lambda t: t[:, :, None, None] if t.ndim == 2 else t) if as_convolutions else (lambda t: t)
    )
    return {
        old.get(name, name): reshape(tensor) if name in old else tensor
        for name, tensor in state.items()
    }


@pytest.fixture(scope="module")
def tiny():
    """The golden case of the small network and its weights."""
    g = EvalGolden("vae_tiny")
    return g, g.weights()


@pytest.fixture
def tiny_file(tiny, tmp_path):
    return write(tmp_path / "vae.safetensors", tiny[1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tiny_network(tmp_path, suffix):
    g = EvalGolden("vae_tiny")
    vae, _ = load_vae(write(tmp_path / f"vae.{suffix}", g.weights()), groups=16)
    mean, logvar = vae.encode(g.inputs["x"])
    g.check("mean", mean)
    g.check("logvar", logvar)
    g.check("decoded", vae.decode(g.inputs["z"]))
    g.all_checked()
    assert not vae.training and all(
        p.dtype == torch.float32 and not p.requires_grad for p in vae.parameters()
    )
    assert vae.latent_channels == 4 and vae.factor == 2


def test_released_architecture(tmp_path):
    g = EvalGolden("vae_sd")
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
    assert {module.eps for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)} == {
        1e-6
    }  # 1e-5 is within the tolerance


def test_formats_and_attention_names_give_one_network_and_one_hash(tiny, tmp_path):
    g, state = tiny
    files = [write(tmp_path / "new.safetensors", state), write(tmp_path / "new.bin", state)]
    for as_convolutions in (False, True):
        old = old_names(g, state, as_convolutions)
        assert set(old) != set(state)
        files.append(write(tmp_path / f"old{as_convolutions}.safetensors", old))
        files.append(write(tmp_path / f"old{as_convolutions}.bin", dict(reversed(old.items()))))
    files.append(tmp_path / "disguised.bin")  # formats are told apart by content
    files[-1].write_bytes(files[0].read_bytes())
    loaded = [load_vae(path, groups=16) for path in files]
    literal = hashlib.sha256(
        b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))
    ).hexdigest()
    assert {digest for _, digest in loaded} == {literal}
    for vae, _ in loaded:
        for name, tensor in vae.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    changed = {**state, "quant_conv.bias": state["quant_conv.bias"].nextafter(torch.tensor(9.0))}
    assert load_vae(write(tmp_path / "other.bin", changed), groups=16)[1] != literal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(tiny, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny[1].items()}
    hashes = set()
    for suffix in ("safetensors", "bin"):
        vae, digest = load_vae(write(tmp_path / f"vae.{suffix}", state), groups=16)
        hashes.add(digest)
        assert all(
            t.dtype == torch.float32 and torch.equal(t, state[n].float())
            for n, t in vae.state_dict().items()
        )
    assert len(hashes) == 1
    assert (
        load_vae(
            write(tmp_path / "float32.bin", {n: t.float() for n, t in state.items()}), groups=16
        )[1]
        in hashes
    )


def test_chunks_change_nothing(tiny_file):
    vae, _ = load_vae(tiny_file, groups=16)
    x = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))  # sides that differ
    whole = vae.encode(x, chunk=5)
    assert whole[0].shape == whole[1].shape == (5, 4, 8, 12)
    images = vae.decode(whole[0], chunk=5)
    assert images.shape == x.shape and not images.requires_grad
    sizes = []
    vae.quant_conv.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    vae.post_quant_conv.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output))
    )
    for chunk in (1, 2):
        for ours, expected in zip(vae.encode(x, chunk=chunk), whole):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(whole[0], chunk=chunk), images, atol=2e-5, rtol=1e-5)
    assert sizes == 2 * [1, 1, 1, 1, 1] + 2 * [2, 2, 1]
    assert vae.encode(x[:0])[0].shape == (0, 4, 8, 12)


def test_log_variance_is_clamped_and_sides_are_checked(tiny_file):
    vae, _ = load_vae(tiny_file, groups=16)
    vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 100, -100
    logvar = vae.encode(torch.zeros(1, 3, 16, 16))[1]
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()
    with pytest.raises(ValueError, match="16 x 17"):
        vae.encode(torch.zeros(1, 3, 16, 17))


# Reading .safetensors


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pad", range(8))
def test_every_dtype_at_every_alignment(tmp_path, pad):
    tensors = {
        name: torch.arange(-3, 3).to(dtype).view(2, 3) for name, dtype in SAFETENSORS_DTYPES.items()
    }
    tensors |= {
        "odd": torch.tensor([7], dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "last": torch.ones(2),
    }
    write_safetensors(tmp_path / "all.safetensors", tensors, pad=pad, format="pt")
    loaded = read_safetensors(tmp_path / "all.safetensors")
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_the_mapping_is_private(tiny_file):
    before = tiny_file.read_bytes()
    read_safetensors(str(tiny_file))["encoder.conv_in.bias"].zero_()
    assert tiny_file.read_bytes() == before


def test_the_network_does_not_depend_on_the_file(tiny, tiny_file):
    vae, _ = load_vae(tiny_file, groups=16)
    with open(tiny_file, "r+b") as file:
        file.write(bytes(os.path.getsize(tiny_file)))
    assert torch.equal(vae.encoder.conv_in.weight, tiny[1]["encoder.conv_in.weight"])


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BROKEN = {  # header, data, length if it is not the header's
    "header longer than the file": (entry(), bytes(8), 1 << 62),
    "header one byte longer than the file": (entry(), b"", len(entry()) + 1),
    "header of 2**64 - 1 bytes": (entry(), bytes(8), 2**64 - 1),
    "header cut short": (entry(), bytes(8), 10),
    "empty header": (b"", bytes(8), 0),
    "no JSON": (b"hello there", bytes(8)),
    "no UTF-8": (b'{"\xff\xfe": 1}', bytes(8)),
    "deep nesting": (b"[" * 200_000, b""),
    "a list": (b"[1, 2]", b""),
    "a number": (b"1", b""),
    "entry is a number": (b'{"a": 1}', b""),
    "entry is null": (b'{"a": null}', b""),
    "no offsets": (b'{"a": {"dtype": "F32", "shape": [2]}}', bytes(8)),
    "unknown dtype": (entry("F99"), bytes(8)),
    "dtype is a list": (entry(["F32"]), bytes(8)),
    "shape is a number": (entry(shape=2), bytes(8)),
    "shape is null": (entry(shape=None), bytes(8)),
    "shape of strings": (entry(shape=["2"]), bytes(8)),
    "shape of fractions": (entry(shape=[2.0]), bytes(8)),
    "shape of truth values": (entry(shape=[True, 2]), bytes(8)),
    "negative sides": (entry(shape=[-1, -2]), bytes(8)),
    "shape is larger than the bytes": (entry(shape=[3]), bytes(12)),
    "shape is smaller than the bytes": (entry(shape=[1]), bytes(8)),
    "dtype is larger than the bytes": (entry("F64"), bytes(16)),
    "product that wraps around": (entry(shape=[2**33, 2**31]), bytes(8)),
    "sides beyond 64 bits": (entry(shape=[0, 2**70], offsets=[0, 0]), bytes(8)),
    "very many sides": (entry(shape=[1] * 5000 + [2]), bytes(8)),
    "end beyond the file": (entry(offsets=[4, 12]), bytes(8)),
    "begin beyond the file": (entry(offsets=[800, 808]), bytes(8)),
    "negative begin": (entry(offsets=[-8, 0]), bytes(8)),
    "end before begin": (entry(shape=[0], offsets=[8, 0]), bytes(8)),
    "three offsets": (entry(offsets=[0, 4, 8]), bytes(8)),
    "huge offsets": (entry(offsets=[2**80, 2**80 + 8]), bytes(8)),
    "name of several lines": (
        entry(shape=[3]).replace(b'"a"', json.dumps("x\ny\ud800" * 5000).encode()),
        bytes(8),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(tmp_path, case):
    path = tmp_path / "broken.safetensors"
    write_raw(path, *BROKEN[case])
    one_line_error(read_safetensors, path, "cannot be read as safetensors")
    one_line_error(load_vae, path, "cannot be read as safetensors")


def test_safetensors_of_few_bytes_or_a_huge_header(tmp_path):
    path = tmp_path / "short.safetensors"
    for size in range(8):
        path.write_bytes(bytes(size))
        one_line_error(read_safetensors, path)
    with open(path, "wb") as file:  # sparse
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    one_line_error(read_safetensors, path, "a header of 100000001 bytes")
    one_line_error(read_safetensors, tmp_path / "none.safetensors", "No such file")
    (tmp_path / "folder.safetensors").mkdir()
    one_line_error(load_vae, tmp_path / "folder.safetensors")


# Files that are no VAE


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_does_not_run(tiny, tmp_path):
    for name, save in (
        ("zip.bin", torch.save),
        ("raw.bin", lambda content, path: path.write_bytes(pickle.dumps(content))),
    ):
        save({**tiny[1], "quant_conv.bias": Hostile(tmp_path / "ran")}, tmp_path / name)
        one_line_error(load_vae, tmp_path / name, "cannot be read")
        assert not (tmp_path / "ran").exists()
        with pytest.raises(FileExistsError):  # the trap works
            (tmp_path / "ran").mkdir()
            torch.load(tmp_path / name, weights_only=False) if name == "zip.bin" else pickle.loads(
                (tmp_path / name).read_bytes()
            )
        (tmp_path / "ran").rmdir()


def test_keys_that_do_not_fit_are_named(tiny, tmp_path):
    state = dict(tiny[1])
    del state["decoder.conv_out.bias"], state["encoder.mid_block.attentions.0.to_q.weight"]
    state["surprise\nweight"] = torch.zeros(2)
    state["quant_conv.bias"] = torch.zeros(5)
    words = [
        "missing decoder.conv_out.bias, encoder.mid_block.attentions.0.to_q.weight",
        "unexpected surprise\\nweight",
    ]
    for suffix in ("safetensors", "bin"):
        path = write(tmp_path / f"bad.{suffix}", state)
        one_line_error(
            lambda p: load_vae(p, groups=16),
            path,
            *words,
            "wrong shape quant_conv.bias (5,) for (8,)",
        )
    without_decoder = {
        name: tensor for name, tensor in tiny[1].items() if not name.startswith("decoder")
    }
    one_line_error(
        lambda p: load_vae(p, groups=16),
        write(tmp_path / "half.bin", without_decoder),
        "decoder.conv_in.bias",
        " more",
    )
    for name in (
        "encoder.down_blocks.1.resnets.0.conv1.weight",
        "post_quant_conv.weight",
    ):  # the architecture is read from these
        one_line_error(
            load_vae,
            write(tmp_path / "less.bin", {n: t for n, t in tiny[1].items() if n != name}),
            name,
        )
    g = EvalGolden("vae_tiny")
    twice = {**tiny[1], **old_names(g, tiny[1], False)}
    one_line_error(
        lambda p: load_vae(p, groups=16),
        write(tmp_path / "two.safetensors", twice),
        "twice",
        "to_q",
    )
    one_line_error(
        lambda p: load_vae(p, groups=24),
        write(tmp_path / "vae.bin", tiny[1]),
        "32, 64 channels",
        "24 groups",
    )


def other_files(state):
    """Name -> (content to save, words of the error)."""
    dit = DiT(8, 2, 4, 48, 2, 3, 10).state_dict()
    first = "encoder.down_blocks.0.resnets.0.conv1.weight"
    return {
        "dit.safetensors": (dit, "no Stable-Diffusion VAE"),
        "dit.bin": (dit, "no Stable-Diffusion VAE"),
        "empty.bin": ({}, "no Stable-Diffusion VAE"),
        "empty.safetensors": ({}, "no Stable-Diffusion VAE"),
        "training.pt": ({"model": dit, "ema": dit, "step": 3}, "no state dict"),
        "list.pt": ([1], "no state dict"),
        "numbers.pt": ({1: torch.zeros(2)}, "no state dict"),
        "integers.bin": (
            {**state, "quant_conv.bias": torch.zeros(8, dtype=torch.int64)},
            "floating point",
        ),
        "meta.bin": ({**state, "quant_conv.bias": torch.zeros(8, device="meta")}, "floating point"),
        "sparse.bin": ({**state, "quant_conv.bias": torch.zeros(8).to_sparse()}, "floating point"),
        "expanded.bin": (
            {**state, first: torch.zeros(1).expand(4096, 4096, 3, 3)},
            "smaller than its tensors",
        ),
        "nothing.safetensors": (
            {**state, first: torch.zeros(1 << 40, 0, 3, 3)},
            "no convolution encoder.down_blocks.0",
        ),
        "flat.safetensors": (
            {**state, first: torch.zeros(32)},
            "no convolution encoder.down_blocks.0",
        ),
        "scalar.bin": (
            {**state, "encoder.conv_in.weight": torch.tensor(1.0)},
            "no convolution encoder.conv_in",
        ),
    }


def test_other_files_are_refused(tiny, tmp_path):
    for name, (content, words) in other_files(tiny[1]).items():
        one_line_error(load_vae, write(tmp_path / name, content), words)
    (tmp_path / "text.bin").write_text("hello\nthere, this is no file of weights")
    one_line_error(load_vae, tmp_path / "text.bin", "cannot be read")
    one_line_error(load_vae, tmp_path / "none.bin", "No such file")
    for suffix in ("bin", "safetensors"):
        whole = write(tmp_path / f"vae.{suffix}", tiny[1]).read_bytes()
        for size in (0, 3, 7, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / f"cut.{suffix}").write_bytes(whole[:size])
            one_line_error(load_vae, tmp_path / f"cut.{suffix}", "cannot be read")


def test_tensors_that_share_their_bytes_are_refused(tiny, tmp_path):
    """A file of a few bytes may claim any number of tensors of that size."""
    header = {
        name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [0, t.nbytes]}
        for name, t in tiny[1].items()
    }
    write_raw(
        tmp_path / "same.safetensors",
        json.dumps(header).encode(),
        bytes(max(t.nbytes for t in tiny[1].values())),
    )
    one_line_error(load_vae, tmp_path / "same.safetensors", "smaller than its tensors")


def test_parity_with_diffusers(tmp_path):
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is not installed: the stored values above stand for it"
    )
    torch.manual_seed(0)
    config = {
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "latent_channels": 4,
    }
    down, up = 3 * ["DownEncoderBlock2D"], 3 * ["UpDecoderBlock2D"]
    theirs = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **config).eval()
    theirs.save_pretrained(tmp_path / "new")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    ours, digest = load_vae(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    assert load_vae(tmp_path / "bin" / "diffusion_pytorch_model.bin")[1] == digest
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        for value, expected in zip(ours.encode(x), (posterior.mean, posterior.logvar)):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours.decode(posterior.mean), theirs.decode(posterior.mean).sample, atol=1e-5, rtol=1e-5
        )
    assert models.VAE_SCALE == theirs.config.scaling_factor


def test_bf16_autocast_is_near_float32():
    """As sample.py --precision bf16 decodes: outputs are float32 or bfloat16 images within a few grey levels of the exact ones."""
    torch.manual_seed(0)
    vae = AutoencoderKL(channels=(32, 32, 32, 32), layers=1)
    z = torch.randn(2, 4, 4, 4)
    exact = vae.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        images, (mean, _) = vae.decode(z).float(), vae.encode(exact)
    assert 0 < (images - exact).abs().max() < 0.05 * exact.abs().max()
    assert 0 < (mean - vae.encode(exact)[0]).abs().max() < 0.05 * mean.abs().max()
