"""The door to `invlib.autodiff.smoothing` under its shorter name."""

import sys

from invlib.autodiff import smoothing

sys.modules[__name__] = smoothing
