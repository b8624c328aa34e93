r"""Train a small CIFAR-10 classifier; save it, without its last layer, for `fid.py --features`.

    python tests/comparison/cifar10_features.py --train cifar10-train.zip \
        --test cifar10-test.zip --image-size 16 --out features.pt

The archives hold SPLIT/CLASS/NAME.jpg, 32 x 32 pixels; --image-size is the samples': a classifier
of 32 pixels sees little in images of 16 made larger. The file is a TorchScript module: uint8 images
(N, 3, H, W), resized to its size (bilinear, antialiased), give float features (N, 8 * width). The
network is a ResNet-9, trained with label smoothing and mirrored, shifted images. Its accuracy on
the test images goes to features.json: quote it beside every distance. They are not FID.
"""

import argparse
import hashlib
import io
import json
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train_sra import center_crop


def load(path, size):
    """uint8 images (N, 3, size, size) and int64 labels (N,), classes in alphabetical order."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    images = np.stack([np.asarray(center_crop(picture, size)) for picture in pictures])
    labels = np.unique([name.split("/")[-2] for name in names], return_inverse=True)[1]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


class Conv(nn.Sequential):
    def __init__(self, fan_in, fan_out):
        super().__init__(
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()
        )


class ResNet9(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.stem, self.down1 = Conv(3, w), Conv(w, 2 * w)
        self.res1 = nn.Sequential(Conv(2 * w, 2 * w), Conv(2 * w, 2 * w))
        self.down2, self.down3 = Conv(2 * w, 4 * w), Conv(4 * w, 8 * w)
        self.res3 = nn.Sequential(Conv(8 * w, 8 * w), Conv(8 * w, 8 * w))
        self.head = nn.Linear(8 * w, 10, bias=False)

    def features(self, x):
        x = F.max_pool2d(self.down1(self.stem(x)), 2)
        x = x + self.res1(x)
        x = F.max_pool2d(self.down2(x), 2)
        x = F.max_pool2d(self.down3(x), 2)
        x = x + self.res3(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, 8 w)

    def forward(self, x):
        return 0.5 * self.head(self.features(x))


class Extractor(nn.Module):
    def __init__(self, net, size: int):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x):
        x = x.float() / 127.5 - 1.0
        size = [self.size, self.size]
        if list(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return self.net.features(x)


def augment(images):
    """Images (N, 3, S, S): all shifted alike by up to S / 8, and each mirrored or not."""
    size, most = images.shape[-1], images.shape[-1] // 8
    down, right = torch.randint(0, 2 * most + 1, (2,)).tolist()
    images = F.pad(images, (most, most, most, most), mode="reflect")
    images = images[:, :, down : down + size, right : right + size]
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(net, images, labels):
    """Share of uint8 images (N, 3, S, S) whose class is found."""
    right = 0
    for x, y in zip(images.split(500), labels.split(500)):
        right += (net(x.float() / 127.5 - 1).argmax(1) == y).sum().item()
    return right / len(images)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--train", required=True)
    add("--test", required=True)
    add("--out", type=Path, required=True)
    add("--image-size", type=int, default=32)
    add("--width", type=int, default=24)
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=256)
    add("--lr", type=float, default=0.1, help="its highest, after a quarter of the steps")
    add("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (tensor.to(device) for tensor in load(a.train, a.image_size))
    x_test, y_test = (tensor.to(device) for tensor in load(a.test, a.image_size))
    net = ResNet9(a.width).to(device, memory_format=torch.channels_last)
    epoch_steps = len(x) // a.batch_size
    sgd = {"lr": a.lr, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    optimizer = torch.optim.SGD(net.parameters(), **sgd)
    steps = a.epochs * epoch_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, a.lr, steps, pct_start=0.25)
    start = time.time()
    for epoch in range(a.epochs):
        net.train()
        order = torch.randperm(len(x), device=device)
        for k in range(epoch_steps):
            chosen = order[k * a.batch_size : (k + 1) * a.batch_size]
            logits = net(augment(x[chosen].float() / 127.5 - 1))
            loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        found = accuracy(net.eval(), x_test, y_test)
        line = f"epoch {epoch + 1}/{a.epochs}  loss {loss.item():.3f}  test accuracy {found:.4f}"
        print(f"{line}  {time.time() - start:.0f} s", flush=True)
    net = net.cpu().to(memory_format=torch.contiguous_format)
    torch.jit.script(Extractor(net, a.image_size).eval()).save(a.out)
    sha256 = hashlib.sha256(a.out.read_bytes()).hexdigest()
    description = {"sha256": sha256, "accuracy": found, "features": 8 * a.width}
    for name in ("image_size", "width", "epochs", "batch_size", "lr", "seed"):
        description[name] = getattr(a, name)
    a.out.with_suffix(".json").write_text(json.dumps(description) + "\n")
    print(f"saved {a.out}: {8 * a.width} features")


if __name__ == "__main__":
    main()
