"""Object detection on any timm backbone with PyTorch Lightning."""

__version__ = "0.1.0"
