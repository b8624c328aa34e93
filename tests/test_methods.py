"""What all methods have in common: the plain model without their terms, gradients, flags."""

import pytest
import torch
from conftest import METHODS, NETWORK, draws, fill, forwards, save_teacher, small

from diffusion import DIFFUSIONS
from models import DiT, UserError


@pytest.fixture
def make(tmp_path):
    """make(line): the method of "script flags", with a teacher for Self-Transcendence."""

    def make(line):
        if "--stage 2" in line and "--align-weight 0" not in line:
            teacher = fill(DiT(**{**NETWORK, "depth": 6, "qk_norm": True}), "weights")
            line = f"{line} --teacher {save_teacher(tmp_path / 'teacher.pt', teacher)}"
        script, _, flags = line.partition(" ")
        return small(script, flags)

    return make


PLAIN = [  # without its own terms, with them
    ("train_sra --align-weight 0", "train_sra"),
    ("train_mdt --mask-ratio 0", "train_mdt --mask-ratio 0"),
    ("train_discriminative --align-weight 0 --mask-ratio 0", "train_discriminative --mask-ratio 0"),
    ("train_selftranscendence --align-weight 0", "train_selftranscendence"),
    ("train_selftranscendence --stage 2 --align-weight 0", "train_selftranscendence --stage 2"),
    (
        "train_diversedit --long-residual none --diversity-weight 0",
        "train_diversedit --long-residual none",
    ),
]


@pytest.mark.parametrize("off, on", PLAIN)
def test_without_its_own_terms_a_method_is_the_plain_model(off, on, make):
    """Loss and gradients bit for bit, no head, no teacher; with them L_denoise is the same."""
    masked = off.startswith(("train_mdt", "train_discriminative"))
    for kind in DIFFUSIONS[:3] if masked else DIFFUSIONS:
        plain = make(f"{off} --diffusion {kind}")
        assert not [n for n in ("head", "teacher", "pairs") if hasattr(plain, n)]
        assert not getattr(plain, "frozen", None)
        plain.ema.tokens_after = None  # a call would fail
        x0, y, drawn = draws(plain)
        terms = plain(x0, y, **drawn)
        assert not any(value for name, value in terms.items() if name not in ("loss", "denoise"))
        x_t = plain.diffusion.add_noise(x0, drawn["noise"], drawn["t"])
        inputs = plain.diffusion.net_inputs(x_t, drawn["t"])
        out = plain.model(*inputs, torch.where(drawn["drop"] < 0.1, 10, y))
        direct = plain.diffusion.loss(out, x0, drawn["noise"], drawn["t"]).mean()
        assert torch.equal(terms["loss"], direct)
        parameters = list(plain.model.parameters())
        own = torch.autograd.grad(terms["loss"], parameters, materialize_grads=True)
        expected = torch.autograd.grad(direct, parameters, materialize_grads=True)
        assert all(torch.equal(a, b) for a, b in zip(own, expected))
        plain.after_step(0, 10)
        if kind == "flow":
            assert torch.equal(make(f"{on} --diffusion flow")(x0, y, **drawn)["denoise"], direct)


TOKEN = "--summary token"
MODES = {  # flags, and trainable parameters that get a gradient of zero
    "train_sra": "",
    "train_sra --diffusion ddpm": "",
    "train_mdt": "",
    "train_mdt --mask-ratio 0": "model.mask_token",
    "train_mdt --mae-weight 0 --diffusion flow": "",
    "train_discriminative": "",
    f"train_discriminative {TOKEN} --gen-tokens visible --mask-ratio 0": "",
    "train_discriminative --summary mean --diffusion flow": "",
    "train_discriminative --detach-encoder --no-centring": "",
    f"train_discriminative {TOKEN} --align-weight 0": "",
    "train_selftranscendence --t-mode masked --t-range 0 1 --diffusion gvp": "",
    "train_selftranscendence --t-mode selected --stage1-target x0": "",
    "train_selftranscendence --t-mode released --no-qk-norm": "",
    "train_selftranscendence --stage 2 --t-mode selected --drop-target skip": "",
    "train_selftranscendence --stage 2 --t-mode all --drop-target unconditional": "",
    "train_selftranscendence --stage 2 --stop-step 0": "head.",
    "train_diversedit --long-residual post --diffusion ddpm": "",
    "train_diversedit --long-residual none --pairs anchor --anchor-block 2": "",
    "train_diversedit --pair-layers 4 --align-weight 0.2": "",
    "train_diversedit --align-weight 0.2 --diversity-weight 0 --long-residual none": "",
}


@pytest.mark.parametrize("line", MODES)
def test_every_trainable_parameter_has_a_gradient_and_no_other(line, make):
    """The method's own term reaches the first block."""
    method = make(line)
    x0, y, drawn = draws(method)
    terms, first = method(x0, y, **drawn), method.model.blocks[0].attn.qkv.weight
    for name in terms.keys() & {"align", "mae", "patch", "diversity"}:
        if terms[name] != 0:
            assert torch.autograd.grad(terms[name], first, retain_graph=True)[0].any(), name
    terms["loss"].backward()
    for name, parameter in method.named_parameters():
        frozen = name.startswith(("ema.", "teacher"))
        constant = name == "model.mask_token" and "--mae-weight 0" in line
        assert parameter.requires_grad != (frozen or constant), name
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            unused = MODES[line] and name.startswith(MODES[line])
            assert parameter.grad.any() != bool(unused), name


@pytest.mark.parametrize("line", [*METHODS, "train_selftranscendence --stage 2"])
def test_losses_are_fp32_under_autocast(line, make, monkeypatch):
    """With the networks out of it, bf16 autocast changes no term."""
    method = make(line)
    x0, y, drawn = draws(method)
    expected = method(x0, y, **drawn)
    call = torch.nn.Module.__call__

    def networks_in_fp32(module, *inputs, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=module is method):
            return call(module, *inputs, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", networks_in_fp32)
    torch.testing.assert_close(method(x0, y, **drawn), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "line, kept", [("train_mdt --mask-ratio 0.45", 8), ("train_discriminative", 12)]
)
def test_every_image_hides_its_own_tokens(line, kept, make):
    """int(16 * 0.55) = 8, int(16 * 0.8) = 12."""
    method = make(line)
    runs = forwards(method.model)
    method(*draws(method, 8)[:2])
    ids_keep = runs[0][0][3]
    assert ids_keep.shape == (8, kept) and len({tuple(sorted(r)) for r in ids_keep.tolist()}) > 6


IMPOSSIBLE = [  # more of them in test_bad_input.py; the first flag is named
    "train_sra --align-decay 5 0",
    "train_mdt --diffusion ddpm",
    "train_discriminative --diffusion ddpm",
    "train_discriminative --detach-encoder --align-weight 0",
    "train_selftranscendence --diffusion edm",
    "train_selftranscendence --t-range 0.7 0.4",
    "train_selftranscendence --stop-step 10",
    "train_selftranscendence --stage1-target x0 --stage 2",
    "train_diversedit --weight-range 0.5 0.1",
    "train_diversedit --omega 3",
    "train_diversedit --student-block 9 --align-weight 0.2",
]


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_impossible_flags_are_refused(line, make):
    with pytest.raises(UserError, match=line.split()[1]):
        make(line)
