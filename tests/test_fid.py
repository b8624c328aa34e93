"""fid.py: network and metrics against reference values, and the command line on small images."""

import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import EVAL, ROOT, EvalGolden, recipe_draw
from PIL import Image

import fid

ALL = ("fid", "sfid", "inception_score", "precision", "recall")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The network with the tensors of README_eval: gain sqrt(2), but for fc.weight."""
    weights = EvalGolden("inception_s64").weights("inception")
    weights |= {name: math.sqrt(2) * v for name, v in weights.items() if v.ndim == 4}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(fid.InceptionV3().state_dict() | weights, path)
    return fid.load_network(inception=path)[0]


def inception_images(case):
    """uint8 (N, 3, H, W): every drawn pixel is repeated block x block, then cropped."""
    spec = EVAL[case]["inputs"]["images"]
    draw = recipe_draw(EVAL[case]["salt"], case.removeprefix("eval_"), "images")
    drawn = draw.randint(0, 256, spec["drawn_shape"]).astype(np.uint8)
    height, width = spec["shape"][2:]
    images = drawn.repeat(spec["block"], 2).repeat(spec["block"], 3)[:, :, :height, :width]
    return torch.from_numpy(images.copy())


@pytest.mark.parametrize("size", [64, 256, 299, 400])
def test_inception_matches_both_reference_codes(size, inception):
    golden = EvalGolden(f"inception_s{size}")
    images = inception_images(f"inception_s{size}")
    golden.check("resize_tf1_slice", fid.resize_tf1(images)[:, :, ::23, ::29])
    golden.check("resize_torch_slice", fid.resize_pytorch_fid(images)[:, :, ::23, ::29])
    with torch.inference_mode():
        inception.resize = "pytorch-fid"
        pool = inception(images)["pool"]
        inception.resize = "tf1"
        out = inception(images)
    logits = out["logits"]
    for name, value, step in (
        ("pt_2048", pool, slice(None, None, 8)),
        ("tf_2048", out["pool"], slice(None, None, 8)),
        ("tf_logits_unbiased", logits, slice(None, None, 8)),
        ("tf_logits", logits + inception.fc.bias.detach(), slice(None, None, 8)),
        ("sfid_2023", out["spatial"], slice(3, None, 7)),
    ):
        golden.check(f"{name}_slice", value[:, step])
        golden.check(f"{name}_mean", value.mean(1))
        golden.check(f"{name}_std", value.std(1, correction=0))
    golden.check("sfid_first28", out["spatial"][:, :28])
    golden.all_checked()


def frechet_pair(pair, golden):
    """mu1, sigma1, mu2, sigma2 of one of the manifest's pairs."""
    stats = []
    for side in (0, 1):
        if "names" in pair:
            n, dim = pair["n"][side], pair["dim"]
            draw = recipe_draw(golden.salt, "frechet", pair["names"][side])
            features = pair["scale"][side] * draw.standard_normal((n, dim)) + pair["shift"][side]
            features = features.astype(np.float32).astype(np.float64)
            stats += [features.mean(0), np.cov(features, rowvar=False)]
        else:
            number = 1 if "itself" in pair["kind"] else side + 1
            for key in ("mu", "sigma"):
                stats.append(golden.outputs[f"{key}{number}_{pair['dim']}"].double().numpy())
    return stats


def test_frechet_distance_matches_reference():
    golden = EvalGolden("frechet")
    pairs = [frechet_pair(pair, golden) for pair in golden.meta["pairs"]]
    distances = [fid.frechet_distance(*pair) for pair in pairs]
    for code in ("pytorch_fid", "torch_fidelity", "symmetric_reference"):
        golden.check(f"fid_{code}__f64", distances)
    assert len(distances) == 7
    names = [pair["name"] for pair in golden.meta["pairs"]]
    for name, pair in (("features", "features_256"), ("low1", "rank_deficient_64")):
        mu, sigma = pairs[names.index(pair)][:2]
        golden.check(f"mu_{name}", mu)
        golden.check(f"sigma_{name}_slice", sigma[:8, :8])


