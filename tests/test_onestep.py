"""DiverseDiT on MeanFlow and with Dispersive Loss: official values, closed forms, whole runs."""

import functools

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    NETWORK,
    as_rank,
    assert_gradients,
    assert_same,
    assert_same_run,
    checkpoint,
    close,
    fill,
    free_port,
    log_lines,
    one_line,
    terminate_after,
    tiny,
    train,
    words,
)

from diffusion import Flow, draw_interval, sample_mean_flow, sample_ode, sample_preview
from models import DiT, UserError
from train_diversedit import (
    GUIDANCE,
    DiverseDiT,
    adaptive_weight,
    dispersive_loss,
    guidance_settings,
    parse_args,
    time_derivative,
)

ALONE = "--mean-flow --long-residual none --diversity-weight 0"
SETTINGS = {  # of the reference values: draws, omega, kappa, times, share of rows with r = t
    "omega1": ("A", "1 --kappa 0 --guided-times 0 1 --equal-share 0.3"),
    "omega3": ("A", "3 --kappa 0 --guided-times 0 1 --equal-share 0.3"),
    "interval": ("B", "0.2 --kappa 0.92 --guided-times 0 0.75 --equal-share 0.5"),
    "mix": ("B", "1 --kappa 0.5 --guided-times 0.3 0.8 --equal-share 0.5"),
}


def small(flags, network=None, recipe=True):
    """A method of four blocks."""
    args = parse_args(words(flags))
    own = {**NETWORK, "depth": 4, "learn_sigma": False}
    torch.manual_seed(0)
    method = DiverseDiT(args, network or own, Flow())
    if recipe:
        fill(method.model, "student")
        fill(method.ema, "teacher")
    return method


def draws(n=8, k=6):
    """Images, labels, draws by name: r = t in the first k rows, two labels dropped."""
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, n, 3, 8, 8, generator=g)
    t, r = draw_interval(n, k / n, -0.4, 1.0, normal=torch.randn(2, n, generator=g))
    drop = torch.tensor([0.5] * (n - 2) + [0.01, 0.02])
    u = torch.rand(n, generator=g)
    return x0, torch.arange(n), {"t": t, "r": r, "noise": noise, "drop": drop, "u": u}


def target_inputs(x0, y, fixed, drop=2):
    """What mean_flow_target is given."""
    z = Flow().add_noise(x0, fixed["noise"], fixed["t"])
    labels = torch.where(torch.arange(len(y)) < drop, 10, y)
    return z, fixed["noise"] - x0, fixed["t"], fixed["r"], y, labels


# Reference values


def test_times_and_sampler_of_the_official_code(golden):
    g = golden("meanflow_times")
    normal = torch.stack([g.inputs["normal_1"], g.inputs["normal_2"]])
    c = g.config
    t, r = draw_interval(10, c["data_proportion"], c["P_mean"], c["P_std"], normal=normal)
    g.check("t", t)
    g.check("r", r)
    g.all_checked()
    g = golden("meanflow_sampler")
    net = DiT(**g.network(), interval=True)
    net.load_state_dict(g.weights(), strict=False)
    assert g.inputs["grid"].tolist() == [1, 0.5, 0]
    g.check("one_step", sample_mean_flow(net, g.inputs["e"], g.inputs["y"]))
    g.check("two_step", sample_mean_flow(net, g.inputs["e"], g.inputs["y"], 2))
    g.all_checked()
    one = sample_preview(net, Flow(), g.inputs["e"], g.inputs["y"])
    assert torch.equal(one, sample_mean_flow(net, g.inputs["e"], g.inputs["y"], 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_targets_losses_and_gradients_of_the_official_code(golden, name):
    g = golden("meanflow_loss")
    i, (group, flags) = g.inputs, SETTINGS[name]
    t, r, y, drop, drop_u = (i[f"{group}_{key}"] for key in ("t", "r", "y", "drop", "drop_u"))
    methods = {}
    for key, more in (("", ""), ("_p05", "--loss-power 0.5"), ("_c100", "--loss-offset 100")):
        methods[key] = small(f"{ALONE} --omega {flags} {more}", g.network(), recipe=False)
        missing, _ = methods[key].model.load_state_dict(g.weights(), strict=False)
        assert missing == ["pos_embed"]
    method, z = methods[""], Flow().add_noise(i["x"], i["e"], t)
    v, labels = i["e"] - i["x"], torch.where(drop == 1, 7, y)
    given, k = (z, v, t, r, y, labels), int(method.args.equal_share * 5)
    with torch.no_grad():
        u = method.model(z, t, labels, h=t - r)
        u_tgt = method.mean_flow_target(*given)
        method.args.equal_share = 1  # no row with r < t: what is left is the velocity
        v_g = method.mean_flow_target(*given)
        method.args.equal_share = k / 5
        dudt = time_derivative(method.model, z[k:], t[k:], r[k:], labels[k:], v_g[k:])
    errors = (u - u_tgt).square().sum((1, 2, 3))
    g.check(f"{group}_u", u)
    g.check(f"{group}_v_loss", (u - v).square().sum((1, 2, 3)))
    g.check(f"{name}_dudt", dudt)
    g.check(f"{name}_L", errors)
    g.check(f"{name}_divisor_p05", (errors + 0.01).sqrt())
    if f"{name}_v_g" in g.outputs:
        g.check(f"{name}_v_g", v_g)
    if f"{name}_u_tgt" in g.outputs:
        g.check(f"{name}_u_tgt", u_tgt[k:])
    for key, method in methods.items():
        terms = method(i["x"], y, t=t, r=r, noise=i["e"], drop=drop_u)
        g.check(f"{name}_loss{key}", terms["loss"])
        assert torch.isclose(terms["error_v"], g.outputs[f"{group}_v_loss"].mean() / v[0].numel())
        assert torch.isclose(terms["error_below"], errors[k:].mean() / v[0].numel())
        terms["loss"].backward()
        gradients = {k: p.grad for k, p in method.model.named_parameters()}
        if key != "_c100":
            norms = torch.stack([gradient.norm() for gradient in gradients.values()])
            g.check(f"{name}_grad_norms{key}", norms)
        for output, spec in g.meta["outputs"].items():
            if not key and output.startswith(f"{name}_") and "parameter" in spec:
                own = gradients[spec["parameter"]]
                g.check(output, own if spec["rows"] is None else own[spec["rows"]])
    others = [key for key in g.outputs if not key.startswith((f"{name}_", f"{group}_"))]
    g.all_checked(*others)


def test_dispersive_loss_of_the_official_code(golden):
    g = golden("disp_loss")
    for name in g.outputs:
        kind, n, tau = name.split("_")
        z = g.inputs["z"][: int(n[1:])].clone().requires_grad_()
        loss = dispersive_loss(z, {"tau1": 1.0, "tau05": 0.5}[tau])
        assert -np.log(len(z)) <= loss <= 0
        g.check(name, torch.autograd.grad(loss, z)[0] if kind == "grad" else loss)
    g.all_checked()
