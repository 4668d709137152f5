"""Images to attack and to train on: the embedded samples, a folder of your own, or torchvision's data sets.

Every function returns images as float32 of shape (N, C, H, W) in [0, 1] and labels as int64 of shape (N,).
"""

from invlib.data.datasets import (
    class_names,
    default,
    describe,
    folder,
    load,
    resource,
    sample_names,
    samples,
    slug,
)

__all__ = [
    "class_names",
    "default",
    "describe",
    "folder",
    "load",
    "resource",
    "sample_names",
    "samples",
    "slug",
]