@pytest.mark.parametrize("counts", [(100, 100), (100, 400), (400, 100), (300, 400)])
def test_distance_of_features(counts):
    """Against the exact trace, the nuclear norm of A^T B of centred features with S = A A^T."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((128, 128)) / 10
    features = [np.maximum(rng.standard_normal((n, 128)) @ mixing, 0) for n in counts]
    features[1] += 0.1
    (mu1, sigma1), (mu2, sigma2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in features)
    means = ((mu1 - mu2) ** 2).sum()
    roots = [(f - f.mean(0)).T / math.sqrt(len(f) - 1) for f in features]
    nuclear = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    exact = means + np.trace(sigma1 + sigma2) - 2 * nuclear
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(exact, abs=1e-9)
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma1) == pytest.approx(means, abs=1e-9)


def test_inception_score_matches_reference():
    golden = EvalGolden("isc_prc")
    tolerance = golden.meta["tolerance"]
    logits = 2 * recipe_draw(golden.salt, "isc_prc", "logits").standard_normal((257, 40))
    logits[:, 0] += 1
    logits = torch.from_numpy(logits.astype(np.float32))
    for size, expected in zip(golden.meta["isc_adm_split_sizes"], golden.outputs["isc_adm__f64"]):
        score = fid.inception_score(logits, chunk=size)
        np.testing.assert_allclose(score, expected, rtol=tolerance["isc_adm_rtol"])
    whole = golden.outputs["isc_torch_fidelity__f64"][2, 0]  # one split, not shuffled
    np.testing.assert_allclose(fid.inception_score(logits), whole, rtol=tolerance["isc_rtol"])


@pytest.mark.parametrize("index", range(3))
def test_precision_and_recall_match_reference(index):
    """All columns but the last, which emulates ADM's float16 distances."""
    golden = EvalGolden("isc_prc")
    pair = golden.meta["prc"][index]
    name = pair["name"]
    sets = {}
    for side in ("real", "fake"):
        draw = recipe_draw(golden.salt, "isc_prc", f"{side}_{name}")
        draw = draw.standard_normal((pair[side]["n"], pair["dim"]))
        features = pair[side]["scale"] * draw + pair[side]["shift"]
        sets[side] = torch.from_numpy(features.astype(np.float32))
        radii = golden.outputs[f"{name}_radii_{side}"]
        rtol = golden.meta["tolerance"]["radii_rtol"]
        torch.testing.assert_close(fid.neighbour_radii(sets[side]), radii, rtol=rtol, atol=0)
    for a, b in (("fake", "real"), ("real", "fake")):
        inside = fid.in_manifold(sets[a], sets[b])
        assert torch.equal(inside, golden.outputs[f"{name}_{a}_in_{b}_manifold"])
    for block in (37, 1024):
        value = np.array(fid.precision_recall(sets["fake"], sets["real"], block=block))
        counts = np.array([len(sets["fake"]), len(sets["real"])])
        for expected in golden.outputs["prec_recall__f64"][index, :4].numpy():
            np.testing.assert_array_equal(np.rint(value * counts), np.rint(expected * counts))


def test_the_border_belongs_to_the_manifold():
    reference = torch.arange(5.0)[:, None]  # the balls around them reach from -3 to 7
    samples = torch.tensor([[-3.0], [-3.5], [7.0], [2.5], [8.0]])
    assert fid.in_manifold(samples, reference).tolist() == [True, False, True, True, False]


