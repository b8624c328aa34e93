"""fid.py: network and metrics against reference values, statistics against numpy, and the command line with all its errors."""

import hashlib
import json
import math
import os
import subprocess
import sys
import urllib.error
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import EVAL, GOLDENS, ROOT, STATE_DICTS, recipe_draw, recipe_tensor
from PIL import Image

import fid


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on two busy cores wait for each other: 5 s instead of 0.3 s for one pass of Inception."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(case):
    meta = EVAL[case]
    return meta, np.load(GOLDENS / meta["file"])


def inception_images(case):
    """uint8 (N, 3, H, W) by the rule of README_eval: every drawn pixel repeated block x block, cropped."""
    spec = EVAL[case]["inputs"]["images"]
    drawn = (
        recipe_draw(EVAL[case]["salt"], case, "images")
        .randint(0, 256, spec["drawn_shape"])
        .astype(np.uint8)
    )
    height, width = spec["shape"][2:]
    return torch.from_numpy(
        drawn.repeat(spec["block"], 2).repeat(spec["block"], 3)[:, :, :height, :width].copy()
    )


@pytest.fixture(scope="module")
def inception_weights():
    names = STATE_DICTS["inception"]
    weights = {}
    for name, (shape, kind) in names.items():
        gain = 1.0 if name == "fc.weight" else math.sqrt(2)
        weights[name] = (
            torch.zeros(shape, dtype=torch.long)
            if kind == "keep"
            else recipe_tensor("public", name, shape, kind, gain)
        )
    assert len(weights) == 566
    return weights


@pytest.fixture(scope="module")
def inception(inception_weights):
    network = fid.InceptionV3()
    kept = [name for name in inception_weights if name.endswith("num_batches_tracked")]
    assert all(torch.equal(network.state_dict()[name], inception_weights[name]) for name in kept)
    network.load_state_dict(inception_weights, strict=True)
    return network.fold()  # as load_inception returns it


# The network


def check_slices(arrays, tolerance, name, value, step=(slice(None), slice(None, None, 8))):
    value = value.numpy()
    np.testing.assert_allclose(value[step], arrays[f"{name}_slice"], **tolerance, err_msg=name)
    np.testing.assert_allclose(value.mean(1), arrays[f"{name}_mean"], **tolerance, err_msg=name)
    np.testing.assert_allclose(value.std(1), arrays[f"{name}_std"], **tolerance, err_msg=name)


@pytest.mark.parametrize(
    "case", ["inception_s64", "inception_s256", "inception_s299", "inception_s400"]
)
def test_inception_matches_both_reference_codes(case, inception):
    meta, arrays = reference(case)
    tolerance = {"rtol": meta["tolerance"]["rtol"], "atol": meta["tolerance"]["atol"]}
    assert tolerance == {"rtol": 1e-4, "atol": 1e-4}
    images = inception_images(case)
    np.testing.assert_allclose(
        fid.resize_tf1(images)[:, :, ::23, ::29], arrays["resize_tf1_slice"], **tolerance
    )
    np.testing.assert_allclose(
        fid.resize_pytorch_fid(images)[:, :, ::23, ::29], arrays["resize_torch_slice"], **tolerance
    )
    with torch.inference_mode():
        inception.resize = "pytorch-fid"
        check_slices(arrays, tolerance, "pt_2048", inception(images))
        inception.resize = "tf1"
        out = inception.activations(images)
    assert all(value.dtype == torch.float32 for value in out.values())
    check_slices(arrays, tolerance, "tf_2048", out["pool"])
    check_slices(arrays, tolerance, "tf_logits_unbiased", out["logits_unbiased"])
    check_slices(
        arrays, tolerance, "tf_logits", out["logits_unbiased"] + inception.fc.bias.detach()
    )
    check_slices(
        arrays, tolerance, "sfid_2023", out["spatial"], step=(slice(None), slice(3, None, 7))
    )
    np.testing.assert_allclose(out["spatial"][:, :28], arrays["sfid_first28"], **tolerance)


def test_resize_tf1_is_the_literal_formula():
    image = torch.randint(
        0, 256, (1, 1, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    resized = fid.resize_tf1(image, size=11)
    for i in range(11):
        for j in range(11):
            y, x = i * 5 / 11, j * 7 / 11
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 4), min(x0 + 1, 6)
            p = image[0, 0].double()
            top, bottom = (
                p[y0, x0] + (p[y0, x1] - p[y0, x0]) * (x - x0),
                p[y1, x0] + (p[y1, x1] - p[y1, x0]) * (x - x0),
            )
            assert resized[0, 0, i, j].item() == pytest.approx(
                (top + (bottom - top) * (y - y0)).item(), abs=1e-3
            )


def test_inception_is_in_eval_mode_and_independent_of_the_batch(inception):
    assert not any(module.training for module in inception.modules())
    images = inception_images("inception_s64")
    with torch.inference_mode():
        together, alone = (
            inception(images[:2]),
            torch.cat([inception(images[:1]), inception(images[1:2])]),
        )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_folded_batch_norms_are_the_same_function(inception, inception_weights):
    plain = fid.InceptionV3()
    plain.load_state_dict(inception_weights)
    images = inception_images("inception_s64")[:1]
    with torch.inference_mode():
        expected, out = plain.activations(images), inception.activations(images)
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in inception.modules())


# Distance and statistics


