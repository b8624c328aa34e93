"""tests/probe.py: closed-form cases, literal formulas, masked networks, batches and processes."""

import json
import subprocess
import sys
from functools import partial

import curves
import numpy as np
import probe
import pytest
import torch
from conftest import NETWORK, ROOT, close, fill, make_folder, save_teacher, tiny
from PIL import Image

from diffusion import ImageNoise, make_diffusion
from models import MaskedDiT
from train_diversedit import diversity_terms

normal = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("known", (True, False))
def test_a_block_that_holds_the_label_and_one_of_noise(known):
    y, x = torch.arange(6000) % 10, normal(6000, 24)
    x[:, 20] = 7
    if known:  # at another scale, among noise and beside a constant
        x[:, 3:13] = 5 + 1e-3 * torch.eye(10)[y]
    accuracy = probe.linear_probe(x[:4000], y[:4000], x[4000:], y[4000:])[0]
    assert accuracy == 1 if known else 0.07 < accuracy < 0.13


def test_ridge_is_the_normal_equations_and_its_strength_is_of_training_images():
    y = torch.arange(200) % 3
    target = torch.eye(3).double()[y]
    x = normal(200, 30) * torch.logspace(-2, 1, 30).double() + target.repeat(1, 10)
    z = (x - x.mean(0)) / x.std(0)
    weights = torch.linalg.solve(z.T @ z + 200 * 0.1 * torch.eye(30), z.T @ target)
    (predict,) = probe.ridge(x, y, [0.1])
    fresh = normal(500, 30)
    expected = (fresh @ weights + target.mean(0)).argmax(1)
    assert torch.equal(predict(fresh * x.std(0) + x.mean(0)), expected)
    noise = normal(200, 150)
    assert len({probe.linear_probe(noise, y, noise[:50], y[k : 50 + k])[1] for k in range(3)}) == 1


def test_cka():
    x = normal(2000, 8) * torch.arange(1, 9)
    for same in (x, x @ torch.linalg.qr(normal(8, 8))[0], 3 * x + 5):
        assert probe.cka(x, same) == pytest.approx(1, abs=1e-9)
    assert probe.cka(x, normal(2000, 8)) < 0.02
    x, y = x[:50], x[:50, :5].exp().tanh() + normal(50, 5)
    centre = torch.eye(50).double() - 1 / 50
    k, m = (centre @ (z @ z.T) @ centre for z in (x, y))
    assert probe.cka(x, y) == pytest.approx(((k * m).sum() / k.norm() / m.norm()).item())


@pytest.mark.parametrize("name", ("flow", "gvp", "edm", "ddpm"))
def test_levels_have_one_noise_over_signal_and_bins_one_probability(name):
    diffusion = make_diffusion(name)
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    for level in (0.7, 0.5, 0.3, 0.1):
        t = torch.tensor([probe.time_at(diffusion, level)])
        ratio = diffusion.add_noise(zero, one, t) / diffusion.add_noise(one, zero, t)
        assert ratio.item() == pytest.approx(level / (1 - level), 0.02 if name == "ddpm" else 1e-6)
    torch.manual_seed(0)
    drawn = diffusion.draw_t(20_000, "cpu")
    for p in (0.1, 0.5, 0.9):
        bound = probe.quantile(diffusion, torch.tensor([p]).double())
        assert (drawn < bound).double().mean().item() == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize("class_token", (False, True))
def test_streams_of_masked_networks_are_all_their_patches(class_token):
    net = fill(MaskedDiT((1, 16, 2), class_token=class_token, **NETWORK), "probe").eval()
    x, noise, diffusion = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), make_diffusion("edm")
    found = probe.streams(net, diffusion, x, noise, 0.5)
    assert found.shape == (4, 2, 16, 32)
    x_in, t_in = diffusion.net_inputs(x + noise, torch.ones(2))
    c = net.condition(t_in, torch.tensor([10, 10]))
    _, kept = net.encode_tokens(net.embed(x_in), c, features=range(4))
    assert all(torch.equal(found[k], kept[k][:, -16:]) for k in range(4))


