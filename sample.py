"""Sample images from a checkpoint, on any number of processes.

    # 1,000 images of the newest checkpoint of a run, its EMA
    python sample.py --ckpt results/train_sra --num 1000 --guidance 1.5 --out samples/sra
    # SRA, 50,000 images on eight GPUs, guided
    torchrun --nproc_per_node=8 sample.py --ckpt sra.pt --official sra --model SiT-XL/2 \
        --vae vae.safetensors --solver sde --steps 250 --num-samples 50000 --uint8 127.5 \
        --guidance 1.8 --guidance-interval 0 0.7
    # DiT: DDPM, guidance on three channels
    python sample.py --ckpt DiT-XL-2-256x256.pt --official dit --model DiT-XL/2 --num 50000 \
        --vae vae.safetensors --solver sde --steps 250 --guidance 1.5 --guidance-channels 3

Writes to --out: samples.npz (ADM's format: `arr_0` uint8 (num, H, W, 3); `arr_1` labels), grid.png,
protocol.json (what the images depend on), with --png a file an image. Noise and label of image i
depend on (--seed, i) alone. The same command goes on with an interrupted run. Solvers: heun, euler
integrate the probability-flow ODE. sde is REPA's Euler-Maruyama for flow, ancestral for DDPM, EDM's
Algorithm 2 for EDM (--churn). meanflow is x - (t - r) u, for networks trained with --mean-flow.
"""

import argparse
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import models
from diffusion import DIFFUSIONS, Guided, ImageNoise, make_diffusion, sample_ode, sample_sde
from models import UserError, write_atomically

CHURN = ("S_churn", "S_min", "S_max", "S_noise")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = models.fail
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="a checkpoint, or the --out folder of a run")
    add("--official", choices=models.SOURCES, help="it is of that official code (dit: SRA's too)")
    add("--model", help="official checkpoints: DiT-SIZE/PATCH")
    add("--diffusion", choices=DIFFUSIONS, help="default: ddpm for dit, edm for maskdit, else flow")
    add("--weights", choices=("ema", "model"), default="ema", help="which weights of it")
    add("--out", type=Path, default=Path("samples"), help="folder for all output")
    add("--num", "--num-samples", type=int, default=1000, help="number of images")
    add("--batch-size", type=int, default=64, help="per process")
    add("--solver", choices=("heun", "euler", "sde", "meanflow"), help="default: meanflow or heun")
    add("--steps", type=int, help="of the solver (default: 1 for meanflow, else 50)")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance scale, 1 or more")
    add("--guidance-interval", type=float, nargs=2, default=[-math.inf, math.inf], help="guided t")
    add("--guidance-channels", type=int, help="guide the first ones only (default: all; DiT: 3)")
    add("--churn", type=float, nargs=4, default=[40, 0, math.inf, 1], metavar=CHURN, help="of EDM")
    add("--classes", nargs="+", help="these alone, names or numbers (default: all)")
    add("--labels", choices=("random", "balanced", "null"), default="random", help="of the images")
    add("--seed", type=int, default=0, help="of all draws")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of network and decoder")
    add("--vae", type=Path, help="decoder of the latents (default: the file of the training)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--latents", action="store_true", help="store latents, float32, in place of images")
    add("--uint8", type=float, choices=(128.0, 127.5), default=128.0, help="b: trunc(127.5 x + b)")
    either("--png", action="store_true", help="also write one PNG an image")
    for action in parser._actions:
        if action.default not in (None, argparse.SUPPRESS) and "default" not in action.help:
            action.help += " (default: %(default)s)"
    return parser.parse_args(argv)


def load_network(args):
    """(network, noise process, what the protocol says of them). Raises UserError."""
    if not args.official:
        if args.model or args.diffusion:
            raise UserError("--model and --diffusion are for --official weights alone")
        net, trained = models.load_network(args.ckpt, args.weights)
        diffusion = make_diffusion(trained["diffusion"], clip=not trained["vae"])
        if (args.guidance > 1 or args.labels == "null") and trained["label_drop"] == 0:
            raise UserError("trained with --label-drop 0: no null label, no --guidance")
        return net, diffusion, trained
    if not args.model:
        raise UserError("--official needs --model, e.g. DiT-XL/2: heads are not in the weights")
    shape = models.parse_model(args.model)
    net, about = models.load_network(args.ckpt, args.weights, args.official, shape["num_heads"])
    name = args.diffusion or {"dit": "ddpm", "maskdit": "edm"}.get(args.official, "flow")
    diffusion = make_diffusion(name)
    shape["learn_sigma"] = diffusion.learned_variance
    unlike = [f"{k} {net.config[k]}" for k in shape if net.config[k] != shape[k]]
    if unlike:
        raise UserError(f"{args.ckpt} is no {args.model} for {name}: it has {', '.join(unlike)}")
    return net, diffusion, {**about, "diffusion": name, "vae": "", "vae_scale": models.VAE_SCALE}


def choose_solver(args, net, about):
    """Fills in --solver and --steps. Raises UserError for what does not go with the network."""
    average = "interval" in net.config
    args.solver = args.solver or ("meanflow" if average else "heun")
    args.steps = {"meanflow": 1}.get(args.solver, 50) if args.steps is None else args.steps
    if args.solver == "meanflow" and (not average or about["diffusion"] != "flow"):
        raise UserError("--solver meanflow needs a network of --mean-flow, and flow")
    guided = average and (about.get("omega"), about.get("kappa")) != (1, 0)
    if args.guidance > 1 and (guided or args.solver == "meanflow"):
        raise UserError("leave out --guidance: MeanFlow's is in the weights (--omega in training)")


