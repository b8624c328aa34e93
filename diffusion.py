"""Noise processes, training targets, ODE and SDE samplers, guidance. No networks, data or files.

Conventions, here and in every other file
  - Time runs from data to noise. Flow: t in [0, 1], x_t = a(t) x_0 + s(t) eps, velocity
    v = a' x_0 + s' eps (linear: eps - x_0). EDM: the time is the noise level sigma. DDPM: the time
    is the integer step 0 .. 999, and -1 stands for clean data. The original SiT repository runs
    the other way (t -> 1 - t, v -> -v): `models.load_official` converts its weights.
  - Shapes: images and latents (N, C, H, W); tokens (N, T, D); labels (N,) int64; times (N,).
    The null label is `num_classes`.
  - "out" is the raw network output: C channels, or 2C under DDPM (noise, then variance values).
  - Training runs in the dtype of x_0 (float32), samplers in float64 and their network in `dtype`.

Sources (arXiv): SiT 2401.08740, EDM 2206.00364, DDPM 2006.11239, improved DDPM 2102.09672, DDIM
2010.02502, classifier-free guidance 2207.12598, interval guidance 2404.07724, REPA 2410.06940,
MeanFlow 2505.13447.
"""

import math
from itertools import pairwise

import numpy as np
import torch


def seed_of(*keys):
    """A 63-bit seed from integers (>= 0) and their number, e.g. (seed, rank, step)."""
    sequence = np.random.SeedSequence([*keys, len(keys)])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def per_image(values, x):
    """Values (N,) shaped and typed to multiply images x (N, C, H, W)."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Diffusion:
    """What the three noise processes share.

    The ODE is integrated in coordinates z = x_t / scale(t) over clock(t): dz/dclock = velocity.
    Flow and EDM: z = x_t, clock = t. DDPM: the variance-exploding form, where Euler is DDIM.
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
    """Stochastic interpolant with velocity prediction: SiT eq. 1 and 4. path: linear or gvp."""

    def __init__(self, path="linear"):
        if path not in ("linear", "gvp"):
            raise ValueError(f"unknown path {path!r}: choose linear or gvp")
        self.path = path

    def coefficients(self, t):
        """a, s and their derivatives a', s' at t: SiT section 2.3 (REPA calls gvp cosine)."""
        if self.path == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        half = math.pi / 2
        cos = torch.cos(half * t)
        sin = torch.sin(half * t)
        return cos, sin, -half * sin, half * cos

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
        """x_0 from a velocity, by x_t = a x_0 + s eps, v = a' x_0 + s' eps. Linear: x_t - t v."""
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
    """EDM (Table 1, column "ours"): x = x_0 + sigma eps, log sigma ~ Normal(p_mean, p_std)."""

    def __init__(
        self, p_mean=-1.2, p_std=1.2, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, rho=7.0
    ):
        self.p_mean = p_mean
        self.p_std = p_std
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def preconditioning(self, sigma):
        """c_skip, c_out, c_in, c_noise: EDM Table 1."""
        total = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_in = total.rsqrt()
        c_out = sigma * self.sigma_data * c_in
        return c_skip, c_out, c_in, sigma.log() / 4

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
        """(x_0 - c_skip x_t) / c_out: EDM eq. 8, whose loss weight lambda(sigma) c_out^2 is 1."""
        sigma = per_image(t, x0)
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        # The same, written without its cancellation at small sigma.
        return (sigma / self.sigma_data * x0 - self.sigma_data * noise) * c_in

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
        low = self.sigma_min ** (1 / self.rho)
        high = self.sigma_max ** (1 / self.rho)
        sigmas = (high + ramp * (low - high)) ** self.rho
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