def frechet_pair(pair, arrays, salt):
    """mu1, sigma1, mu2, sigma2 of one of the manifest's pairs."""
    if "names" not in pair:
        first, second = ("1", "1") if "itself" in pair["kind"] else ("1", "2")
        return [
            arrays[f"{key}{side}_{pair['dim']}"].astype(np.float64)
            for side in (first, second)
            for key in ("mu", "sigma")
        ]
    stats = []
    for name, n, scale, shift in zip(pair["names"], pair["n"], pair["scale"], pair["shift"]):
        draw = recipe_draw(salt, "frechet", name).standard_normal((n, pair["dim"]))
        features = torch.from_numpy((scale * draw + shift).astype(np.float32)).double()
        stats += [x.numpy() for x in fid.mean_covariance(features.sum(0), features.T @ features, n)]
    return stats


FRECHET = EVAL["frechet"]["pairs"]


@pytest.mark.parametrize("index", range(7), ids=[pair["name"] for pair in FRECHET])
def test_frechet_distance_matches_reference(index):
    meta, arrays = reference("frechet")
    assert len(FRECHET) == 7
    stats = frechet_pair(FRECHET[index], arrays, meta["salt"])
    distance = fid.frechet_distance(*stats)
    for code in ("pytorch_fid", "torch_fidelity", "symmetric_reference"):
        np.testing.assert_allclose(
            distance, arrays[f"fid_{code}__f64"][index], rtol=1e-6, atol=1e-5, err_msg=code
        )
    for name, pair in (("features", "features_256"), ("low1", "rank_deficient_64")):
        if FRECHET[index]["name"] == pair:
            np.testing.assert_allclose(stats[0], arrays[f"mu_{name}"], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(
                stats[1][:8, :8], arrays[f"sigma_{name}_slice"], rtol=1e-6, atol=1e-6
            )


def test_frechet_distance_against_the_matrix_square_root():
    """The formula as printed, tr sqrt(S1 S2) by scipy's sqrtm, on full-rank covariances."""
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 40))
    sigma1, sigma2 = (
        np.cov(rng.standard_normal((40, 200)) * rng.uniform(0.5, 2, (40, 1))) for _ in range(2)
    )
    literal = ((mu1 - mu2) ** 2).sum() + np.trace(
        sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real
    )
    assert math.isclose(fid.frechet_distance(mu1, sigma1, mu2, sigma2), literal, rel_tol=1e-9)


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((24, 16))
    sigma = a.T @ a / 24
    mu1, mu2 = rng.standard_normal((2, 16))
    assert fid.frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(
        ((mu1 - mu2) ** 2).sum(), rel=1e-9
    )
    v1, v2 = rng.uniform(0.1, 3, (2, 16))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()
    assert fid.frechet_distance(mu1, np.diag(v1), mu2, np.diag(v2)) == pytest.approx(
        expected, rel=1e-9
    )
    assert fid.frechet_distance(mu1, sigma, mu1, sigma) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="different dimensions"):
        fid.frechet_distance(mu1, sigma, mu2[:8], sigma[:8, :8])


@pytest.mark.parametrize("rank", [64, 40])
def test_self_distance_is_zero_for_full_and_deficient_rank(rank):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, rank)) @ rng.standard_normal((rank, 64)) / 8
    stats = features.mean(0), np.cov(features, rowvar=False)
    assert fid.frechet_distance(*stats, *stats) == pytest.approx(0, abs=1e-5)


# Inception score, precision and recall


def test_score_precision_and_recall_match_reference():
    """All of the case but column 5 of prec_recall__f64, an emulation of ADM's float16 distances and informational only."""
    meta, arrays = reference("isc_prc")
    checked = {
        "shuffle_permutation_first20",
        "prec_recall__f64",
        "isc_adm__f64",
        "isc_torch_fidelity__f64",
    }
    logits = 2 * recipe_draw(meta["salt"], "isc_prc", "logits").standard_normal((257, 40))
    logits[:, 0] += 1
    logits, tolerance = torch.from_numpy(logits.astype(np.float32)), meta["tolerance"]
    for size, expected in zip(meta["isc_adm_split_sizes"], arrays["isc_adm__f64"]):
        np.testing.assert_allclose(
            fid.inception_score(logits, chunk=size)[0], expected, rtol=tolerance["isc_adm_rtol"]
        )
    for setting, expected in zip(meta["isc"], arrays["isc_torch_fidelity__f64"]):
        order = (
            np.random.RandomState(setting["rng_seed"]).permutation(257)
            if setting["shuffle"]
            else np.arange(257)
        )
        if setting["shuffle"]:
            np.testing.assert_array_equal(order[:20], arrays["shuffle_permutation_first20"])
        score = fid.inception_score(logits[order], splits=setting["splits"])
        np.testing.assert_allclose(score, expected, rtol=tolerance["isc_rtol"], atol=1e-12)

    for pair, expected in zip(meta["prc"], arrays["prec_recall__f64"]):
        name, sets = pair["name"], {}
        for side in ("real", "fake"):
            draw = recipe_draw(meta["salt"], "isc_prc", f"{side}_{name}").standard_normal(
                (pair[side]["n"], pair["dim"])
            )
            sets[side] = torch.from_numpy(
                (pair[side]["scale"] * draw + pair[side]["shift"]).astype(np.float32)
            )
            radii = fid.neighbour_radii(sets[side]).sqrt().numpy()
            np.testing.assert_allclose(
                radii, arrays[f"{name}_radii_{side}"], rtol=tolerance["radii_rtol"]
            )
        fake_inside, real_inside = fid.manifold_membership(sets["fake"], sets["real"])
        np.testing.assert_array_equal(fake_inside, arrays[f"{name}_fake_in_real_manifold"])
        np.testing.assert_array_equal(real_inside, arrays[f"{name}_real_in_fake_manifold"])
        counts = np.array([len(sets["fake"]), len(sets["real"])])
        value = fid.precision_recall(sets["fake"], sets["real"], block=37)
        for column in range(4):
            np.testing.assert_array_equal(
                np.rint(value * counts),
                np.rint(expected[column] * counts),
                err_msg=meta["prc_columns"][column],
            )
        np.testing.assert_allclose(value, expected[0], rtol=1e-12)
        checked |= {f"{name}_{part}_{side}" for part in ("radii",) for side in sets}
        checked |= {f"{name}_fake_in_real_manifold", f"{name}_real_in_fake_manifold"}
    assert checked == set(arrays.files)


