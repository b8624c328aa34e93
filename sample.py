"""Sample images from a checkpoint, on any number of processes.

    python sample.py --ckpt results/train_sra --num 1000 --out samples/sra                          newest checkpoint of a run, its EMA
    torchrun --nproc_per_node=8 sample.py --ckpt CKPT.pt --num-samples 50000 --solver sde --steps 250               50k on eight GPUs

The papers' protocols, with 50,000 images; VAE: sd-vae-ft-ema's diffusion_pytorch_model.safetensors; on eight GPUs as above
    python sample.py --ckpt SiT-XL-2-256.pt --official sit --model SiT-XL/2 --vae VAE --solver sde --steps 250 --num 50000     SiT, SRA: SDE
    ... --guidance 1.8 --guidance-interval 0 0.7                                                            and with guidance, as in SRA
    python sample.py --ckpt SiT-XL-2-256.pt --official sit --model SiT-XL/2 --vae VAE --solver heun --steps 125 --num 50000
                                              SiT: ODE, 249 evaluations of Heun's method (the paper: dopri5, which is not here)
    python sample.py --ckpt DiT-XL-2-256x256.pt --official dit --model DiT-XL/2 --vae VAE --solver sde --steps 250 --guidance 1.5
        --guidance-channels 3 --num 50000                                                                                  DiT: DDPM
    python sample.py --ckpt maskdit.pt --official maskdit --model DiT-XL/2 --vae VAE --solver heun --steps 40 --guidance 1.5 --num 50000
Checkpoints of the training scripts need neither --official nor --model nor --vae: they say themselves what they are.

Writes under --out: samples.npz (ADM's format: `arr_0` uint8 (num, H, W, 3), and `arr_1` int64 labels), grid.png, protocol.json with
everything the images depend on (also in samples.npz), and with --png one file an image. Noise and label of image i depend on (--seed, i)
alone: the number of processes and the batch size change nothing but rounding. An interrupted run goes on when the same command is given
again. (--num-samples is --num; some versions of torchrun take --num for one of their own options.)

Solvers (diffusion.py cites each): heun and euler integrate the probability-flow ODE (EDM + heun: EDM Algorithm 1; DDPM + euler: DDIM). sde
is REPA's Euler-Maruyama for flow, ancestral sampling for DDPM, EDM's Algorithm 2 for EDM (--churn S_churn S_min S_max S_noise).
Pixels are clipped to [-1, 1] at every DDPM step, as Ho et al. do; latents, and so all official checkpoints, are not.
Latents become images by the VAE's decoder, in the network's precision; --latents stores them instead (`arr_0` float32 (num, C, H, W)).
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from diffusion import DIFFUSIONS, Guided, ImageNoise, make_diffusion, sample_ode, sample_sde
from models import (
    SOURCES,
    VAE_SCALE,
    build_model,
    fresh_store,
    image_grid,
    load_checkpoint,
    load_official,
    load_vae,
    newest_checkpoint,
    on_rank_0,
    parse_model,
    to_uint8,
    write_atomically,
)


def fail(message):
    """A user error: one line on stderr from the first process of a machine, exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"sample.py: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    sys.exit(2)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error, add = fail, parser.add_argument
    add(
        "--ckpt",
        type=Path,
        required=True,
        help="a checkpoint, or the --out folder of a training run",
    )
    add(
        "--official",
        choices=SOURCES,
        help="the checkpoint is of that official repository ('dit' also for SRA's DiT)",
    )
    add("--model", help="official checkpoints: DiT-SIZE/PATCH")
    add(
        "--diffusion",
        choices=DIFFUSIONS,
        help="official checkpoints (default: ddpm for dit, edm for maskdit, else flow)",
    )
    add("--weights", choices=("ema", "model"), default="ema")
    add("--out", type=Path, default=Path("samples"))
    add("--num", "--num-samples", type=int, default=1000)
    add("--batch-size", type=int, default=64, help="per process")
    add("--solver", choices=("heun", "euler", "sde"), default="heun")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, default=1.0, help="classifier-free guidance scale, >= 1")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(-math.inf, math.inf),
        metavar=("LOW", "HIGH"),
        help="in the diffusion's time",
    )
    add(
        "--guidance-channels",
        type=int,
        help="guide the first so many channels only; 3 reproduces DiT (default: all)",
    )
    add(
        "--churn",
        type=float,
        nargs=4,
        default=(40, 0, math.inf, 1),
        metavar=("S_churn", "S_min", "S_max", "S_noise"),
    )
    add("--classes", type=int, nargs="+", help="sample these classes only")
    add(
        "--labels",
        choices=("random", "balanced"),
        default="random",
        help="a random class each (as in the papers), or in turn",
    )
    add("--seed", type=int, default=0)
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the network; the sampler's state is float64",
    )
    add(
        "--vae",
        type=Path,
        help="weights that turn latents into images (default: the file that the network was trained with)",
    )
    add("--latents", action="store_true", help="store the latents, float32, instead of images")
    add("--png", action="store_true", help="also write one PNG an image")
    args = parser.parse_args(argv)
    for name in ("num", "batch_size", "steps"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.steps > 10**6:
        fail(f"--steps {args.steps}: must be at most a million")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed {args.seed} is out of range")
    if not all(v >= 0 for v in args.churn):
        fail(f"--churn {' '.join(map(str, args.churn))}: all four must be 0 or more")
    return args


def find_checkpoint(path):
    """(file, digest) behind --ckpt: the file itself, or the newest readable checkpoint of a run's folder. Raises ValueError with one line.

    The digest is of the checksums that the file's archive keeps, so that samples of a retrained network are not taken for those of the old.
    """
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(f"--ckpt {path}: no such file or folder")
    if path.is_dir():
        folder, path = path, newest_checkpoint(path / "checkpoints")
        if not path:
            raise ValueError(f"--ckpt {folder}: no checkpoints/*.pt in this folder")
    try:
        content = repr(
            [(entry.filename, entry.CRC) for entry in zipfile.ZipFile(path).infolist()]
        ).encode()
    except zipfile.BadZipFile:
        content = path.read_bytes()
    return path, hashlib.sha256(content).hexdigest()[:16]


def load_network(args, path):
    """(network, diffusion, description for the protocol) from a checkpoint file. Raises ValueError with one line."""
    if args.official:
        if not args.model:
            raise ValueError(
                "--official needs --model, e.g. DiT-XL/2: the number of heads is not in the weights"
            )
        shape = parse_model(args.model)
        net, notes = load_official(path, args.official, shape["num_heads"], args.weights)
        unlike = [f"{k} {net.config[k]}" for k in shape if net.config[k] != shape[k]]
        if unlike:
            raise ValueError(f"{path} is not a {args.model}: it has {', '.join(unlike)}")
        name = args.diffusion or {"dit": "ddpm", "maskdit": "edm"}.get(args.official, "flow")
        diffusion = make_diffusion(name)
        if diffusion.learned_variance != net.config["learn_sigma"]:
            raise ValueError(
                f"{path} has {net.out_channels} output channels, which does not fit --diffusion {name}"
            )
        return (
            net,
            diffusion,
            {"official": args.official, "model": args.model, "diffusion": name, "notes": notes},
        )
    if args.model or args.diffusion:
        raise ValueError(
            "--model and --diffusion are for official checkpoints (--official); ours say themselves what they are"
        )
    saved = load_checkpoint(path)
    trained = saved["args"]
    if not saved[args.weights] or not {"script", "model", "diffusion", "classes"} <= set(trained):
        raise ValueError(
            f"{path} is no whole checkpoint: it lacks {args.weights!r} weights, or what they were trained on"
        )
    net = build_model(trained["network"])
    net.load_state_dict(saved[args.weights])
    about = {
        "script": trained["script"],
        "model": trained["model"],
        "diffusion": trained["diffusion"],
        "step": saved["step"],
    }
    about |= {"vae": trained["vae"], "vae_hash": trained["vae_hash"]} if trained.get("vae") else {}
    diffusion = make_diffusion(trained["diffusion"], clip=not trained.get("vae"))
    return net.eval(), diffusion, {"file": path.name, **about, "class_names": trained["classes"]}


def load_decoder(args, about):
    """(VAE, hash) that turn latents into images: --vae, or what the checkpoint remembers. Raises ValueError with one line."""
    file = args.vae or (Path(about["vae"]) if "vae" in about else None)
    if not file:
        raise ValueError(
            f"{args.ckpt} generates latents: give --vae, the weights of their VAE, or --latents to store them as they are"
        )
    if not os.path.isfile(file):
        hint = "" if args.vae else f", the VAE that {args.ckpt} was trained with: give --vae"
        raise ValueError(f"no file {file}{hint}")
    vae, vae_hash = load_vae(file)
    if (vae.latent_channels, vae.factor) != (4, 8):
        raise ValueError(
            f"{file} has {vae.latent_channels} channels and a factor of {vae.factor}; Stable Diffusion's VAE has 4 and 8"
        )
    if about.get("vae_hash", vae_hash) != vae_hash:
        raise ValueError(f"{file} is another VAE than the one that {args.ckpt} was trained with")
    return vae, vae_hash


def stored(folder):
    """Finished parts of an interrupted run: {first image: (last + 1, path)}, where parts start."""
    parts = {}
    for path in folder.glob("*.npz"):
        match = re.fullmatch(r"(\d+)-(\d+)\.npz", path.name)
        if match:
            parts[int(match[1])] = (int(match[2]), path)
    return parts


def missing_batches(parts, num, batch_size):
    """Ranges (first, last + 1) of images not yet made, each at most batch_size long."""
    batches, i = [], 0
    while i < num:
        if i in parts:
            i = parts[i][0]
            continue
        end = min([i + batch_size, num, *(first for first in parts if first > i)])
        batches.append((i, end))
        i = end
    return batches


def join_parts(parts, num, protocol, path):
    """Write samples.npz part by part, so that 50,000 images need no memory: arr_0 as it was stored, arr_1 labels, protocol in JSON."""
    labels = np.concatenate([np.load(part)["labels"] for part in parts])
    first = np.load(parts[0])["images"]

    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                header = {
                    "descr": np.lib.format.dtype_to_descr(first.dtype),
                    "fortran_order": False,
                    "shape": (num, *first.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(entry, header)
                for part in parts:
                    entry.write(np.load(part)["images"].tobytes())
            with archive.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels)
            with archive.open("protocol.npy", "w") as entry:
                np.lib.format.write_array(entry, np.array(json.dumps(protocol)))

    write_atomically(path, write)


def write_pictures(batches, args):
    """grid.png of the first images, at most 8 x 8, and with --png every image; batches: uint8 arrays (N, H, W, 3) in order."""
    if args.png:
        (args.out / "png").mkdir(exist_ok=True)
    columns, shown, count = min(8, args.num), [], 0
    for images in batches:
        shown.extend(images[: 64 - len(shown)])
        for i, image in enumerate(images if args.png else (), count):
            Image.fromarray(image).save(args.out / "png" / f"{i:06d}.png")
        count += len(images)
    grid = image_grid(torch.from_numpy(np.stack(shown[: len(shown) // columns * columns])), columns)
    write_atomically(args.out / "grid.png", lambda file: grid.save(file, "png"))


def describe(args, about, digest, channels, vae_hash):
    """Everything the images depend on, as plain JSON values."""

    def plain(values):
        return [v if math.isfinite(v) else str(v) for v in values]

    churned = about["diffusion"] == "edm" and args.solver == "sde"
    return {
        "checkpoint": {"path": str(args.ckpt), "digest": digest, "weights": args.weights, **about},
        "sampler": {"solver": args.solver, "steps": args.steps, "churn": plain(args.churn) if churned else None},
        "guidance": {"scale": args.guidance, "interval": plain(args.guidance_interval), "channels": args.guidance_channels or channels},
        "labels": {"classes": args.classes or "all", "how": args.labels},
        "num": args.num, "seed": args.seed, "precision": args.precision, "latents": args.latents, "vae": vae_hash,
    }  # fmt: skip


def open_output(args, protocol, size):
    """Make the output folder, or check that what it holds belongs to this run, and that there is room for images of `size` bytes each.

    Returns whether samples.npz is there already, and else the ranges (first, last + 1) of images still to be made. Raises ValueError with
    one line.
    """
    description, text = args.out / "protocol.json", json.dumps(protocol, indent=1).encode()
    if description.exists():
        if description.read_bytes() != text:
            raise ValueError(
                f"{args.out} holds samples of another run (see its protocol.json): choose another --out"
            )
    else:
        others = [
            name
            for name in ("samples.npz", "grid.png", "png", "parts")
            if (args.out / name).exists()
        ]
        if others:
            raise ValueError(
                f"{args.out} holds {others[0]} but no protocol.json that says of which run: choose another --out"
            )
        room = shutil.disk_usage(
            next(
                path
                for path in (args.out.absolute(), *args.out.absolute().parents)
                if path.exists()
            )
        ).free
        if 2 * args.num * size > room:  # in parts, and put together
            need = f"--num {args.num} needs {2 * args.num * size / 1e9:.2g} GB"
            raise ValueError(
                f"{need}, and {args.out} has room for {room / 1e9:.2g} GB: choose another --out"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(description, lambda file: file.write(text))
    (args.out / "parts").mkdir(exist_ok=True)
    finished, parts = args.out / "samples.npz", stored(args.out / "parts")
    done = finished.exists()
    if done and not zipfile.is_zipfile(finished):
        raise ValueError(f"{finished} is damaged: delete it, and its images are made anew")
    for first, (end, path) in parts.items():
        try:
            sound = (
                zipfile.ZipFile(path).testzip() is None
                and len(np.load(path)["labels"]) == end - first
                and end <= args.num
            )
        except Exception:
            sound = False
        if not sound:
            raise ValueError(f"{path} is damaged: delete it, and its images are made anew")
    return done, [] if done else missing_batches(parts, args.num, args.batch_size)


def main(args):
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local >= torch.cuda.device_count():
        fail(
            f"{local + 1} processes or more on this machine, which has {torch.cuda.device_count()} GPUs"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    if world > 1:
        dist.init_process_group("gloo", store=fresh_store(rank, world), rank=rank, world_size=world)
    try:
        path, digest = on_rank_0(lambda: find_checkpoint(args.ckpt))
        net, diffusion, about = load_network(args, path)
        num_classes, net = net.config["num_classes"], net.to(device)
        shape = (net.config["in_channels"], net.config["input_size"], net.config["input_size"])
        diffusion.times(args.steps)
        guided = Guided(
            net, args.guidance, num_classes, tuple(args.guidance_interval), args.guidance_channels
        )
        classes = args.classes or list(range(num_classes))
        if not all(0 <= c < num_classes for c in classes):
            raise ValueError(
                f"--classes {' '.join(map(str, classes))}: the model knows classes 0 to {num_classes - 1}"
            )
        if args.guidance_channels and args.guidance_channels > shape[0]:
            raise ValueError(
                f"--guidance-channels {args.guidance_channels}: the model generates {shape[0]} channels"
            )
        if args.latents and (args.png or args.vae):
            raise ValueError("--latents stores no images: leave out --png and --vae")
        if shape[0] == 3 and args.vae:
            raise ValueError(f"{args.ckpt} generates pixels: leave out --vae")
        vae, vae_hash = (
            load_decoder(args, about) if shape[0] != 3 and not args.latents else (None, None)
        )
        protocol = describe(args, about, digest, shape[0], vae_hash)
        size = (
            math.prod(shape) * 4
            if args.latents
            else 3 * (shape[1] * (vae.factor if vae else 1)) ** 2
        )  # bytes of an image
        done, batches = on_rank_0(lambda: open_output(args, protocol, size))
    except ValueError as error:
        fail(error)
    churn = dict(zip(("S_churn", "S_min", "S_max", "S_noise"), args.churn))
    parts_folder, finished = args.out / "parts", args.out / "samples.npz"
    autocast = {
        "device_type": device.type,
        "dtype": torch.bfloat16,
        "enabled": args.precision == "bf16",
    }
    vae, cuda, waiting = vae and vae.to(device), device.type == "cuda", None
    decoding = torch.cuda.Stream() if cuda else None

    def finish(first, end, x, y, sampled):
        """Decode and store a batch: on a GPU in a thread and stream of its own, while the next one is sampled."""
        with torch.cuda.stream(decoding), torch.autocast(**autocast):
            if sampled:
                decoding.wait_event(sampled)
            images = (
                x.float()
                if args.latents
                else to_uint8(vae.decode(x.float() / VAE_SCALE) if vae else x)
            )
            part = {"images": images.cpu().numpy(), "labels": y.cpu().numpy()}
        write_atomically(parts_folder / f"{first}-{end}.npz", lambda file: np.savez(file, **part))

    pool = ThreadPoolExecutor(1)
    bar = tqdm(
        total=args.num,
        initial=args.num - sum(b - a for a, b in batches),
        disable=rank > 0,
        unit="img",
        dynamic_ncols=True,
    )
    for k, (first, end) in enumerate(batches):
        if k % world == rank:
            draw = ImageNoise(args.seed, range(first, end), shape, device)
            noise = draw()
            in_turn = torch.tensor(
                [classes[i % len(classes)] for i in range(first, end)], device=device
            )
            y = draw.choice(classes) if args.labels == "random" else in_turn
            with torch.autocast(**autocast):
                if args.solver == "sde":
                    x = sample_sde(guided, diffusion, noise, y, args.steps, draw, churn=churn)
                else:
                    x = sample_ode(guided, diffusion, noise, y, args.steps, args.solver)
            if waiting:
                waiting.result()
            waiting = (
                pool.submit(finish, first, end, x, y, torch.cuda.current_stream().record_event())
                if cuda
                else None
            )
            if not cuda:
                finish(first, end, x, y, None)
        bar.update(end - first)
    if waiting:
        waiting.result()
    if world > 1:
        dist.barrier()
    bar.close()
    if rank == 0:
        parts = stored(parts_folder)
        if not done and missing_batches(parts, args.num, args.num):
            fail(
                f"{parts_folder} lacks parts that other processes made: --out must be a folder that all of them share"
            )
        ordered = [path for _, (_, path) in sorted(parts.items())]
        if not args.latents and (args.png or not done):
            write_pictures(
                [np.load(finished)["arr_0"]]
                if done
                else (np.load(path)["images"] for path in ordered),
                args,
            )
        if not done:
            join_parts(ordered, args.num, protocol, finished)
        shutil.rmtree(parts_folder)
        print(f"{args.num} samples in {finished}" + (", made before" if done else ""), flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