class DDPM(Diffusion):
    """DiT's process: 1000 linear betas, noise prediction, learned variance (improved DDPM eq. 15).

    clip: clamp the predicted x_0 to [-1, 1] in sampling (for pixels; DiT's latents go without).
    strided: sample steps 0, s, 2s, ... ("ddimN" in DiT's code), not spread from 0 to 999.
    """

    learned_variance = True

    def __init__(self, clip=False, strided=False):
        self.clip = clip
        self.strided = strided
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        # Index t + 1, so that index 0 is clean data (t = -1) with an abar of 1.
        clean = torch.ones(1, dtype=torch.float64)
        self.cumulative = torch.cat([clean, torch.cumprod(1 - betas, 0)])

    def abar(self, t):
        """Cumulative product of 1 - beta at integer steps t, 1 at t = -1: float64 on t's device."""
        if self.cumulative.device != t.device:
            self.cumulative = self.cumulative.to(t.device)
        return self.cumulative[t + 1]

    def posterior(self, t, t_prev):
        """q(x_prev | x_t, x_0) between steps t and t_prev < t: DDPM eq. 6 and 7, float64 (N,).

        Returns the coefficients of x_0 and x_t in the mean, log beta, log variance. The variance
        is 0 in the step to clean data: its logarithm there is that of step 1 (improved DDPM).
        """
        abar = self.abar(t)
        abar_prev = self.abar(t_prev)
        beta = 1 - abar / abar_prev
        mean_x0 = beta * abar_prev.sqrt() / (1 - abar)
        mean_xt = (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar)
        abar_0, abar_1 = self.cumulative[1:3]  # of steps 0 and 1
        variance_1 = (1 - abar_1 / abar_0) * (1 - abar_0) / (1 - abar_1)
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
        """log beta and posterior, mixed by the last C channels of out: improved DDPM eq. 15."""
        _, _, log_beta, log_posterior = self.posterior(t, t_prev)
        fraction = (out[:, out.shape[1] // 2 :] + 1) / 2
        return fraction * per_image(log_beta, out) + (1 - fraction) * per_image(log_posterior, out)

    def variational_bound(self, out, x0, noise, t):
        """KL(q || p) for t > 0, -log p(x_0 | x_1) at t = 0, in bits per element (N, C, H, W).

        Improved DDPM eq. 4-7. Trains the variance only: the mean is held fixed, as in DiT.
        """
        x_t = self.add_noise(x0, noise, t)
        eps, variance_values = out.float().chunk(2, 1)
        eps = eps.detach()
        log_p = self.log_variance(torch.cat([eps, variance_values], 1), t, t - 1)
        mean_x0, mean_xt, _, log_q = self.posterior(t, t - 1)
        mean_x0, mean_xt, log_q = (per_image(v, x0) for v in (mean_x0, mean_xt, log_q))
        x0_hat = self.unclipped(eps, x_t, t)
        squared = (mean_x0 * (x0 - x0_hat)).square()
        kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + squared * (-log_p).exp())
        mean = mean_x0 * x0_hat + mean_xt * x_t
        likelihood = discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_p)
        return torch.where(per_image(t, x0) == 0, -likelihood, kl) / math.log(2)

    def loss(self, out, x0, noise, t):
        """DiT's: squared error of the noise plus the variational bound, per element."""
        squared = super().loss(out[:, : x0.shape[1]], x0, noise, t)
        return squared + self.variational_bound(out, x0, noise, t)

    def unclipped(self, eps, x_t, t):
        abar = self.abar(t)
        return (x_t - per_image((1 - abar).sqrt(), x_t) * eps) / per_image(abar.sqrt(), x_t)

    def denoise(self, out, x_t, t):
        """x_0 from predicted noise: DDPM eq. 15."""
        x0 = self.unclipped(out[:, : x_t.shape[1]], x_t, t)
        return x0.clamp(-1, 1) if self.clip else x0

    def velocity(self, out, x_t, t):
        """dz/dclock: the noise, recomputed from x_0 so that clipping counts. DDIM eq. 13-14."""
        abar = self.abar(t)
        signal = per_image(abar.sqrt(), x_t) * self.denoise(out, x_t, t)
        return (x_t - signal) / per_image((1 - abar).sqrt(), x_t)

    def clock(self, t):
        return ((1 - self.abar(t)) / self.abar(t)).sqrt()

    def scale(self, t):
        return self.abar(t).sqrt()

    def times(self, steps):
        """Steps from noise to data, then -1: steps + 1 values, int64 (improved DDPM section 4)."""
        if not 1 <= steps <= 1000:
            raise ValueError(f"{steps} sampling steps: DDPM has 1 to 1000")
        if self.strided:
            grid = range(0, 1000, math.ceil(1000 / steps))[::-1]
            if len(grid) != steps:
                raise ValueError(f"no integer stride takes exactly {steps} of 1000 steps")
        else:
            grid = [round(999 - i * 999 / max(steps - 1, 1)) for i in range(steps)]
        return torch.tensor([*grid, -1])


