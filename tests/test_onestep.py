"""DiverseDiT on MeanFlow and with Dispersive Loss: official values, closed forms, whole runs."""

import functools

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    NETWORK,
    as_rank,
    assert_same_run,
    checkpoint,
    close,
    fill,
    free_port,
    log_lines,
    terminate_after,
    tiny,
    train,
    words,
)

from diffusion import Flow, draw_interval, per_image, sample_mean_flow, sample_preview
from models import DiT, UserError
from train_diversedit import DiverseDiT, dispersive_loss, parse_args, time_derivative

SCRIPT = "train_diversedit"
ALONE = "--mean-flow --long-residual none --diversity-weight 0"
GUIDED = "--mean-flow --omega 1 --kappa 0.5"


def small(flags, network=None):
    """A method of four blocks, or of that network, with weights by the recipe."""
    args = parse_args(words(flags))
    method = DiverseDiT(args, network or {**NETWORK, "depth": 4, "learn_sigma": False}, Flow())
    fill(method.model, "student")
    fill(method.ema, "teacher")
    return method


def inputs(k=6):
    """x0, y, draws by name, r = t in the first k of 8 rows; what mean_flow_target is given then."""
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 8, 3, 8, 8, generator=g)
    t, r = draw_interval(8, k / 8, -0.4, 1.0, normal=torch.randn(2, 8, generator=g))
    y, labels = torch.arange(8), torch.tensor([10, 10, 2, 3, 4, 5, 6, 7])
    drop, u = torch.tensor([0.5] * 6 + [0.01, 0.02]), torch.rand(8, generator=g)
    draws = {"t": t, "r": r, "noise": noise, "drop": drop, "u": u}
    return (x0, y, draws), (Flow().add_noise(x0, noise, t), noise - x0, t, r, labels)


# Reference values


def test_times_and_sampler_of_the_official_code(golden):
    g = golden("meanflow_times")
    c, normal = g.config, torch.stack([g.inputs["normal_1"], g.inputs["normal_2"]])
    t, r = draw_interval(10, c["data_proportion"], c["P_mean"], c["P_std"], normal=normal)
    g.check("t", t)
    g.check("r", r)
    g.all_checked()
    g = golden("meanflow_sampler")
    net, e, y = DiT(**g.network(), interval=True), g.inputs["e"], g.inputs["y"]
    net.load_state_dict(g.weights(), strict=False)
    assert g.inputs["grid"].tolist() == [1, 0.5, 0]
    g.check("one_step", sample_preview(net, Flow(), e, y))
    g.check("two_step", sample_mean_flow(net, e, y, 2))
    g.all_checked()


