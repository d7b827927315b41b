"""A small Stable Diffusion pipeline on handwritten digits: the embedded default that runs without a network."""

from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()  # before any module here imports transformers or diffusers
