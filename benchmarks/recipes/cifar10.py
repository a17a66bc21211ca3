"""What the CIFAR-10 recipes share: images, a VGG11 with batch norm, and how it is trained."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Images:
    """uint8 images [n, 3, 32, 32] and their classes [n], in order of file name."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.x[index], self.y[index])


class Loader:
    """Normalised batches in channels_last, in order or in a new seeded order each epoch, with random flips or none."""

    def __init__(
        self, images: Images, size: int = 250, shuffle: bool = False, flips: bool = False, seed: int = 0
    ) -> None:
        self.images, self.size, self.shuffle, self.flips = images, size, shuffle, flips
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.images)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for pick in order.split(self.size):
            x = (self.images.x[pick].float() / 255 - MEAN) / DEVIATION
            if self.flips:
                flip = torch.rand(len(pick), generator=self.generator) < 0.5
                x = torch.where(flip[:, None, None, None], x.flip(3), x)
            yield x.contiguous(memory_format=torch.channels_last), self.images.y[pick]


def load_images(archive: Path, split: str) -> Images:
    """The images of one split of an archive of ``<split>/<class>/<number>.jpg`` files."""
    from PIL import Image

    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(f"{split}/"):
                content = tar.extractfile(member)
                assert content is not None
                files[member.name] = np.asarray(Image.open(io.BytesIO(content.read())))
    names = sorted(files)
    classes = sorted({name.split("/")[1] for name in names})
    x = torch.from_numpy(np.stack([files[name] for name in names])).permute(0, 3, 1, 2).contiguous()
    return Images(x, torch.tensor([classes.index(name.split("/")[1]) for name in names]))


def vgg11_bn(classes: int = 10) -> nn.Sequential:
    """VGG11 with batch norm at CIFAR size: 9.8 million weights, names ``features.*`` and ``classifier.*``."""
    layers: list[nn.Module] = []
    channels = 3
    for width in [64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0]:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("flatten", nn.Flatten())
    head: list[nn.Module] = []
    for out in (512, 512):
        head += [nn.Linear(512, out), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    model.add_module("classifier", nn.Sequential(*head, nn.Linear(512, classes)))
    return model


def load_model(path: Path) -> nn.Module:
    """Weights of a :func:`vgg11_bn` from a safetensors file of any floating-point type, in eval mode."""
    model = vgg11_bn()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()


def train(images: Images, epochs: int, seed: int = 0, stop_after: int | None = None) -> nn.Module:
    """A VGG11 trained from scratch: SGD with one cycle of the learning rate, flips only, bfloat16 autocast.

    ``stop_after`` ends after so many epochs of the schedule, to time an epoch without training to the end.
    """
    torch.manual_seed(seed)
    model = vgg11_bn()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    batches = Loader(images, size=128, shuffle=True, flips=True, seed=seed)
    steps = -(-len(images) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.08, total_steps=steps * epochs, pct_start=0.25)
    model.train()
    for epoch in range(epochs if stop_after is None else min(epochs, stop_after)):
        total = 0.0
        for x, y in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {epochs}: mean loss {total / steps:.4f}", flush=True)
    return model.eval()