def test_inception_score_closed_forms():
    assert fid.inception_score(torch.zeros(10, 7)) == pytest.approx((1, 0))
    assert fid.inception_score(200 * torch.eye(7)) == pytest.approx((7, 0))
    logits = (
        200 * torch.eye(7)[[0, 1, 2, 3, 4, 4]]
    )  # chunks of 4 and 2: scores 4 and 1, counted alike
    assert fid.inception_score(logits, chunk=4) == pytest.approx((2.5, 1.5))
    other = 3 ** (1 / 3) * 1.5 ** (2 / 3)  # classes 3, 4, 4
    assert fid.inception_score(logits, splits=2) == pytest.approx(
        ((3 + other) / 2, (3 - other) / 2)
    )


def test_precision_and_recall_on_a_line():
    """The third neighbour of 0, 1, 2, 3, 4 is 3, 2, 2, 2, 3 away: the manifold is [-3, 7], its border within."""
    reference = torch.arange(5.0)[:, None]
    assert fid.neighbour_radii(reference).tolist() == [9, 4, 4, 4, 9]
    samples = torch.tensor([[-3.0], [-3.5], [7.0], [2.5], [8.0]])
    samples_inside, reference_inside = fid.manifold_membership(samples, reference)
    assert (
        samples_inside.tolist() == [True, False, True, True, False]
        and reference_inside.tolist() == [True] * 5
    )
    assert fid.precision_recall(samples, reference) == (0.6, 1)


@pytest.fixture(scope="module")
def two_modes():
    """Both modes, and one of them from another draw; the modes lie 100 standard deviations apart."""
    draw = torch.randn(3, 200, 16, generator=torch.Generator().manual_seed(0))
    return torch.cat([draw[0], draw[1] + 100]), draw[2]


def test_dropped_modes_cost_recall_and_invented_ones_precision(two_modes):
    both, one = two_modes
    precision, recall = fid.precision_recall(
        one, both
    )  # samples without the second mode of the reference
    assert precision > 0.75 and 0.35 < recall < 0.5
    precision, recall = fid.precision_recall(
        both, one
    )  # samples with a mode that the reference has not
    assert 0.35 < precision < 0.5 and recall > 0.75
    assert fid.precision_recall(both, both) == (1, 1)


def test_blocks_do_not_matter(two_modes):
    both, one = two_modes
    for k in (1, 3):
        whole = fid.manifold_membership(one, both, k=k, block=10**6)
        for block in (7, 200):
            assert all(
                torch.equal(a, b)
                for a, b in zip(whole, fid.manifold_membership(one, both, k=k, block=block))
            )


def test_a_common_shift_does_not_matter(two_modes):
    """Without centring, distances about 1 between points of norm 4000 would drown in float32."""
    both, one = (x + 1000 for x in two_modes)
    literal = torch.cdist(one.double(), both.double())
    radii = torch.cdist(both.double(), both.double()).topk(4, largest=False).values[:, -1]
    assert torch.equal(fid.manifold_membership(one, both)[0], (literal <= radii).any(1))


# Command line


class Means(torch.nn.Module):
    """12 features: mean, a 2 x 2 pool and an edge term of every channel; enough to tell images, channels and positions apart."""

    def __init__(self, size: int = 2):
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, [self.size, self.size]).flatten(1)