SETTINGS = {  # draws, omega, kappa, times, share of rows with r = t
    "omega1": ("A", "1 --kappa 0 --guided-times 0 1 --equal-share 0.3"),
    "omega3": ("A", "3 --kappa 0 --guided-times 0 1 --equal-share 0.3"),
    "interval": ("B", "0.2 --kappa 0.92 --guided-times 0 0.75 --equal-share 0.5"),
    "mix": ("B", "1 --kappa 0.5 --guided-times 0.3 0.8 --equal-share 0.5"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_targets_losses_and_gradients_of_the_official_code(golden, name):
    """Its gradients go through u and du/dt of one derivative; ours through u of a forward alone."""
    g = golden("meanflow_loss")
    i, (group, flags) = g.inputs, SETTINGS[name]
    t, r, y, drop, drop_u = (i[f"{group}_{key}"] for key in ("t", "r", "y", "drop", "drop_u"))
    z, v, labels = (
        Flow().add_noise(i["x"], i["e"], t),
        i["e"] - i["x"],
        torch.where(drop == 1, 7, y),
    )
    for key, more in (("", ""), ("_p05", "--loss-power 0.5"), ("_c100", "--loss-offset 100")):
        method = small(f"{ALONE} --omega {flags} {more}", g.network())
        assert not method.model.load_state_dict(g.weights(), strict=False).unexpected_keys
        loss = method(i["x"], y, t=t, r=r, noise=i["e"], drop=drop_u)["loss"]
        g.check(f"{name}_loss{key}", loss)
        loss.backward()
        own = {k: p.grad for k, p in method.model.named_parameters()}
        if key != "_c100":
            g.check(f"{name}_grad_norms{key}", torch.stack([v.norm() for v in own.values()]))
        for output, spec in g.meta["outputs"].items():
            if key == "" and output.startswith(f"{name}_") and "parameter" in spec:
                g.check(output, own[spec["parameter"]][spec["rows"] or slice(None)])
    with torch.no_grad():
        u, k = method.model(z, t, labels, h=t - r), int(method.args.equal_share * 5)
        u_tgt = method.mean_flow_target(z, v, t, r, labels)
        method.args.equal_share = 1  # no row with r < t: the target is v_g
        v_g = method.mean_flow_target(z, v, t, r, labels)
        dudt = time_derivative(method.model, z[k:], t[k:], r[k:], labels[k:], v_g[k:])
    errors = (u - u_tgt).square().sum((1, 2, 3))
    found = {f"{group}_u": u, f"{group}_v_loss": (u - v).square().sum((1, 2, 3))}
    found |= {f"{name}_dudt": dudt, f"{name}_L": errors, f"{name}_v_g": v_g}
    found |= {f"{name}_u_tgt": u_tgt[k:], f"{name}_divisor_p05": (errors + 0.01).sqrt()}
    for output in found.keys() & g.outputs.keys():
        g.check(output, found[output])
    g.all_checked(*(key for key in g.outputs if not key.startswith((f"{name}_", f"{group}_"))))


def test_dispersive_loss_of_the_official_code(golden):
    g = golden("disp_loss")
    for name in g.outputs:
        kind, n, tau = name.split("_")
        z = g.inputs["z"][: int(n[1:])].clone().requires_grad_()
        loss = dispersive_loss(z, {"tau1": 1.0, "tau05": 0.5}[tau])
        assert -np.log(len(z)) <= loss <= 0
        g.check(name, torch.autograd.grad(loss, z)[0] if kind == "grad" else loss)
    g.all_checked()


# Rules of the target


def test_derivative_is_that_of_central_differences():
    """In float64, r fixed; the network's time code is of float32, which holds these times."""
    net = tiny(interval=True).double()
    z, v = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    t, r = torch.tensor([[0.25, 0.5, 0.875], [0.0, 0.125, 0.5]])
    y = torch.tensor([1, 5, 10])

    @torch.no_grad()
    def slope(step):
        ahead, behind = (net(z + a * v, t + a, y, h=t + a - r) for a in (step, -step))
        return (ahead - behind) / (2 * step)

    expected = (4 * slope(2**-8) - slope(2**-7)) / 3
    assert expected.abs().mean() > 0.1
    close(time_derivative(net, z, t, r, y, v), expected, rtol=1e-6, atol=1e-7)


# Rows that are computed without gradients: of the guidance, of the derivative.
FORWARDS = {"--omega 1": [2], "--omega 2": [8, 2], "--omega 1 --kappa 0.5": [16, 2]}
FORWARDS |= {"--omega 1 --equal-share 1": []}


@pytest.mark.parametrize("flags", FORWARDS)
def test_what_a_step_computes(flags):
    """The derivative of all rows would give the same target. Guidance holds at both ends."""
    (x0, y, draws), given = inputs(8 if "share" in flags else 6)
    method, ran = small(f"{ALONE} {flags}"), []

    record = method.model.register_forward_pre_hook
    record(lambda _, inputs: ran.append((len(inputs[0]), torch.is_grad_enabled())))
    method(x0, y, **draws)
    assert ran == [(8, True), *((n, False) for n in FORWARDS[flags])]
    with torch.no_grad():
        target = method.mean_flow_target(*given)
        method.args.equal_share = 0
        close(method.mean_flow_target(*given), target, rtol=1e-4, atol=1e-5)
        method.args.equal_share, method.args.guided_times = 1, [given[2][3].item()] * 2
        changed = (method.mean_flow_target(*given) != given[1]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [3] * (len(FORWARDS[flags]) > 1)


def test_a_gaussian_is_sampled_in_one_step():
    """Its average velocity is known; it fulfils the identity, and leads to mean and deviation."""
    mean, deviation = 0.7, 0.3

    def width(t):
        return (((1 - t) * deviation).square() + t.square()).sqrt()

    def net(x, t, y, h):
        t, r = per_image(t, x), per_image(t - h, x)
        x_r = (1 - r) * mean + width(r) / width(t) * (x - (1 - t) * mean)
        return (x - x_r) / (t - r)

    noise = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    for steps in (1, 2, 5):
        close(sample_mean_flow(net, noise, None, steps, torch.float64), mean + deviation * noise)
    t, r = torch.tensor([[0.3, 0.5, 0.9, 1.0], [0.1, 0.4, 0.2, 0.0]], dtype=torch.float64)
    v = net(noise, t, None, torch.full_like(t, 1e-7))
    target = v - per_image(t - r, noise) * time_derivative(net, noise, t, r, None, v)
    close(net(noise, t, None, t - r), target, rtol=1e-5, atol=1e-5)


def test_guidance_by_model():
    """MeanFlow's Table 4, kept with the arguments of a run; without it for omega or kappa alone."""
    published = {"B/4": (3, 0, 0, 1), "B/2": (1, 0.5, 0, 1), "M/2": (1, 0.5, 0, 1)}
    published |= {"L/2": (0.2, 0.92, 0, 0.8), "XL/2": (0.2, 0.92, 0, 0.75)}
    published |= {
        "L/2 --guided-times 0.3 0.8": (0.2, 0.92, 0.3, 0.8),
        "L/2 --omega 2": (2, 0, 0, 1),
    }
    for flags, expected in published.items():
        args = small(f"--mean-flow --model SiT-{flags}").args
        assert (args.omega, args.kappa, *args.guided_times) == expected


@pytest.mark.parametrize("mean_flow", ["", GUIDED])
def test_all_losses_together(mean_flow):
    """Features are those of the forward that is trained; bf16 changes little."""
    method = small(f"{mean_flow} --disperse-weight 0.3 --align-weight 0.2 --pairs all")
    (x0, y, draws), (z, _, t, r, labels) = inputs()
    draws["drop"] = draws["drop"].flip(0)  # the first two rows, one by one and by their number
    terms, h = method(x0, y, **draws), t - r if mean_flow else None
    _, features = method.model(z, t, labels, features=(1,), h=h)
    assert torch.isclose(terms["disperse"], dispersive_loss(features[1], 0.5))
    own = terms["weight"] * terms["diversity"] + 0.2 * terms["align"] + 0.3 * terms["disperse"]
    assert torch.isclose(terms["loss"], terms["denoise"] + own)
    terms["loss"].backward()
    for name, parameter in method.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name
    with torch.autocast("cpu", torch.bfloat16):
        for name, value in method(x0, y, **draws).items():
            close(value, terms[name], rtol=0.03, atol=0.01, msg=name)


def test_flags_that_do_not_fit():
    unfit = ["--mean-flow --diffusion gvp", "--mean-flow --kappa 1", "--mean-flow --label-drop 0"]
    unfit += ["--disperse-weight 1 --micro-batch 1", "--disperse-weight 1 --disperse-block 5"]
    for flags in unfit:
        with pytest.raises(UserError, match=flags.split()[-2]):
            small(flags)


# Whole runs


def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path):
    """Also if it goes on with --checkpointing; a grid of samples is drawn at the end."""
    flags = f"--steps 6 {GUIDED} --align-weight 0.2 --disperse-weight 0.5 --pair-layers 4"
    train(tmp_path / "a", flags, script=SCRIPT)
    train(tmp_path / "b", flags, script=SCRIPT, method=terminate_after(2, SCRIPT))
    train(tmp_path / "b", flags, "--checkpointing", script=SCRIPT)
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)
    assert (tmp_path / "b/samples/0000006.png").exists()


def train_from_images(rank, port, out):
    """Every draw is a function of the image it is for; no label is dropped."""

    class DrawsFromImages(DiverseDiT):
        def forward(self, x0, y):
            if self.step == 0:
                fill(self.model, "student")
            a, b = (x0.flatten(1).sum(1).abs() * k % 1 for k in (1, 7))
            own = {"t": a.maximum(b), "r": a.minimum(b), "u": a, "drop": torch.ones_like(a)}
            return super().forward(x0, y, noise=1.3 * x0.flip(3), **own)

    if port:
        as_rank(rank, port)
    flags = f"{GUIDED} --equal-share 0 --diversity-weight 0 --align-weight 0.2 --clip-grad 0"
    steps = "--steps 2 --log-every 1 --save-every 1 --batch-size 8"
    train(out, steps, flags, script=SCRIPT, method=DrawsFromImages)


def test_two_processes_are_one(tmp_path):
    """Losses of both steps; after the first one Adam's mean is a tenth of the gradient."""
    train_from_images(0, 0, tmp_path / "one")
    mp.spawn(train_from_images, (free_port(), tmp_path / "two"), nprocs=2)
    for a, b in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    states = (checkpoint(tmp_path / k, 1)["optimizer"]["state"] for k in ("one", "two"))
    for a, b in zip(*(state.values() for state in states), strict=True):
        atol = 1e-5 * a["exp_avg"].abs().max().item()
        close(a["exp_avg"], b["exp_avg"], rtol=1e-5, atol=atol)


def test_blocks_are_compiled(tmp_path, monkeypatch):
    """Six in each of three steps and the grid, none under jvp; the same losses as without."""
    ran = []

    def backend(graph, _):
        return lambda *inputs: ran.append(1) or graph(*inputs)

    compiled = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch._dynamo.reset()
    flags = "--steps 3 --log-every 1 --mean-flow --omega 1"
    for folder, more in (("compiled", "--compile"), ("eager", "")):
        train(tmp_path / folder, flags, more, script=SCRIPT)
        torch._dynamo.reset()
    assert len(ran) == 6 * (3 + 1)
    for a, b in zip(log_lines(tmp_path / "compiled"), log_lines(tmp_path / "eager"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
