"""Noise processes, their training targets, probability-flow ODE and SDE samplers, and guidance. No networks, no data, no files.

Conventions, here and in every other file
  - Time runs from data to noise. Flow: t in [0, 1], x_t = a(t) x_0 + s(t) eps, velocity v = a' x_0 + s' eps (linear: eps - x_0).
    EDM: the time is the noise level sigma. DDPM: the time is the integer step 0 .. 999, and -1 stands for clean data.
    The original SiT repository runs the other way (t -> 1 - t, v -> -v): `models.load_official` converts its weights.
  - Shapes: images and latents (N, C, H, W); tokens (N, T, D); labels (N,) int64; times (N,). The null label is `num_classes`.
  - "out" is the raw network output: C channels, or 2C under DDPM (noise, then variance values).
  - Training runs in the dtype of x_0 (float32). Samplers keep their state in float64 and feed the network `dtype`.

Sources: SiT (Ma et al. 2024, arXiv 2401.08740), EDM (Karras et al. 2022, arXiv 2206.00364), DDPM (Ho et al. 2020, arXiv 2006.11239),
improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672), DDIM (Song et al. 2021, arXiv 2010.02502), classifier-free guidance (Ho & Salimans
2022, arXiv 2207.12598), interval guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724), REPA (Yu et al. 2024, arXiv 2410.06940).
"""

import math
from itertools import pairwise

import numpy as np
import torch


