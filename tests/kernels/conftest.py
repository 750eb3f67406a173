"""Kernels run in Triton's interpreter here: it must be chosen before the kernels are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
