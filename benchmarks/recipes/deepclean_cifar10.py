"""DeepClean on CIFAR-10: 2,500 random training images out of a VGG11, beside a model retrained without them.

    python deepclean_cifar10.py search --archive cifar10.tar.xz --forget forget.json
    python deepclean_cifar10.py run    --archive cifar10.tar.xz --forget forget.json --model full.safetensors \
                                       --reference retrained.safetensors

``search`` chose the settings below and never sees the test images, the retrained model or the model that ``run``
unlearns. It trains a shadow model without 2,500 held-back training images (14 epochs, kept in --out), makes it forget
2,500 other training images, and asks how far the result is from a model that never saw those: the shadow itself on
the held-back images tells what accuracy unseen images have, and on its training images what retained ones have.

``run`` measures those settings, the whole front of thresholds, selective synaptic dampening, fine-tuning alone and
gradient ascent against the retrained model, and writes record.json, table.md and front.png to --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10 import Images, Loader, load_images, load_model, train
from safetensors.torch import save_file
from torch import nn

import fastunlearn as fu

EPOCHS = 14  # of training from scratch
SAMPLES = 2_500  # forgotten, held back, and looked at for the retained information
SETTINGS = fu.DeepClean()
BATCH = 128
TUNING_IMAGES = 42_500
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GRID: list[dict[str, Any]] = []