@pytest.fixture
def inputs(tmp_path):
    """A network, its checkpoint, images of two classes, and the flags that name them."""
    data = make_folder(tmp_path / "data", each=15, size=8)
    test = make_folder(tmp_path / "test", each=10, size=8)
    net = tiny(num_classes=2).eval()
    path = save_teacher(tmp_path / "net.pt", net, classes=["ant", "bee"], vae=None, vae_scale=1)
    pixels = np.stack([Image.open(file) for file in sorted(test.glob("*/*.png"))])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    return net, path, x, f"{path} --data {data} --test {test} --bins 3 --out {tmp_path}".split()


def test_loss_and_similarity_are_the_literal_ones(inputs):
    net, path, x, flags = inputs
    diffusion = make_diffusion("flow")
    args = probe.parse_args([*flags, *"--levels 0.3 --images 50 50 4 --batch-size 3".split()])
    found, _ = probe.probe(args, path, torch.device("cpu"))
    total, inside = torch.zeros(3), np.random.default_rng(0).random((4, 3))
    for row, index in enumerate((0, 6, 13, 19)):  # evenly picked
        x0, draw = x[index : index + 1], ImageNoise(0, [index], (3, 8, 8))
        for k in range(3):
            t, noise = torch.tensor([(k + inside[row, k]) / 3]).float(), draw()
            out = net(diffusion.add_noise(x0, noise, t), t, torch.tensor([index // 10]))
            total[k] += diffusion.loss(out, x0, noise, t).mean().item() / 4
    close(torch.tensor(found["loss"]), total, rtol=1e-4, atol=1e-6)
    tokens = probe.streams(net, diffusion, x, ImageNoise(0, range(20), (3, 8, 8))(), 0.3)[[1, 4]]
    _, mi, _ = diversity_terms(tokens, torch.tensor([[0.0, 1], [0, 0]]))
    blocks, (one, four) = found["levels"]["0.3"], tokens.mean(2).double()
    assert abs(blocks["cosine"][1][4]) == pytest.approx(mi.item(), abs=1e-3)
    assert blocks["cka"][4][1] == pytest.approx(probe.cka(one, four), abs=1e-3)
    assert all(blocks["cka"][k][k] == 1 for k in range(5)) and len(blocks["accuracy"]) == 5


def test_batches_and_processes_do_not_matter(inputs, tmp_path):
    found = []
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    for size, run in (("20", []), ("7", torchrun)):
        command = [sys.executable, *run, str(ROOT / "tests" / "probe.py"), *inputs[-1]]
        subprocess.run([*command, "--batch-size", size, "--levels", "0.5"], check=True, timeout=240)
        found.append(json.loads((tmp_path / "probe.json").read_text())["networks"][0])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    one, two = (entry["levels"]["0.5"] for entry in found)
    for name, tolerance in (("accuracy", 0), ("cka", 2e-4), ("cosine", 2e-4)):
        np.testing.assert_allclose(two[name], one[name], atol=tolerance)
    for name in ("probe.png", "pca_0.png"):
        assert len(Image.open(tmp_path / name).convert("RGB").getcolors(2**20)) > 10


def test_curves_of_a_log(tmp_path, monkeypatch):
    """tests/curves.py: what was logged twice counts once, neighbours are averaged."""
    rows = [{"start": 0}, *({"step": k, "loss": v} for k, v in ((2, 9), (2, 1), (4, 3), (6, 5)))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert curves.points(curves.read_log(tmp_path), "loss", 2) == [[3, 2], [6, 5]]
    monkeypatch.setattr("sys.argv", ["curves.py", str(tmp_path), "--out", f"{tmp_path}/a.png"])
    curves.main()
    assert 0 < (np.asarray(Image.open(tmp_path / "a.png")) == 0).all(2).mean() < 0.05