def discretized_gaussian_log_likelihood(x, mean, log_std):
    """log P of 8-bit pixels scaled to [-1, 1] under a Gaussian, in nats: DDPM eq. 13."""

    def cdf(v):  # the tanh approximation, as in improved DDPM's code
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


def draw_interval(n, equal_share, mean, std, device="cpu", normal=None):
    """MeanFlow's times 0 < r <= t < 1, each (n,): two logit-normal draws; linear flow's time.

    r = t in the first int(equal_share n) rows, as in the official code (meanflow.py, sample_tr).
    normal (2, n): unit normal draws.
    """
    normal = torch.randn(2, n, device=device) if normal is None else normal
    times = (mean + std * normal).sigmoid()
    t, r = times.amax(0), times.amin(0)
    equal = torch.arange(n, device=t.device) < int(equal_share * n)
    return t, torch.where(equal, t, r)


class Guided:
    """Classifier-free guidance, one doubled forward: u + scale (c - u), u with the null label.

    scale     >= 1; 1 is the network itself, one plain forward.
    interval  (low, high) in the diffusion's time; outside it one plain forward (its paper's eq. 6).
    channels  how many leading channels are guided, never variance; None: all. 3 is DiT's code.
    """

    def __init__(self, net, scale, null_label, interval=(-math.inf, math.inf), channels=None):
        if scale == math.inf:
            raise ValueError("guidance must be finite")
        if not scale >= 1:
            raise ValueError(f"guidance {scale:g} is below 1")
        if not interval[0] < interval[1]:
            raise ValueError(f"guidance interval {interval[0]:g} .. {interval[1]:g} is empty")
        if channels is not None and channels < 1:
            raise ValueError(f"guidance on {channels} channels: must be at least 1")
        self.net = net
        self.scale = scale
        self.null_label = null_label
        self.interval = interval
        self.channels = channels

    def at(self, t):
        """The network for a sampling step that starts at time t."""
        return self if self.scale != 1 and self.interval[0] <= t <= self.interval[1] else self.net

    def __call__(self, x, t, y):
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        out = self.net(torch.cat([x, x]), torch.cat([t, t]), labels)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        conditional, unconditional = out.chunk(2)
        k = min(self.channels or x.shape[1], x.shape[1])
        guided = unconditional[:, :k] + self.scale * (conditional[:, :k] - unconditional[:, :k])
        return torch.cat([guided, conditional[:, k:]], 1)


class ImageNoise:
    """Random draws for images `indices`: image i depends on (seed, i) alone, in whatever batch."""

    def __init__(self, seed, indices, shape, device="cpu"):
        self.generators = [torch.Generator().manual_seed(seed_of(seed, i)) for i in indices]
        self.shape = tuple(shape)
        self.device = device

    def __call__(self):
        """The next unit noise (N, *shape) float32 on device, drawn on the CPU."""
        draws = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(draws).to(self.device)

    def choice(self, values):
        """One of values per image, uniformly: (N,) int64."""
        picks = [torch.randint(len(values), (), generator=g).item() for g in self.generators]
        return torch.tensor([values[p] for p in picks], device=self.device)