def seed_of(*keys):
    """A 63-bit seed that depends on every integer (>= 0) in keys and on their number, e.g. (seed, rank, step)."""
    return int(
        np.random.SeedSequence([*keys, len(keys)]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def per_image(values, x):
    """Values (N,) shaped and typed to multiply images x (N, C, H, W)."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# Processes


class Diffusion:
    """What the three noise processes share. The ODE is integrated in the process's own coordinates z = x_t / scale(t), over clock(t), where
    it is dz/dclock = velocity. Flow and EDM: z = x_t and clock = t. DDPM: the variance-exploding form, in which DDIM is Euler's method.
    """

    learned_variance = False

    def net_inputs(self, x_t, t):
        """What the network is fed: (x_in (N, C, H, W), t_in (N,))."""
        return x_t, t

    def loss(self, out, x0, noise, t):
        """Per-element training loss (N, C, H, W), fp32."""
        return (out.float() - self.target(x0, noise, t)).square()

    def start(self, noise):
        """x at the first of `times`, from unit noise."""
        return noise

    def clock(self, t):
        return t

    def scale(self, t):
        return torch.ones_like(t)


class Flow(Diffusion):
    """Stochastic interpolant with velocity prediction: SiT eq. 1 and 4; path "linear" or "gvp" (SiT section 2.3; REPA calls it cosine)."""

    def __init__(self, path="linear"):
        if path not in ("linear", "gvp"):
            raise ValueError(f"unknown path {path!r}: choose linear or gvp")
        self.path = path

    def coefficients(self, t):
        """a, s and their derivatives a', s' at times t."""
        if self.path == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        half = math.pi / 2
        return (
            torch.cos(half * t),
            torch.sin(half * t),
            -half * torch.sin(half * t),
            half * torch.cos(half * t),
        )

    def draw_t(self, n, device):
        """Training times, uniform in [0, 1): (n,)."""
        return torch.rand(n, device=device)

    def add_noise(self, x0, noise, t):
        """x_t = a(t) x_0 + s(t) eps: (N, C, H, W)."""
        a, s, _, _ = self.coefficients(per_image(t, x0))
        return a * x0 + s * noise

    def target(self, x0, noise, t):
        """v = a' x_0 + s' eps, SiT eq. 4."""
        _, _, da, ds = self.coefficients(per_image(t, x0))
        return da * x0 + ds * noise

    def denoise(self, out, x_t, t):
        """x_0 from a velocity: solves x_t = a x_0 + s eps, v = a' x_0 + s' eps. Linear: x_t - t v."""
        a, s, da, ds = self.coefficients(per_image(t, x_t))
        return (ds * x_t - s * out) / (a * ds - s * da)

    def noise(self, out, x_t, t):
        """eps from a velocity. Linear: x_t + (1 - t) v."""
        a, s, da, ds = self.coefficients(per_image(t, x_t))
        return (a * out - da * x_t) / (a * ds - s * da)

    def score(self, out, x_t, t):
        """grad log p_t(x) = -eps / s(t), SiT eq. 9; infinite at t = 0."""
        _, s, _, _ = self.coefficients(per_image(t, x_t))
        return -self.noise(out, x_t, t) / s

    def velocity(self, out, x_t, t):
        """dx/dt of the probability-flow ODE, SiT eq. 5: the network output itself."""
        return out

    def times(self, steps):
        """The ODE grid of SiT and REPA: uniform from 1 to 0, steps + 1 values, float64."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


class EDM(Diffusion):
    """Preconditioned denoiser of EDM (Table 1, column "ours"): x = x_0 + sigma eps, log sigma ~ Normal(p_mean, p_std)."""

    def __init__(
        self, p_mean=-1.2, p_std=1.2, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, rho=7.0
    ):
        self.p_mean, self.p_std, self.sigma_data = p_mean, p_std, sigma_data
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def preconditioning(self, sigma):
        """c_skip, c_out, c_in, c_noise: EDM Table 1."""
        total = sigma.square() + self.sigma_data**2
        return (
            self.sigma_data**2 / total,
            sigma * self.sigma_data * total.rsqrt(),
            total.rsqrt(),
            sigma.log() / 4,
        )

    def draw_t(self, n, device):
        """Training noise levels sigma (n,)."""
        return (self.p_mean + self.p_std * torch.randn(n, device=device)).exp()

    def add_noise(self, x0, noise, t):
        """x_0 + sigma eps."""
        return x0 + per_image(t, x0) * noise

    def net_inputs(self, x_t, t):
        """c_in x and c_noise = ln(sigma) / 4: EDM eq. 7."""
        _, _, c_in, c_noise = self.preconditioning(t)
        return per_image(c_in, x_t) * x_t, c_noise

    def target(self, x0, noise, t):
        """(x_0 - c_skip x_t) / c_out, EDM eq. 8, whose loss weight lambda(sigma) c_out^2 is 1. Written without its cancellation at
        small sigma: (sigma / sigma_data x_0 - sigma_data eps) / sqrt(sigma^2 + sigma_data^2).
        """
        sigma = per_image(t, x0)
        return (sigma / self.sigma_data * x0 - self.sigma_data * noise) * (
            sigma.square() + self.sigma_data**2
        ).rsqrt()

    def denoise(self, out, x_t, t):
        """D(x; sigma) = c_skip x + c_out F: EDM eq. 7."""
        c_skip, c_out, _, _ = self.preconditioning(t)
        return per_image(c_skip, x_t) * x_t + per_image(c_out, x_t) * out

    def velocity(self, out, x_t, t):
        """dx/dsigma = (x - D) / sigma: EDM eq. 1 and 3 with sigma(t) = t, s(t) = 1."""
        return (x_t - self.denoise(out, x_t, t)) / per_image(t, x_t)

    def start(self, noise):
        return noise * self.sigma_max

    def times(self, steps):
        """EDM eq. 5: sigma_max to sigma_min, then 0; steps + 1 values, float64."""
        ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.cat(
            [(high + ramp * (low - high)) ** self.rho, torch.zeros(1, dtype=torch.float64)]
        )


class DDPM(Diffusion):
    """DiT's diffusion: 1000 linear betas from 1e-4 to 0.02, noise prediction, learned-range variance (improved DDPM eq. 15).

    clip: clamp the predicted x_0 to [-1, 1] while sampling (pixels only; DiT samples latents without it).
    strided: the sampling grid of a constant integer stride from step 0 ("ddimN" in DiT's code) instead of one from 0 to 999.
    """

    learned_variance = True

    def __init__(self, clip=False, strided=False):
        self.clip, self.strided = clip, strided
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        # Index t + 1, so that index 0 is clean data (t = -1) with an abar of 1.
        self.cumulative = torch.cat(
            [torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)]
        )

    def abar(self, t):
        """Cumulative product of 1 - beta at integer steps t, 1 at t = -1: float64, on the device of t (the table moves there once)."""
        if self.cumulative.device != t.device:
            self.cumulative = self.cumulative.to(t.device)
        return self.cumulative[t + 1]

    def posterior(self, t, t_prev):
        """q(x_prev | x_t, x_0) of the process with steps t and t_prev < t: DDPM eq. 6 and 7, float64 (N,).

        Returns the coefficients of x_0 and of x_t in the mean, log beta, and log variance. The variance is 0 in the step to clean data:
        there its logarithm is that of step 1 (improved DDPM clips the same way; samplers add no noise there).
        """
        abar, abar_prev = self.abar(t), self.abar(t_prev)
        beta = 1 - abar / abar_prev
        mean_x0 = beta * abar_prev.sqrt() / (1 - abar)
        mean_xt = (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        variance_1 = (
            (1 - self.abar(one) / self.abar(zero)) * (1 - self.abar(zero)) / (1 - self.abar(one))
        )
        variance = torch.where(t_prev < 0, variance_1, beta * (1 - abar_prev) / (1 - abar))
        return mean_x0, mean_xt, beta.log(), variance.log()

    def draw_t(self, n, device):
        """Training steps (n,) int64, uniform in 0 .. 999."""
        return torch.randint(0, 1000, (n,), device=device)

    def add_noise(self, x0, noise, t):
        """sqrt(abar) x_0 + sqrt(1 - abar) eps: DDPM eq. 4."""
        abar = self.abar(t)
        return per_image(abar.sqrt(), x0) * x0 + per_image((1 - abar).sqrt(), x0) * noise

    def target(self, x0, noise, t):
        """The noise: DDPM eq. 14."""
        return noise

    def log_variance(self, out, t, t_prev):
        """Interpolated between log posterior variance and log beta by the last C channels of out: improved DDPM eq. 15."""
        _, _, log_beta, log_posterior = self.posterior(t, t_prev)
        fraction = (out[:, out.shape[1] // 2 :] + 1) / 2
        return fraction * per_image(log_beta, out) + (1 - fraction) * per_image(log_posterior, out)

    def variational_bound(self, out, x0, noise, t):
        """The variational-bound term per element in bits (N, C, H, W); trains the variance only (the mean is held fixed).

        KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, the discretised Gaussian log-likelihood at t = 0: improved DDPM eq. 4-7, as in DiT.
        """
        out = out.float()
        x_t = self.add_noise(x0, noise, t)
        eps, variance_values = out.chunk(2, 1)
        log_p = self.log_variance(torch.cat([eps.detach(), variance_values], 1), t, t - 1)
        mean_x0, mean_xt, _, log_q = self.posterior(t, t - 1)
        mean_x0, mean_xt, log_q = (per_image(v, x0) for v in (mean_x0, mean_xt, log_q))
        x0_hat = self.unclipped(eps.detach(), x_t, t)
        difference = mean_x0 * (x0 - x0_hat)
        kl = 0.5 * (
            log_p - log_q - 1 + (log_q - log_p).exp() + difference.square() * (-log_p).exp()
        )
        likelihood = discretized_gaussian_log_likelihood(
            x0, mean_x0 * x0_hat + mean_xt * x_t, 0.5 * log_p
        )
        return torch.where(per_image(t, x0) == 0, -likelihood, kl) / math.log(2)

    def loss(self, out, x0, noise, t):
        """Squared error of the noise plus the variational bound, per element: DiT's training loss."""
        return super().loss(out[:, : x0.shape[1]], x0, noise, t) + self.variational_bound(
            out, x0, noise, t
        )

    def unclipped(self, eps, x_t, t):
        abar = self.abar(t)
        return (x_t - per_image((1 - abar).sqrt(), x_t) * eps) / per_image(abar.sqrt(), x_t)

    def denoise(self, out, x_t, t):
        """x_0 from predicted noise: DDPM eq. 15."""
        x0 = self.unclipped(out[:, : x_t.shape[1]], x_t, t)
        return x0.clamp(-1, 1) if self.clip else x0

    def velocity(self, out, x_t, t):
        """dz/dclock: the predicted noise, recomputed from x_0 so that clipping counts. DDIM eq. 13-14."""
        abar = self.abar(t)
        return (x_t - per_image(abar.sqrt(), x_t) * self.denoise(out, x_t, t)) / per_image(
            (1 - abar).sqrt(), x_t
        )

    def clock(self, t):
        return ((1 - self.abar(t)) / self.abar(t)).sqrt()

    def scale(self, t):
        return self.abar(t).sqrt()

    def times(self, steps):
        """Original step indices from noise to data, then -1: steps + 1 values, int64. The network sees these (improved DDPM section 4)."""
        if not 1 <= steps <= 1000:
            raise ValueError(f"{steps} sampling steps: DDPM has 1 to 1000")
        if self.strided:
            stride = next((s for s in range(1, 1001) if len(range(0, 1000, s)) == steps), None)
            if stride is None:
                raise ValueError(f"no integer stride takes exactly {steps} of 1000 steps")
            grid = list(range(0, 1000, stride))
        else:
            grid = [round(i * 999 / (steps - 1)) for i in range(steps)] if steps > 1 else [999]
        return torch.tensor(grid[::-1] + [-1])


def discretized_gaussian_log_likelihood(x, mean, log_std):
    """log P of 8-bit pixels scaled to [-1, 1] under a Gaussian, in nats per element: DDPM eq. 13, with the tanh form of the normal CDF."""

    def cdf(v):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    upper = cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_std).exp())
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


DIFFUSIONS = ("flow", "gvp", "edm", "ddpm")


def make_diffusion(name, clip=False):
    """A noise process by its command-line name. clip matters to DDPM sampling only."""
    if name == "ddpm":
        return DDPM(clip=clip)
    if name == "edm":
        return EDM()
    return Flow("linear" if name == "flow" else name)


# Guidance


class Guided:
    """Classifier-free guidance around a network: out = u + scale (c - u), where u sees the null label. One doubled forward.

    scale     >= 1; 1 is the network itself, one plain forward.
    interval  (low, high), in the time of the diffusion: outside it a step costs one plain forward (interval guidance, eq. 6).
    channels  how many leading channels are guided; None: all of the image's. 3 reproduces DiT's code. Variance channels stay conditional.
    """

    def __init__(self, net, scale, null_label, interval=(-math.inf, math.inf), channels=None):
        if scale == math.inf:
            raise ValueError("guidance must be finite")
        if not scale >= 1:
            raise ValueError(
                f"guidance {scale:g} is below 1: that would push samples away from their class; 1 turns guidance off"
            )
        if not interval[0] < interval[1]:
            raise ValueError(
                f"guidance interval {interval[0]:g} .. {interval[1]:g} is empty: the first time must be below the second"
            )
        if channels is not None and channels < 1:
            raise ValueError(f"guidance on {channels} channels: must be at least 1")
        self.net, self.scale, self.null_label, self.interval, self.channels = (
            net,
            scale,
            null_label,
            interval,
            channels,
        )

    def at(self, t):
        """The network for a sampling step that starts at time t."""
        return self if self.scale != 1 and self.interval[0] <= t <= self.interval[1] else self.net

    def __call__(self, x, t, y):
        out = self.net(
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([y, torch.full_like(y, self.null_label)]),
        )
        conditional, unconditional = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
        k = min(self.channels or x.shape[1], x.shape[1])
        guided = unconditional[:, :k] + self.scale * (conditional[:, :k] - unconditional[:, :k])
        return torch.cat([guided, conditional[:, k:]], 1)


# Samplers


class ImageNoise:
    """Random draws for images `indices` of a run: image i depends on (seed, i) alone, whatever the batch or the process it lands in.

    Each call gives the next unit noise (N, *shape) float32 on device; the draws themselves are made on the CPU, one generator an image.
    """

    def __init__(self, seed, indices, shape, device="cpu"):
        self.generators = [torch.Generator().manual_seed(seed_of(seed, i)) for i in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(
            self.device
        )

    def choice(self, values):
        """One of values per image, uniformly: (N,) int64."""
        picks = [torch.randint(len(values), (), generator=g).item() for g in self.generators]
        return torch.tensor([values[p] for p in picks], device=self.device)


def network_output(net, diffusion, x, t, y, dtype, start=None):
    """Raw output (float64) for the sampler state x (float64) at the Python time t, and t as a batch.

    start: when the step began, if not at t; guidance intervals go by it (in REPA too a Heun correction follows the start of its step).
    """
    t_batch = torch.full(
        (len(x),), t, device=x.device, dtype=torch.int64 if isinstance(t, int) else torch.float64
    )
    x_in, t_in = diffusion.net_inputs(x, t_batch)
    if isinstance(net, Guided):
        net = net.at(t if start is None else start)
    return net(x_in.to(dtype), t_in if isinstance(t, int) else t_in.to(dtype), y).double(), t_batch


@torch.no_grad()
def sample_ode(net, diffusion, noise, y, steps, solver="heun", dtype=torch.float32):
    """Integrate the probability-flow ODE from unit noise (N, C, H, W) to images, float64.

    net(x, t, y) is a network or `Guided`. Euler costs `steps` calls, Heun 2 * steps - 1 (no correction in the last step).
    EDM + heun is EDM's Algorithm 1; DDPM + euler is DDIM (eq. 13) on respaced steps; Flow + euler or heun is REPA's ODE sampler.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown ODE solver {solver!r}: choose euler or heun")
    grid = diffusion.times(steps)
    times, clock, scale = (
        grid.tolist(),
        diffusion.clock(grid).tolist(),
        diffusion.scale(grid).tolist(),
    )
    x = diffusion.start(noise.double())
    for i in range(steps):
        z, step = x / scale[i], clock[i + 1] - clock[i]
        out, t = network_output(net, diffusion, x, times[i], y, dtype)
        d = diffusion.velocity(out, x, t)
        x = (z + step * d) * scale[i + 1]
        if solver == "heun" and i < steps - 1:
            out, t = network_output(net, diffusion, x, times[i + 1], y, dtype, start=times[i])
            x = (z + step * (d + diffusion.velocity(out, x, t)) / 2) * scale[i + 1]
    return x


@torch.no_grad()
def sample_sde(net, diffusion, noise, y, steps, draw, dtype=torch.float32, churn=None):
    """Stochastic sampling from unit noise (N, C, H, W) to images, float64. draw() gives the next unit noise, e.g. an `ImageNoise`.

    Flow: Euler-Maruyama of REPA. DDPM: ancestral sampling with the learned variance. EDM: Algorithm 2, churn = {"S_churn": ...}.
    """
    if isinstance(diffusion, EDM):
        return stochastic_heun(net, diffusion, noise, y, steps, draw, dtype, **(churn or {}))
    sampler = ancestral if isinstance(diffusion, DDPM) else euler_maruyama
    return sampler(net, diffusion, noise, y, steps, draw, dtype)


def euler_maruyama(net, diffusion, noise, y, steps, draw, dtype, last=0.04):
    """SiT eq. 6 with g^2 = 2t: times linspace(1, 0.04, steps), then 0; steps - 1 noisy steps and one without noise (REPA, SRA)."""
    times = [*torch.linspace(1, last, steps, dtype=torch.float64).tolist(), 0.0]
    x = diffusion.start(noise.double())
    for t, t_next in pairwise(times):
        out, t_batch = network_output(net, diffusion, x, t, y, dtype)
        drift = diffusion.velocity(out, x, t_batch) - t * diffusion.score(out, x, t_batch)
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * draw().double()
    return x


def ancestral(net, diffusion, noise, y, steps, draw, dtype):
    """DDPM Algorithm 2 on respaced steps with the learned variance: improved DDPM eq. 15-16; the last step adds no noise."""
    x = diffusion.start(noise.double())
    for t, t_prev in pairwise(diffusion.times(steps).tolist()):
        out, t_batch = network_output(net, diffusion, x, t, y, dtype)
        prev_batch = torch.full_like(t_batch, t_prev)
        mean_x0, mean_xt, _, _ = diffusion.posterior(t_batch, prev_batch)
        x = per_image(mean_x0, x) * diffusion.denoise(out, x, t_batch) + per_image(mean_xt, x) * x
        if t_prev >= 0:
            x = x + (0.5 * diffusion.log_variance(out, t_batch, prev_batch)).exp() * draw().double()
    return x


def stochastic_heun(
    net,
    diffusion,
    noise,
    y,
    steps,
    draw,
    dtype,
    S_churn=40.0,
    S_min=0.0,
    S_max=math.inf,
    S_noise=1.0,
):
    """EDM Algorithm 2. One draw a step, also where the churn is zero, as in the official code."""
    x = diffusion.start(noise.double())
    for i, (t, t_next) in enumerate(pairwise(diffusion.times(steps).tolist())):
        gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= t <= S_max else 0.0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * S_noise * draw().double()
        out, t_batch = network_output(net, diffusion, x_hat, t_hat, y, dtype, start=t)
        d = diffusion.velocity(out, x_hat, t_batch)
        x = x_hat + (t_next - t_hat) * d
        if i < steps - 1:
            out, t_batch = network_output(net, diffusion, x, t_next, y, dtype, start=t)
            x = x_hat + (t_next - t_hat) * (d + diffusion.velocity(out, x, t_batch)) / 2
    return x