class Means(torch.nn.Module):
    """12 features, a 2 x 2 pool of every channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, [2, 2]).flatten(1)


class SmallInception(Means):
    """Stands in for Inception where 2048 x 2048 eigenvalues would take too long."""

    def __init__(self, resize):
        super().__init__()

    def forward(self, images):
        pool = super().forward(images)
        return {"pool": pool, "spatial": pool[:, ::2] ** 2, "logits": 8 * pool}


def means(images):
    return Means()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()


def distance(a, b):
    (mu1, sigma1), (mu2, sigma2) = ((f.mean(0), np.cov(f.T)) for f in (means(a), means(b)))
    return fid.frechet_distance(mu1, sigma1, mu2, sigma2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a.npz, b.npz (half of it from a), the images of a in a/, and networks."""
    path = tmp_path_factory.mktemp("fid")
    a, b = np.random.default_rng(1).integers(0, 256, (2, 41, 8, 8, 3), dtype=np.uint8)
    b = np.concatenate([a[20:], b // 2])
    np.savez(path / "a.npz", a)
    np.savez_compressed(path / "b.npz", b)
    for i, image in enumerate(a):
        folder = path / "a" / f"{i // 20:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    for hidden in (".ipynb_checkpoints/0.png", "00/._0.png"):
        (path / "a" / hidden).parent.mkdir(exist_ok=True)
        (path / "a" / hidden).write_bytes(b"not an image")
    torch.jit.script(Means()).save(path / "features.pt")
    torch.save({}, path / "inception.pth")
    return path, a, b


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(fid, "InceptionV3", SmallInception)

    def run(*argv):
        """JSON object and stderr of main()."""
        fid.main([str(arg) for arg in argv] + ["--device", "cpu"])
        out, err = capsys.readouterr()
        return json.loads(out), err

    return run


@pytest.fixture
def official(work, monkeypatch):
    """Flags for a file that counts as the published weights."""
    digest = hashlib.sha256((work[0] / "inception.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", digest[:8])
    return "--inception", work[0] / "inception.pth"


def test_distance_is_that_of_numpy_for_each_kind_of_input(work, run, tmp_path):
    path, a, b = work
    flags = ("--features", path / "features.pt")
    for name in ("a", "b"):
        saved, err = run("--save-stats", tmp_path / f"{name}.npz", path / f"{name}.npz", *flags)
        assert saved["statistics"] == str(tmp_path / f"{name}.npz")
    stats = np.load(tmp_path / "a.npz")
    np.testing.assert_allclose(stats["sigma"], np.cov(means(a), rowvar=False), rtol=1e-5, atol=1e-8)
    for samples in (path / "a.npz", path / "a", tmp_path / "a.npz"):
        for reference in (path / "b.npz", tmp_path / "b.npz"):
            result, err = run(samples, reference, "--batch-size", 8, *flags)
            assert result["frechet_distance"] == pytest.approx(distance(a, b), rel=1e-5)
            assert (result["num_samples"], result["num_reference"]) == (41, 62)
            assert result["features"]["file"] == "features.pt"
            assert len(result["features"]["sha256"]) == 64
    assert result["feature_recall"] is None and "has no images" in err  # statistics alone
    result, _ = run(tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "fid")  # no network
    assert result["frechet_distance"] == pytest.approx(distance(a, b), rel=1e-5)
    result, _ = run(path / "a", path / "b.npz", "--num", 30, *flags)
    assert result["num_samples"] == 30
    assert result["frechet_distance"] == pytest.approx(distance(a[:30], b), rel=1e-5)


def test_shards_of_a_training_cache(work, run, tmp_path):
    """The decoded images that training keeps: read in order, across the borders of files."""
    path, a, b = work
    for k, first in enumerate(range(0, len(a), 16)):
        np.save(tmp_path / f"{k:05d}.npy", a[first : first + 16].transpose(0, 3, 1, 2))
    (tmp_path / ".00003.npy.1.tmp").write_bytes(b"unfinished")
    images = fid.Folder(tmp_path)
    assert images.num == 41
    for first, stop in ((0, 41), (10, 40), (16, 32), (31, 33), (40, 41)):
        np.testing.assert_array_equal(images.read(first, stop), a[first:stop])
    flags = ("--features", path / "features.pt", "--metrics", "fid")
    result, _ = run(path / "b.npz", tmp_path, *flags)
    assert result["frechet_distance"] == pytest.approx(distance(b, a), rel=1e-5)


def test_few_samples_and_other_resolutions_are_said(work, run, tmp_path):
    path, a, _ = work
    np.savez(tmp_path / "large.npz", a.repeat(2, 1).repeat(2, 2))
    flags = ("--features", path / "features.pt", "--metrics", "fid")
    _, err = run(path / "a", path / "b.npz", *flags)
    assert err.count("\n") == 1 and "41 samples" in err
    _, err = run(path / "a", tmp_path / "large.npz", *flags)
    assert err.count("\n") == 2 and "resolution" in err


def test_all_metrics_against_images_and_an_adm_reference(work, run, official, tmp_path):
    path, a, b = work
    plain, _ = run(path / "a", path / "b.npz", *official)
    assert all(plain[name] > 0 for name in ALL) and plain["precision"] < 1
    logits = torch.from_numpy(8 * means(a))
    assert plain["inception_score"] == pytest.approx(fid.inception_score(logits), rel=1e-5)
    run("--save-stats", tmp_path / "stats.npz", path / "b.npz", *official)
    stats = np.load(tmp_path / "stats.npz")
    arrays = {key: stats[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
    arrays |= {"mu": arrays["mu"] + 0.5, "mu_s": arrays["mu_s"] + 0.5}
    np.savez(tmp_path / "adm.npz", arr_0=b, **arrays)  # with statistics of other images
    adm, _ = run(path / "a", tmp_path / "adm.npz", *official)
    assert all(adm[name] == plain[name] for name in ALL[2:])
    assert adm["fid"] > plain["fid"] + 1 and adm["sfid"] > plain["sfid"] + 0.5
    assert adm["num_reference"] is None
    itself, _ = run(path / "a", path / "a.npz", *official)
    assert itself["fid"] == pytest.approx(0, abs=1e-6) and itself["precision"] == 1


def test_what_is_missing_is_null_with_a_reason(work, run, official, tmp_path):
    path, _, _ = work
    run("--save-stats", tmp_path / "stats.npz", path / "b.npz", *official)
    with np.load(tmp_path / "stats.npz") as stats:
        np.savez(tmp_path / "old.npz", mu=stats["mu"], sigma=stats["sigma"])
    result, err = run(path / "a", tmp_path / "old.npz", *official)
    assert result["sfid"] is None and result["precision"] is None and result["fid"] > 0
    assert f"no sfid: {tmp_path / 'old.npz'} has no mu_s and sigma_s" in err
    assert f"no precision and recall: {tmp_path / 'old.npz'} has no images" in err
    result, err = run(tmp_path / "stats.npz", path / "b.npz", *official)
    assert result["inception_score"] is None and "no inception_score: " in err


def test_batch_size_and_processes_do_not_matter(work, run, official, tmp_path):
    path, _, _ = work
    argv = [path / "a", path / "b.npz", "--num-samples", 39, *official]
    one, _ = run(*argv, "--batch-size", 16)
    others = [run(*argv, "--batch-size", 3)[0]]
    program = tmp_path / "small.py"
    program.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import fid, test_fid\nfid.InceptionV3 = test_fid.SmallInception\n"
        f"fid.WEIGHTS_SHA256 = {fid.WEIGHTS_SHA256!r}\nfid.main()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*map(str, argv), "--batch-size", "3", "--device", "cpu"]
    done = subprocess.run([*torchrun, program, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    others.append(json.loads(done.stdout))
    assert [other["processes"] for other in others] == [1, 2]
    for other in others:
        assert (other["num_samples"], other["num_reference"]) == (39, 62)
        for name in ALL:
            assert other[name] == pytest.approx(one[name], rel=1e-6)
