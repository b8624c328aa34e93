"""Processes, samplers and guidance: reference values of official code, and closed forms."""

import pytest
import torch
from conftest import close

from diffusion import DDPM, EDM, Flow, Guided, make_diffusion, sample_ode, sample_sde, seed_of


def mean_per_image(loss):
    return loss.flatten(1).mean(1)


def replay(noises):
    """A `draw` that hands out stored noises in order."""
    return iter(noises).__next__


def test_sit_transport(golden):
    """SiT's code has t = 0 at noise: our t is 1 - t, our velocity -u."""
    g = golden("sit_transport")
    i = g.inputs
    for name, flow in (("linear", Flow()), ("gvp", Flow("gvp"))):
        t = 1 - i["t"]
        g.check(f"{name}_x_t", flow.add_noise(i["x1"], i["x0"], t))
        g.check(f"{name}_u_t", -flow.target(i["x1"], i["x0"], t))
        g.check(f"{name}_loss", mean_per_image(flow.loss(-i["model_output"], i["x1"], i["x0"], t)))
        score_t = 1 - i["score_t"]
        g.check(f"{name}_score", flow.score(-i["score_v"], i["score_x"], score_t))
        g.check(f"{name}_noise", flow.noise(-i["score_v"], i["score_x"], score_t))
        # "back" is the velocity recovered from the score: ours must map it to that same score.
        back = flow.score(-g.outputs[f"{name}_back"], i["score_x"], score_t)
        close(back, g.outputs[f"{name}_score"], rtol=1e-5, atol=5e-4)
    g.all_checked("linear_back", "gvp_back")


def repa_net(dtypes):
    def net(x, t, y):
        dtypes.append((x.dtype, len(x)))
        g = torch.where(y == 1000, torch.zeros_like(y), y + 1).to(x.dtype)
        return 0.5 * x * (1 + t.reshape(-1, 1, 1, 1)) - 0.1 * g.reshape(-1, 1, 1, 1)

    return net


def test_repa_samplers(golden, monkeypatch):
    g = golden("repa_samplers")
    z, y, flow = g.inputs["z"], g.inputs["y"], Flow()
    steps, calls = g.config["num_steps"], g.config["network_calls_total_and_with_doubled_batch"]
    g.check("grid_ode", flow.times(steps))
    for name in ("euler", "heun", "sde"):
        for suffix in ("", "_cfg"):
            log = []
            net = repa_net(log)
            if suffix:
                interval = g.config["guidance_low"], g.config["guidance_high"]
                net = Guided(net, g.config["cfg_scale"], 1000, interval)
            if name == "sde":
                times = []

                def velocity(out, x, t, times=times):
                    times.append(t[0].item())
                    return Flow.velocity(flow, out, x, t)

                monkeypatch.setattr(flow, "velocity", velocity)
                x = sample_sde(net, flow, z, y, steps, replay(g.inputs["noises"]))
                monkeypatch.undo()
                g.check("grid_sde", torch.tensor([*times, 0.0], dtype=torch.float64))
            else:
                x = sample_ode(net, flow, z, y, steps, solver=name)
            assert x.dtype == torch.float64 and all(dtype == torch.float32 for dtype, _ in log)
            assert [len(log), sum(n == 2 * len(z) for _, n in log)] == calls[name + suffix]
            g.check(name + suffix, x)
    i = g.inputs
    g.check("score_linear", flow.score(i["score_v"], i["score_x"], i["score_t"]))
    g.check("score_cosine", Flow("gvp").score(i["score_v"], i["score_x"], i["score_t"]))
    g.all_checked()


