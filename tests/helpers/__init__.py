"""Helpers of the tests. In every process that imports one of them, convolutions are computed by torch itself."""

import torch

# Preparing oneDNN takes longer than computing the small convolutions of tests: without it a step takes half the time.
torch.backends.mkldnn.set_flags(False)
