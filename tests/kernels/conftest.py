"""Kernels run compiled where there is a GPU, and in Triton's interpreter where there is none.

Triton decides which when a kernel's module is imported. So the switch is set here, before this folder's modules are
imported, and nothing that is not in this folder may import a kernel on a machine without a GPU.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    assert "engine.kernels.common" not in sys.modules, "a kernel was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"