def test_edm_sampler(golden):
    """The golden's denoiser D is turned into a raw output F, and back by the preconditioning."""
    g = golden("edm_sampler")
    edm = EDM()
    z = g.inputs["z"]
    y = torch.zeros(len(z), dtype=torch.int64)
    calls = []

    def net(x_in, c_noise, y):
        sigma = (4 * c_noise).exp()
        calls.append(sigma[0].item())
        c_skip, c_out, c_in, _ = (c.reshape(-1, 1, 1, 1) for c in edm.preconditioning(sigma))
        x, s2 = x_in / c_in, sigma.square().reshape(-1, 1, 1, 1)
        return ((0.25 * x + s2 * 0.3) / (0.25 + s2) - c_skip * x) / c_out

    for steps in (18, 40):
        g.check(f"sigmas_{steps}", edm.times(steps))
        calls.clear()
        g.check(f"x_edm_{steps}", sample_ode(net, edm, z, y, steps, "heun", dtype=torch.float64))
        g.check(f"calls_{steps}", torch.tensor(calls, dtype=torch.float64))
        g.check(f"x_maskdit_{steps}", sample_ode(net, edm, z, y, steps, "heun"))
    for name in ("churn_a", "churn_b"):
        churn = {k: float(v) for k, v in g.config[name].items()}
        calls.clear()
        for code, dtype in (("edm", torch.float64), ("maskdit", torch.float32)):
            draw = replay(g.inputs["noises"])
            x = sample_sde(net, edm, z, y, 18, draw, dtype, churn)
            g.check(f"x_{code}_{name}", x)
            if code == "edm":
                g.check(f"calls_{name}", torch.tensor(calls, dtype=torch.float64))
    g.all_checked()


def test_ddpm(golden):
    g = golden("ddpm")
    i, ddpm = g.inputs, DDPM()
    t = torch.arange(1000)
    mean_x0, mean_xt, log_beta, log_variance = ddpm.posterior(t, t - 1)
    variance = log_variance.exp().clone()
    variance[0] = 0
    tables = {
        "betas": log_beta.exp(),
        "alphas_cumprod": ddpm.abar(t),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": log_variance,
        "posterior_mean_coef1": mean_x0,
        "posterior_mean_coef2": mean_xt,
    }
    for name, table in tables.items():
        g.check(f"{name}_at", table[i["idx"]])
        statistics = [table.sum(), table.mean(), table.std(correction=0), table.min(), table.max()]
        g.check(f"{name}_stat", torch.stack(statistics))
    g.check("space_1000_250", ddpm.times(250)[:-1].flip(0))
    g.check("space_1000_ddim50", DDPM(strided=True).times(50)[:-1].flip(0))

    t, out = i["t"], i["model_output"]
    x_t = ddpm.add_noise(i["x_start"], i["noise"], t)
    g.check("x_t", x_t)
    loss = ddpm.loss(out, i["x_start"], i["noise"], t)
    vb = ddpm.variational_bound(out, i["x_start"], i["noise"], t)
    g.check("loss", mean_per_image(loss))
    g.check("vb", mean_per_image(vb))
    g.check("mse", mean_per_image((out[:, :4] - ddpm.target(i["x_start"], i["noise"], t)).square()))
    mean_x0, mean_xt, _, _ = (v.float().reshape(-1, 1, 1, 1) for v in ddpm.posterior(t, t - 1))
    x0 = ddpm.denoise(out, x_t, t)
    g.check("p_pred_xstart", x0)
    g.check("p_mean", mean_x0 * x0 + mean_xt * x_t)
    g.check("p_log_variance", ddpm.log_variance(out, t, t - 1))

    def net(x, t, y):
        s = (t.to(x.dtype) / 1000).reshape(-1, 1, 1, 1)
        return torch.cat([0.8 * x * (0.2 + s) - 0.05, 0.5 * x / (1 + x.abs()) + s - 0.5], 1)

    y = torch.zeros(len(i["z"]), dtype=torch.int64)
    for name, diffusion in (("n", ddpm), ("ddim", DDPM(strided=True))):
        grid = diffusion.times(10)
        g.check(f"map_{name}", grid[:-1].flip(0))
        g.check(f"betas_{name}", diffusion.posterior(grid[:-1], grid[1:])[2].exp().flip(0))
    g.check("p_sample", sample_sde(net, ddpm, i["z"], y, 10, replay(i["noises"])))
    g.check("p_sample_clip", sample_sde(net, DDPM(clip=True), i["z"], y, 10, replay(i["noises"])))
    g.check("ddim", sample_ode(net, ddpm, i["z"], y, 10, "euler"))
    g.check("ddim_clip", sample_ode(net, DDPM(clip=True), i["z"], y, 10, "euler"))
    g.check("ddim_strided", sample_ode(net, DDPM(strided=True), i["z"], y, 10, "euler"))
    g.all_checked()


# Closed forms


# Two Gaussians: their weights, means and variances
WEIGHTS, MEANS, VARIANCES = torch.tensor([[0.35, 0.65], [0.6, -0.4], [0.1, 0.05]]).double()


