"""Images and text to attack and to train on: embedded samples, your own folder, torchvision's data sets.

Images are float32 of shape (N, C, H, W) in [0, 1] and their labels int64 of shape (N,); a text is the numbers
of its words, int64 (T,).
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
from invlib.data.text import decode, encode, sentences, vocabulary

__all__ = [
    "class_names",
    "decode",
    "default",
    "describe",
    "encode",
    "folder",
    "load",
    "resource",
    "sample_names",
    "samples",
    "sentences",
    "slug",
    "vocabulary",
]