def network_output(net, diffusion, x, t, y, dtype, start=None):
    """Raw output (float64) for the sampler state x (float64) at the Python time t; t as a batch.

    start: when the step began, if not at t. Guidance intervals go by it, as in REPA's Heun steps.
    """
    discrete = isinstance(t, int)
    t_batch = x.new_full((len(x),), t, dtype=torch.int64 if discrete else torch.float64)
    x_in, t_in = diffusion.net_inputs(x, t_batch)
    if not discrete:
        t_in = t_in.to(dtype)
    if isinstance(net, Guided):
        net = net.at(t if start is None else start)
    return net(x_in.to(dtype), t_in, y).double(), t_batch


@torch.no_grad()
def sample_ode(net, diffusion, noise, y, steps, solver="heun", dtype=torch.float32):
    """Integrate the probability-flow ODE from unit noise (N, C, H, W) to images, float64.

    net(x, t, y) is a network or `Guided`. Euler costs `steps` calls, Heun 2 * steps - 1. EDM + heun
    is EDM's Algorithm 1; DDPM + euler is DDIM (eq. 13); Flow + either is REPA's ODE sampler.
    "meanflow" is sample_mean_flow.
    """
    assert solver in ("euler", "heun", "meanflow"), solver
    if solver == "meanflow":
        return sample_mean_flow(net, noise, y, steps, dtype)
    grid = diffusion.times(steps)
    times = grid.tolist()
    clock = diffusion.clock(grid).tolist()
    scale = diffusion.scale(grid).tolist()
    x = diffusion.start(noise.double())
    for i in range(steps):
        z = x / scale[i]
        step = clock[i + 1] - clock[i]
        out, t = network_output(net, diffusion, x, times[i], y, dtype)
        d = diffusion.velocity(out, x, t)
        x = (z + step * d) * scale[i + 1]
        if solver == "heun" and i < steps - 1:
            out, t = network_output(net, diffusion, x, times[i + 1], y, dtype, start=times[i])
            x = (z + step * (d + diffusion.velocity(out, x, t)) / 2) * scale[i + 1]
    return x


@torch.no_grad()
def sample_sde(net, diffusion, noise, y, steps, draw, dtype=torch.float32, churn=None):
    """Stochastic sampling from unit noise (N, C, H, W) to images, float64.

    draw() gives the next unit noise, e.g. an `ImageNoise`. Flow: Euler-Maruyama. DDPM: ancestral
    sampling with the learned variance. EDM: Algorithm 2, churn = {"S_churn": ...}.
    """
    if isinstance(diffusion, EDM):
        return stochastic_heun(net, diffusion, noise, y, steps, draw, dtype, **(churn or {}))
    sampler = ancestral if isinstance(diffusion, DDPM) else euler_maruyama
    return sampler(net, diffusion, noise, y, steps, draw, dtype)


def euler_maruyama(net, diffusion, noise, y, steps, draw, dtype, last=0.04):
    """SiT eq. 6 with g^2 = 2t, as REPA and SRA sample: steps - 1 noisy steps, one without noise."""
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
    """DDPM Algorithm 2 on respaced steps with the learned variance: improved DDPM eq. 15-16."""
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
    net, diffusion, noise, y, steps, draw, dtype, S_churn=40, S_min=0, S_max=math.inf, S_noise=1
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


@torch.no_grad()
def sample_mean_flow(net, noise, y, steps=1, dtype=torch.float32):
    """x_r = x_t - (t - r) u(x_t, r, t), MeanFlow eq. 12, from unit noise to images, float64.

    net(x, t, y, h=t - r) is a network with `interval`, of linear flow. Costs `steps` calls.
    """
    if isinstance(net, Guided):
        assert net.scale == 1, "guidance is in the weights of such networks"
        net = net.net
    x = noise.double()
    for t, r in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()):
        t_batch, h_batch = (x.new_full((len(x),), value, dtype=dtype) for value in (t, t - r))
        x = x - (t - r) * net(x.to(dtype), t_batch, y, h=h_batch).double()
    return x


def sample_preview(net, diffusion, noise, y):
    """A quick look at a network: MeanFlow in one step if it has `interval`, else Euler in 50."""
    steps, solver = (1, "meanflow") if "interval" in net.config else (50, "euler")
    return sample_ode(net, diffusion, noise, y, steps, solver)