def denoised(x, a, s):
    """E[x_0 | x_t = x] for x_t = a x_0 + s eps, with scalars a and s: like x."""
    away = x[..., None] - a * MEANS
    total = a * a * VARIANCES + s * s
    logits = WEIGHTS.log() - 0.5 * (away.square() / total + total.log())
    return (logits.softmax(-1) * (MEANS + a * VARIANCES / total * away)).sum(-1)


def exact_net(diffusion):
    """The raw output that an infinitely trained network of this process would give."""

    def net(x_in, t_in, y):
        x_in, t = x_in.double(), t_in[0]
        if isinstance(diffusion, EDM):
            sigma = (4 * t.double()).exp()
            c_skip, c_out, c_in, _ = diffusion.preconditioning(sigma)
            x = x_in / c_in
            return (denoised(x, 1.0, sigma) - c_skip * x) / c_out
        if isinstance(diffusion, DDPM):
            a, s = diffusion.abar(t).sqrt(), (1 - diffusion.abar(t)).sqrt()
            eps = (x_in - a * denoised(x_in, a, s)) / s
            return torch.cat([eps, torch.ones_like(eps)], 1)  # variance: beta, for small steps
        a, s, da, ds = diffusion.coefficients(t.double())
        D = denoised(x_in, a, s)
        return da * D + ds * (x_in - a * D) / s

    return net


SOLVERS = """flow heun 60, flow euler 500, gvp heun 60, gvp euler 500, edm heun 40, edm euler 500,
ddpm heun 100, ddpm euler 1000, flow sde 500, gvp sde 500, edm sde 60, ddpm sde 1000"""


@pytest.mark.parametrize("case", SOLVERS.replace("\n", " ").split(", "))
def test_every_solver_lands_on_a_gaussian_mixture(case):
    """The exact denoiser of a mixture must be sampled back to its mean and variance.

    ODE: 4,096 quasi-random starting points. SDE: 10,000, whose own sampling error is about 0.005.
    Flow's SDE ends with a noise-free step from 0.04 (REPA), which leaves a variance of 0.0016.
    """
    name, solver, steps = case.split()
    diffusion, steps = make_diffusion(name), int(steps)
    net, n = exact_net(diffusion), 10000 if solver == "sde" else 4096
    generator = torch.Generator().manual_seed(0)
    uniform = torch.quasirandom.SobolEngine(1, scramble=True, seed=0).draw(n, dtype=torch.float64)
    noise = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).reshape(n, 1, 1, 1)
    y = torch.zeros(n, dtype=torch.int64)
    if solver == "sde":
        churn = {"S_churn": 20.0} if isinstance(diffusion, EDM) else None

        def draw():
            return torch.randn(n, 1, 1, 1, generator=generator)

        x = sample_sde(net, diffusion, noise, y, steps, draw, torch.float64, churn)
    else:
        x = sample_ode(net, diffusion, noise, y, steps, solver, torch.float64)
    mean = WEIGHTS @ MEANS
    variance = WEIGHTS @ (VARIANCES + (MEANS - mean).square())
    if isinstance(diffusion, Flow) and solver == "sde":
        variance = variance + 0.0016
    atol = 0.015 if solver == "sde" else 0.005
    close(x.mean(), mean, rtol=0, atol=atol)
    close(x.var(), variance, rtol=0, atol=atol)


# Guidance and draws


def test_guidance_at_scale_one_costs_one_forward():
    sizes = []

    def net(x, t, y):
        sizes.append(len(x))
        return x * y.reshape(-1, 1, 1, 1)

    noise, y = torch.ones(3, 1, 2, 2), torch.tensor([1, 2, 3])
    plain = sample_ode(net, Flow(), noise, y, 10, "euler")
    assert torch.equal(sample_ode(Guided(net, 1.0, 4), Flow(), noise, y, 10, "euler"), plain)
    assert sizes == [3] * 20


def test_seeds_of_images_and_of_steps_never_meet():
    """(seed, image) and (seed, rank, step 0) differ, although numpy pads keys with zeros."""
    keys = [(0,), (0, 5), (0, 5, 0), (0, 5, 2), (5, 0), (0, 5, 1)]
    assert len({seed_of(*k) for k in keys}) == len(keys)