def load_decoder(args, about, device):
    """The VAE that turns latents into images, or None for networks of pixels. Raises UserError."""
    if about["vae"] is None and args.vae:
        raise UserError(f"{args.ckpt} generates pixels: leave out --vae")
    if about["vae"] is None or args.latents:
        return None
    if not args.vae and not os.path.isfile(about["vae"]):
        raise UserError(f"{args.ckpt} generates latents: give --vae, their VAE, or --latents")
    vae = models.load_vae(args.vae or Path(about["vae"])).to(device)
    if about.get("vae_hash", vae.digest("encoder")) != vae.digest("encoder"):
        raise UserError(f"--vae {args.vae} has another encoder than the VAE of the training")
    return vae


def chosen_labels(args, about, num_classes):
    """The class numbers to sample from. Raises UserError for unknown ones."""
    names = {str(k): k for k in range(num_classes)}
    names |= {name: k for k, name in enumerate(about.get("classes", ()))}
    if args.labels == "null":
        names = {"null": num_classes}
    for name in args.classes or ():
        if name not in names:
            raise UserError(f"--classes {name}: choose from {', '.join(names)}")
    return [names[name] for name in args.classes or ()] or sorted(set(names.values()))


def describe(args, net, about, vae):
    """All that the images depend on, as plain values."""
    own = ("diffusion", "file", "step", "script", "model", "notes", "vae_scale")
    return {
        **{k: v for k, v in vars(args).items() if k not in ("ckpt", "out", "vae")},
        "checkpoint": {k: about[k] for k in own if k in about},
        "weights_sha256": models.digest(net.state_dict()),
        "decoder_sha256": vae.digest("decoder") if vae else None,
    }


def sample(args, guided, diffusion, vae, about, classes, first, device):
    """Images uint8 (N, H, W, 3), or latents (N, C, h, w), from number `first` on; labels (N,)."""
    indices = range(first, min(first + args.batch_size, args.num))
    channels, side = (guided.net.config[k] for k in ("in_channels", "input_size"))
    draw = ImageNoise(args.seed, indices, (channels, side, side), device)
    noise = draw()
    balanced = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
    y = draw.choice(classes) if args.labels == "random" else balanced
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        if args.solver == "sde":
            churn = dict(zip(CHURN, args.churn))
            x = sample_sde(guided, diffusion, noise, y, args.steps, draw, churn=churn)
        else:
            x = sample_ode(guided, diffusion, noise, y, args.steps, args.solver)
        if vae:
            x = vae.decode(x.float() / about["vae_scale"])
    images = x.float() if args.latents else models.to_uint8(x, args.uint8)
    return images.cpu().numpy(), y.cpu().numpy()


def join(parts, out, protocol):
    """samples.npz, part by part so that 50,000 images need no memory, and grid.png."""
    images = [np.load(part) for part in parts]
    labels = np.concatenate([part["labels"] for part in images])
    header = np.lib.format.header_data_from_array_1_0(images[0]["images"])
    header["shape"] = (len(labels), *header["shape"][1:])

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in images:
                    entry.write(part["images"].tobytes())
            for name, array in (("arr_1", labels), ("protocol", np.array(json.dumps(protocol)))):
                with archive.open(f"{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, array)

    write_atomically(out / "samples.npz", write)
    if header["shape"][-1] == 3:
        columns = min(8, len(labels))
        shown = np.concatenate([part["images"] for part in images[:64]])[:64]
        shown = torch.from_numpy(shown[: len(shown) // columns * columns])
        models.write_grid(out / "grid.png", shown, columns)


def main(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if world > 1:
        dist.init_process_group("gloo")
    torch.set_float32_matmul_precision("high")
    try:
        net, diffusion, about = load_network(args)
        choose_solver(args, net, about)
        if min(args.num, args.batch_size, args.steps) < 1:
            raise UserError("--num, --batch-size and --steps must be at least 1")
        diffusion.times(args.steps)  # raises ValueError for steps that there are not
        null = net.config["num_classes"]
        guided = Guided(net, args.guidance, null, args.guidance_interval, args.guidance_channels)
        classes = chosen_labels(args, about, null)
        vae = load_decoder(args, about, device)
        protocol = describe(args, net, about, vae)
        before = args.out / "protocol.json"
        if before.exists() and json.loads(before.read_text()) != protocol:
            raise UserError(f"{args.out} holds other samples (see protocol.json): another --out")
        (args.out / "png" if args.png else args.out).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # UserError, those of Guided and times, of --out
        models.fail(error)
    if rank == 0:
        write_atomically(before, lambda file: file.write(json.dumps(protocol, indent=1).encode()))
    net.to(device)
    left = 0 if (args.out / "samples.npz").exists() else args.num
    parts = {k: args.out / "parts" / f"{k:07d}.npz" for k in range(0, left, args.batch_size)}
    for first in tqdm([*parts][rank::world], unit="batch", disable=rank > 0, dynamic_ncols=True):
        if parts[first].exists():
            continue
        images, labels = sample(args, guided, diffusion, vae, about, classes, first, device)
        for i, image in enumerate(images if args.png else (), first):
            Image.fromarray(image).save(args.out / "png" / f"{i:06d}.png")
        write_atomically(parts[first], lambda file: np.savez(file, images=images, labels=labels))
    if world > 1:
        dist.barrier()
    if rank == 0:
        if parts:
            join(parts.values(), args.out, protocol)
            shutil.rmtree(args.out / "parts")
        print(f"{args.num} samples in {args.out / 'samples.npz'}", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