def means(images):
    n, h, w, c = images.shape
    return (
        (images / 255.0)
        .reshape(n, 2, h // 2, 2, w // 2, c)
        .mean((2, 4))
        .transpose(0, 3, 1, 2)
        .reshape(n, -1)
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Sets of images as npz (c is half of a and more), the first as PNG folder too (in two levels), and two scripted networks."""
    path = tmp_path_factory.mktemp("fid")
    rng = np.random.default_rng(1)
    images = {
        "a": rng.integers(0, 256, (41, 8, 8, 3), dtype=np.uint8),
        "b": rng.integers(0, 200, (53, 8, 8, 3), dtype=np.uint8),
    }
    images["c"] = np.concatenate(
        [images["a"][20:], rng.integers(0, 250, (30, 8, 8, 3), dtype=np.uint8)]
    )
    for name, array in images.items():
        np.savez(path / f"{name}.npz", array)
    for i, image in enumerate(images["a"]):
        folder = path / "a" / f"{i // 20:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    torch.jit.script(Means()).save(path / "features.pt")
    torch.jit.script(Means(3)).save(path / "other.pt")
    return path, images


class SmallInception(torch.nn.Module):
    """Stands in for the network where all metrics are wanted and 2048 x 2048 eigenvalues are not."""

    def activations(self, images):
        pool = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return {"pool": pool, "spatial": pool[:, ::2] ** 2, "logits_unbiased": 8 * pool}


def use_small_inception(module):
    module.InceptionV3 = SmallInception
    module.load_inception = lambda path, resize: (
        SmallInception(),
        "inception-2015-12-05 (tf1 resize)",
    )


@pytest.fixture
def small_inception(monkeypatch):
    monkeypatch.setattr(fid, "InceptionV3", SmallInception)
    monkeypatch.setattr(fid, "load_inception", None)
    use_small_inception(fid)


@pytest.fixture
def run(capsys):
    def run(*argv):
        """JSON object and stderr of main()."""
        fid.main([str(arg) for arg in argv] + ["--device", "cpu"])
        out, err = capsys.readouterr()
        assert out.count("\n") == 1
        return json.loads(out), err

    return run


def expected_distance(a, b):
    a, b = means(a), means(b)
    return fid.frechet_distance(
        a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    )


def test_distance_from_images_is_that_of_numpy(work, run):
    path, images = work
    result, err = run(path / "a.npz", path / "b.npz", "--features", path / "features.pt")
    assert result["frechet_distance"] == pytest.approx(
        expected_distance(images["a"], images["b"]), rel=1e-5
    )
    assert "fid" not in result
    assert (result["num_samples"], result["num_reference"]) == (41, 53)
    assert (
        result["features"]["file"] == str(path / "features.pt")
        and len(result["features"]["sha256"]) == 64
    )
    assert err.count("\n") == 1 and err.startswith("fid.py: warning: 41 samples")


def test_batch_size_does_not_matter(work, run):
    path, _ = work
    values = [
        run(path / "a.npz", path / "b.npz", "--features", path / "features.pt", "--batch-size", n)[
            0
        ]
        for n in (1, 7, 64)
    ]
    for value in values[1:]:
        assert value["frechet_distance"] == pytest.approx(values[0]["frechet_distance"], rel=1e-6)


def test_folder_equals_npz(work, run):
    path, _ = work
    folder, npz = (
        run(path / name, path / "b.npz", "--features", path / "features.pt", "--batch-size", 8)[0]
        for name in ("a", "a.npz")
    )
    assert folder["num_samples"] == 41 and folder["frechet_distance"] == npz["frechet_distance"]


def test_set_against_itself_is_zero(work, run):
    path, _ = work
    assert run(path / "a", path / "a.npz", "--features", path / "features.pt")[0][
        "frechet_distance"
    ] == pytest.approx(0, abs=1e-6)


def test_num_takes_the_first_samples(work, run):
    path, images = work
    for name in ("a", "a.npz"):
        result, _ = run(
            path / name, path / "b.npz", "--features", path / "features.pt", "--num", 30
        )
        assert (result["num_samples"], result["num_reference"]) == (30, 53)
        assert result["frechet_distance"] == pytest.approx(
            expected_distance(images["a"][:30], images["b"]), rel=1e-5
        )


def test_saved_statistics_equal_images(work, run, tmp_path, monkeypatch):
    path, images = work
    flags = ("--features", path / "features.pt")
    direct, _ = run(path / "a.npz", path / "b.npz", *flags)
    for name in ("a", "b"):
        saved, err = run("--save-stats", tmp_path / f"{name}.npz", path / f"{name}.npz", *flags)
        assert (
            saved["statistics"] == str(tmp_path / f"{name}.npz")
            and saved["num_samples"] == len(images[name])
            and err == ""
        )
    stats = np.load(tmp_path / "a.npz", allow_pickle=False)
    np.testing.assert_allclose(
        stats["sigma"], np.cov(means(images["a"]), rowvar=False), rtol=1e-5, atol=1e-8
    )
    assert stats["mu"].dtype == stats["sigma"].dtype == np.float64 and stats["num"] == 41
    for sides in (
        (path / "a.npz", tmp_path / "b.npz"),
        (tmp_path / "a.npz", path / "b.npz"),
        (tmp_path / "a.npz", tmp_path / "b.npz"),
    ):
        result, _ = run(*sides, *flags)
        assert result["frechet_distance"] == pytest.approx(direct["frechet_distance"], rel=1e-9)
        assert result["num_reference"] == 53
    monkeypatch.setattr(fid, "load_inception", None)  # two statistics files need no network at all
    result, _ = run(tmp_path / "a.npz", tmp_path / "b.npz")
    assert result["frechet_distance"] == pytest.approx(direct["frechet_distance"], rel=1e-9)
    assert result["features"] == direct["features"]


def test_statistics_without_a_feature_name_are_taken_with_a_warning(work, run, tmp_path):
    path, images = work
    b = means(images["b"])
    np.savez(
        tmp_path / "b.npz", mu=b.mean(0), sigma=np.cov(b, rowvar=False), arr_0=images["a"]
    )  # with images: statistics win
    result, err = run(path / "a.npz", tmp_path / "b.npz", "--features", path / "features.pt")
    assert result["frechet_distance"] == pytest.approx(
        expected_distance(images["a"], images["b"]), rel=1e-5
    )
    assert result["feature_precision"] == result["feature_recall"] == 1  # of the images
    assert result["num_reference"] is None and result["num_reference_manifold"] == 41
    assert f"fid.py: warning: {tmp_path / 'b.npz'} does not say which features" in err
    unnamed, _ = run(tmp_path / "b.npz", tmp_path / "b.npz", "--metrics", "fid")
    assert unnamed["features"] is None and "fid" not in unnamed


def test_inception_from_a_file(work, run, tmp_path, inception, inception_weights, monkeypatch):
    """Other weights than those of 2015-12-05 are not called FID; the official ones (their hash is replaced here) are."""
    images = work[1]
    torch.save(
        {k: v for k, v in inception_weights.items() if not k.endswith("num_batches_tracked")},
        tmp_path / "inception.pth",
    )
    np.savez(tmp_path / "three.npz", images["a"][:3])
    flags = ("--inception", tmp_path / "inception.pth")
    saved, _ = run("--save-stats", tmp_path / "stats.npz", tmp_path / "three.npz", *flags)
    assert saved["features"]["resize"] == "tf1"
    with torch.inference_mode():
        f = inception(torch.from_numpy(images["a"][:3]).permute(0, 3, 1, 2)).double().numpy()
    stats = np.load(tmp_path / "stats.npz", allow_pickle=False)
    np.testing.assert_allclose(stats["mu"], f.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats["sigma"], np.cov(f, rowvar=False), rtol=1e-4, atol=1e-6)
    assert (
        stats["mu_s"].shape == (2023,)
        and stats["sigma_s"].shape == (2023, 2023)
        and stats["size"].tolist() == [8, 8]
    )

    monkeypatch.setattr(fid, "INCEPTION_SHA256", saved["features"]["sha256"][:8])
    monkeypatch.setattr(
        fid, "frechet_distance", lambda *stats: float(len(stats[0]))
    )  # eigenvalues of 2048 x 2048 take 10 s here
    np.savez(tmp_path / "unnamed.npz", mu=stats["mu"], sigma=stats["sigma"])
    for resize in ((), ("--resize", "pytorch-fid")):
        result, _ = run(tmp_path / "three.npz", tmp_path / "unnamed.npz", *flags, *resize)
        assert result["fid"] == 2048 and "frechet_distance" not in result
        assert (
            result["features"] == f"inception-2015-12-05 ({resize[1] if resize else 'tf1'} resize)"
        )


ALL = ("fid", "sfid", "inception_score", "precision", "recall")


def adm_reference(path, images, shift):
    """An .npz with the five keys of ADM's references; its statistics are not those of its images but shifted."""
    out = SmallInception().activations(torch.from_numpy(images).permute(0, 3, 1, 2))
    pool, spatial = out["pool"].double().numpy(), out["spatial"].double().numpy()
    arrays = {"mu": pool.mean(0) + shift, "sigma": np.cov(pool, rowvar=False)}
    np.savez(
        path,
        **arrays,
        mu_s=spatial.mean(0) + shift,
        sigma_s=np.cov(spatial, rowvar=False),
        arr_0=images,
    )
    return out


def test_all_metrics_against_images_and_an_adm_reference(work, run, small_inception, tmp_path):
    path, images = work
    logits = SmallInception().activations(torch.from_numpy(images["a"]).permute(0, 3, 1, 2))[
        "logits_unbiased"
    ]
    plain, _ = run(path / "a", path / "c.npz")
    assert all(0 < plain[name] for name in ALL) and plain["precision"] < 1 and plain["recall"] < 1
    assert plain["inception_score"] == pytest.approx(fid.inception_score(logits)[0], rel=1e-6)
    adm_reference(tmp_path / "adm.npz", images["c"], shift=0.5)
    adm, err = run(path / "a", tmp_path / "adm.npz")
    assert all(adm[name] == plain[name] for name in ALL[2:])
    assert adm["fid"] > plain["fid"] + 1 and adm["sfid"] > plain["sfid"] + 0.5
    assert (
        adm["num_reference"],
        adm["num_reference_manifold"],
        plain["num_reference_manifold"],
    ) == (None, 51, 51)
    assert "does not say which features" in err and "no " not in err
    alone, _ = run(path / "a", tmp_path / "adm.npz", "--metrics", "sfid")
    assert alone["sfid"] == adm["sfid"] and not set(ALL) - {"sfid"} & set(alone)
    itself, _ = run(path / "a", path / "a.npz")
    assert itself["fid"] == pytest.approx(0, abs=1e-6) and itself["sfid"] == pytest.approx(
        0, abs=1e-6
    )
    assert itself["precision"] == itself["recall"] == 1


def test_what_cannot_be_computed_is_null_with_a_reason(work, run, small_inception, tmp_path):
    path, images = work
    run("--save-stats", tmp_path / "stats.npz", path / "c.npz")
    assert set(np.load(tmp_path / "stats.npz").files) == {
        "mu",
        "sigma",
        "mu_s",
        "sigma_s",
        "num",
        "size",
        "features",
    }
    direct, _ = run(path / "a", path / "c.npz")
    result, err = run(path / "a", tmp_path / "stats.npz")
    for name in ("fid", "sfid", "inception_score"):
        assert result[name] == pytest.approx(direct[name], rel=1e-9)
    assert result["precision"] is None and result["recall"] is None
    assert (
        f"no precision and recall: {tmp_path / 'stats.npz'} holds only statistics, images are needed"
        in err
        and err.count("\n") == 2
    )
    result, err = run(tmp_path / "stats.npz", path / "c.npz")
    assert (
        result["inception_score"] is None
        and "no inception_score: " in err
        and result["num_samples"] == 51
    )
    with np.load(tmp_path / "stats.npz") as stats:
        np.savez(tmp_path / "old.npz", mu=stats["mu"], sigma=stats["sigma"])
    result, err = run(path / "a", tmp_path / "old.npz")
    assert (
        result["sfid"] is None and f"no sfid: {tmp_path / 'old.npz'} stores no mu_s, sigma_s" in err
    )
    np.savez(tmp_path / "three.npz", images["a"][:3])
    result, err = run(tmp_path / "three.npz", path / "c.npz")
    assert result["recall"] is None and "three.npz have no 3 neighbours each" in err


def test_another_resolution_is_a_warning(work, run, small_inception, tmp_path):
    path, images = work
    np.savez(tmp_path / "large.npz", images["c"].repeat(2, 1).repeat(3, 2))
    _, err = run(path / "a", tmp_path / "large.npz")
    text = f"warning: images of {path / 'a'} are 8x8, those of {tmp_path / 'large.npz'} 24x16"
    assert text in err
    run("--save-stats", tmp_path / "stats.npz", tmp_path / "large.npz")
    assert (
        "24x16" in run(path / "a", tmp_path / "stats.npz")[1]
        and "8x8" not in run(path / "a", path / "c.npz")[1]
    )


def torchrun(*argv):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *argv,
        "--device",
        "cpu",
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_batch_size_and_processes_do_not_matter(work, run, small_inception, tmp_path):
    """All metrics; two processes of the real main() on the small network."""
    path, _ = work
    argv = [str(path / "a"), str(path / "c.npz"), "--num-samples", "39"]
    one, _ = run(*argv, "--batch-size", 16)
    others = [run(*argv, "--batch-size", 3)[0]]
    (tmp_path / "small.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import fid, functools, test_fid\ntest_fid.use_small_inception(fid)\n"
        "fid.precision_recall = functools.partial(fid.precision_recall, block=8)\nfid.main()\n"  # so that both processes have rows
    )
    done = torchrun(str(tmp_path / "small.py"), *argv, "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    others.append(json.loads(done.stdout))
    assert [other["processes"] for other in others] == [1, 2]
    for other in others:
        assert (other["num_samples"], other["num_reference"]) == (39, 51)
        for name in ALL:
            assert other[name] == pytest.approx(one[name], rel=1e-6)


@pytest.mark.parametrize(
    "line, text",
    [
        # only the second process meets the broken image
        (
            "{bad}/late {work}/b.npz --features {work}/features.pt --batch-size 4",
            "images of one set must have one size: {bad}/late/9.png",
        ),
        (
            "{work}/a {work}/b.npz --inception {bad}/weights.pth",
            "{bad}/weights.pth does not hold the weights of the FID Inception",
        ),
    ],
    ids=["image", "weights"],
)
def test_one_line_for_all_processes(line, text, work, bad, bad_networks):
    done = torchrun("fid.py", *line.format(work=work[0], bad=bad).split())
    lines = [line for line in done.stderr.splitlines() if line.startswith("fid.py: ")]
    assert done.returncode != 0 and done.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("fid.py: error: " + text.format(bad=bad)), (
        done.stderr
    )
    assert 'fid.py", line' not in done.stderr  # torchrun has a traceback of its own


def test_self_test(tmp_path, inception_weights, monkeypatch, capsys):
    def self_test(weights):
        torch.save(weights, tmp_path / "weights.pth")
        fid.main(["--self-test", str(tmp_path / "weights.pth"), "--device", "cpu"])

    for weights, text in (
        (inception_weights, "fits the network, but its sha256"),
        (inception_weights | {"fc.bias": torch.full((1008,), torch.nan)}, "fc.bias has NaN"),
    ):
        with pytest.raises(SystemExit) as exit_:
            self_test(weights)
        check_error(text, exit_.value.code, *capsys.readouterr())
    monkeypatch.setattr(fid, "INCEPTION_SHA256", "")  # the digest of these weights is nobody's
    self_test(inception_weights)
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and result["tensors"] == 566 and result["float32_error"] < 1e-5


# Bad input


@pytest.fixture(scope="module")
def bad(work, tmp_path_factory):
    """One broken thing each, by name."""
    path, images = work
    here = tmp_path_factory.mktemp("bad")
    image = Image.fromarray(images["a"][0])
    for folder in ("empty", "corrupt", "cut", "sizes", "deep", "one", "late"):
        (here / folder).mkdir()
        if folder != "empty":
            image.save(here / folder / "0.png")
    (here / "empty" / "notes.txt").write_text("no image")
    (here / "corrupt" / "1.png").write_bytes(b"not a png")
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(here / "cut" / "0.png")
    (here / "cut" / "1.png").write_bytes((here / "cut" / "0.png").read_bytes()[:5000])
    image.resize((9, 8)).save(here / "sizes" / "1.png")
    for i in range(10):
        (image.resize((9, 8)) if i == 9 else image).save(here / "late" / f"{i}.png")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(here / "deep" / "1.png")
    np.savez(here / "nothing.npz", images=images["a"])
    np.savez(here / "float.npz", images["a"].astype(np.float32))
    np.savez(here / "grey.npz", images["a"][..., :1])
    np.savez(here / "single.npz", images["a"][:1])
    np.savez(here / "ragged.npz", np.array([images["a"][0], images["a"][1][:4]], dtype=object))
    (here / "truncated.npz").write_bytes((path / "a.npz").read_bytes()[:3000])
    data = bytearray((path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (here / "flipped.npz").write_bytes(data)
    (here / "pickle.npz").write_bytes(b"\x80\x04K\x01.")
    np.savez(here / "pickled_mu.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.savez(here / "shapes.npz", mu=np.zeros(12), sigma=np.eye(11))
    np.savez(here / "nan.npz", mu=np.full(12, np.nan), sigma=np.eye(12))
    np.savez(
        here / "spatial.npz",
        mu=np.zeros(12),
        sigma=np.eye(12),
        mu_s=np.zeros(4),
        sigma_s=np.full((4, 4), np.inf),
    )
    np.savez(here / "dim5.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(
        here / "inception_stats.npz",
        mu=np.zeros(12),
        sigma=np.eye(12),
        features=json.dumps("inception-2015-12-05 (tf1 resize)"),
    )
    torch.save({"a": torch.zeros(2)}, here / "weights.pth")
    (here / "garbage.pth").write_bytes(b"garbage")
    return here


BAD = {  # name: arguments ({work}, {bad} are folders; --features {work}/features.pt is added unless a network is named), and what is said
    "missing": ("{bad}/absent {work}/b.npz", "absent does not exist"),
    "missing reference": ("{work}/a {bad}/absent.npz", "absent.npz does not exist"),
    "empty folder": ("{bad}/empty {work}/b.npz", "no images"),
    "corrupt image": ("{bad}/corrupt {work}/b.npz", "cannot read image {bad}/corrupt/1.png"),
    "cut image": ("{bad}/cut {work}/b.npz", "cannot read image {bad}/cut/1.png"),
    "image sizes": ("{bad}/sizes {work}/b.npz", "{bad}/sizes/1.png is 9x8, the first one 8x8"),
    "16 bits": ("{bad}/deep {work}/b.npz", "{bad}/deep/1.png is not 8-bit"),
    "ragged npz": (
        "{bad}/ragged.npz {work}/b.npz",
        "ragged.npz is a pickled object array (images of different sizes?)",
    ),
    "npz without arrays": (
        "{bad}/nothing.npz {work}/b.npz",
        "holds neither images (arr_0) nor statistics (mu, sigma), but images",
    ),
    "float images": (
        "{bad}/float.npz {work}/b.npz",
        "a C-ordered uint8 array (N, H, W, 3) is needed",
    ),
    "grey images": ("{work}/a {bad}/grey.npz", "a C-ordered uint8 array (N, H, W, 3) is needed"),
    "truncated npz": (
        "{bad}/truncated.npz {work}/b.npz",
        "truncated.npz is not an .npz archive: truncated",
    ),
    "damaged npz": (
        "{bad}/flipped.npz {work}/b.npz",
        "cannot read the images of {bad}/flipped.npz",
    ),
    "pickle": ("{bad}/pickle.npz {work}/b.npz", "pickle.npz is not an .npz archive"),
    "pickled mu": (
        "{work}/a {bad}/pickled_mu.npz",
        "cannot read {bad}/pickled_mu.npz (Object arrays cannot be loaded",
    ),
    "shapes of statistics": (
        "{work}/a {bad}/shapes.npz",
        "does not hold finite mu (D,) and sigma (D, D)",
    ),
    "nan": ("{work}/a {bad}/nan.npz", "does not hold finite mu"),
    "other file": ("{bad}/weights.pth {work}/b.npz", "weights.pth is neither a folder nor an .npz"),
    "dimension": (
        "{work}/a {bad}/dim5.npz",
        "feature dimension mismatch: {work}/a has 12, {bad}/dim5.npz has 5",
    ),
    "other features": (
        "{work}/a {bad}/inception_stats.npz",
        "inception_stats.npz holds statistics of other features",
    ),
    "one image": ("{bad}/one {work}/b.npz", "1 of {bad}/one to be used: at least 2 images"),
    "one image npz": ("{work}/a {bad}/single.npz", "at least 2 images"),
    "num 1": ("{work}/a {work}/b.npz --num 1", "at least 2 images"),
    "num too large": ("{work}/a {work}/b.npz --num 42", "--num 42, but {work}/a holds 41 images"),
    "num of statistics": ("{bad}/dim5.npz {work}/b.npz --num 5", "dim5.npz holds statistics"),
    "save statistics of statistics": (
        "--save-stats {bad}/out.npz {bad}/dim5.npz",
        "dim5.npz holds statistics",
    ),
    "save to no folder": (
        "--save-stats {bad}/absent/out.npz {work}/a",
        "the name must end in .npz and its folder must exist",
    ),
    "features not TorchScript": (
        "{work}/a {work}/b.npz --features {bad}/weights.pth",
        "weights.pth is not a TorchScript module",
    ),
    "features garbage": (
        "{work}/a {work}/b.npz --features {bad}/garbage.pth",
        "garbage.pth is not a TorchScript module",
    ),
    "features absent": (
        "{work}/a {work}/b.npz --features {bad}/absent.pt",
        "absent.pt is not a file",
    ),
    "features of wrong shape": (
        "{work}/a {work}/b.npz --features {bad}/flat.pt",
        "must be (N, D), got (41, 3, 8, 8) for 41 images",
    ),
    "features that fail": (
        "{work}/a {work}/b.npz --features {bad}/raises.pt",
        "the network failed on images of shape (41, 3, 8, 8)",
    ),
    "features not finite": (
        "{work}/a {work}/b.npz --features {bad}/infinite.pt",
        "the features contain NaN or infinity",
    ),
    "wrong weights": (
        "{work}/a {work}/b.npz --inception {bad}/weights.pth",
        "does not hold the weights of the FID Inception",
    ),
    "weights garbage": (
        "{work}/a {work}/b.npz --inception {bad}/garbage.pth",
        "cannot load Inception weights from {bad}/garbage.pth",
    ),
    "two networks": (
        "{work}/a {work}/b.npz --features {work}/features.pt --resize tf1",
        "leave out --inception and --resize",
    ),
    "no reference": ("{work}/a", "give either SAMPLES REFERENCE, or --save-stats"),
    "reference and save": ("{work}/a {work}/b.npz --save-stats {bad}/out.npz", "give either"),
    "no arguments": (
        "",
        "give SAMPLES REFERENCE, or --save-stats OUT.npz SAMPLES, or --self-test FILE",
    ),
    "metrics of Inception": (
        "{work}/a {work}/b.npz --metrics fid is --features {work}/features.pt",
        "sfid and is need Inception",
    ),
    "unknown metric": ("{work}/a {work}/b.npz --metrics kid", "invalid choice: 'kid'"),
    "metrics of saved statistics": (
        "--save-stats {bad}/out.npz {work}/a --metrics fid",
        "leave out --metrics",
    ),
    "self-test with sets": ("--self-test {bad}/weights.pth --resize tf1", "stands alone"),
    "spatial statistics": (
        "{work}/a {bad}/spatial.npz",
        "does not hold finite mu_s (D,) and sigma_s (D, D)",
    ),
    "unknown flag": ("{work}/a {work}/b.npz --sfid", "unrecognized arguments: --sfid"),
    "bad number": (
        "{work}/a {work}/b.npz --num many",
        "argument --num/--num-samples: invalid positive value: 'many'",
    ),
    "batch size": ("{work}/a {work}/b.npz --batch-size 0", "0 is not positive"),
    "resize": ("{work}/a {work}/b.npz --resize bicubic", "invalid choice: 'bicubic'"),
    "device": ("{work}/a {work}/b.npz --device cuda:99", "GPU 99 asked for"),
    "no device": ("{work}/a {work}/b.npz --device tpux", "--device tpux: not a device"),
}


class Flat(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


class Raises(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().reshape(7, 5)


class Infinite(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1 / (images.float().flatten(1) * 0)


def check_error(text, code, out, err):
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.endswith("\n"), err
    assert err.startswith("fid.py: error: ") and text in err, err


@pytest.fixture(scope="module")
def bad_networks(bad):
    for module, name in ((Flat(), "flat.pt"), (Raises(), "raises.pt"), (Infinite(), "infinite.pt")):
        torch.jit.script(module).save(bad / name)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, work, bad, bad_networks, capsys):
    line, text = BAD[name]
    argv = line.format(work=work[0], bad=bad).split()
    if "--features" not in argv and "--inception" not in argv and "--resize" not in argv:
        argv += ["--features", str(work[0] / "features.pt")]
    if "--device" not in argv:
        argv += ["--device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        fid.main(argv)
    check_error(text.format(work=work[0], bad=bad), exit_.value.code, *capsys.readouterr())


def test_mixed_resizes_are_refused(work, tmp_path, inception_weights, capsys):
    torch.save(inception_weights, tmp_path / "inception.pth")
    sha256 = hashlib.sha256((tmp_path / "inception.pth").read_bytes()).hexdigest()
    features = {"file": "moved.pth", "sha256": sha256, "resize": "tf1"}
    np.savez(
        tmp_path / "stats.npz", mu=np.zeros(12), sigma=np.eye(12), features=json.dumps(features)
    )
    argv = [
        str(work[0] / "a"),
        str(tmp_path / "stats.npz"),
        "--inception",
        str(tmp_path / "inception.pth"),
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit) as exit_:
        fid.main([*argv, "--resize", "pytorch-fid"])
    check_error("holds statistics of other features", exit_.value.code, *capsys.readouterr())
    assert fid.same_space(features, features | {"file": "here.pth"}) and not fid.same_space(
        features, "inception-2015-12-05 (tf1 resize)"
    )


def test_failed_download_names_the_way_out(work, monkeypatch, capsys):
    def refuse(url, **options):
        assert options["check_hash"] and options["weights_only"]
        print("Downloading ...")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(SystemExit) as exit_:
        fid.main([str(work[0] / "a"), str(work[0] / "b.npz"), "--device", "cpu"])
    check_error("pass --inception FILE", exit_.value.code, *capsys.readouterr())


@pytest.mark.parametrize("name", ["corrupt image", "unknown flag"])
def test_bad_input_from_the_shell(name, work, bad):
    line, text = BAD[name]
    argv = line.format(work=work[0], bad=bad).split() + [
        "--features",
        str(work[0] / "features.pt"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "fid.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    check_error(text.format(work=work[0], bad=bad), done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("counts", [(100, 100), (100, 400), (400, 100)])
def test_distance_with_fewer_images_than_dimensions(counts):
    """Against the exact trace, the nuclear norm of A^T B of centred features, S = A A^T; at equal sets 0."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((128, 128)) / 10
    features = [
        np.maximum(rng.standard_normal((n, 128)) @ mixing, 0) + 0.1 * k
        for k, n in enumerate(counts)
    ]
    stats = [(f.mean(0), np.cov(f, rowvar=False)) for f in features]
    roots = [(f - f.mean(0)).T / math.sqrt(len(f) - 1) for f in features]
    traces = (
        np.trace(stats[0][1])
        + np.trace(stats[1][1])
        - 2 * np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    )
    exact = ((stats[0][0] - stats[1][0]) ** 2).sum() + traces
    assert abs(fid.frechet_distance(*stats[0], *stats[1]) - exact) < 1e-9
    assert abs(fid.frechet_distance(*stats[0], *stats[0])) < 1e-9
    assert (
        abs(
            fid.frechet_distance(*stats[0], stats[0][0], np.zeros((128, 128)))
            - np.trace(stats[0][1])
        )
        < 1e-9
    )


def test_other_weights_in_the_cache_are_refused(tmp_path, monkeypatch, inception_weights):
    """torch.hub checks the hash of what it downloads, not of what it finds."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(
        inception_weights, tmp_path / "hub" / "checkpoints" / fid.INCEPTION_URL.rsplit("/", 1)[1]
    )
    with pytest.raises(ValueError, match=r"is not the published file .*: delete it"):
        fid.load_inception(None, "tf1")


def test_array_shorter_than_its_header(tmp_path, capfd):
    for shape in ((10**12, 8, 8, 3), (20, 0, 0, 3)):
        with (
            zipfile.ZipFile(tmp_path / "a.npz", "w") as archive,
            archive.open("arr_0.npy", "w") as entry,
        ):
            np.lib.format.write_array_header_1_0(
                entry, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            entry.write(b"0" * 1000)
        with pytest.raises(SystemExit) as stop:
            fid.ImageSet(tmp_path / "a.npz")
        error = capfd.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "arr_0 of" in error


def test_linked_class_folders_count(tmp_path):
    for folder in ("set/a", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set")
    assert fid.ImageFolder(tmp_path / "set").count == 2
