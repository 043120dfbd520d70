"""Flows in PyTorch: modules that train under torch.optim and compute in the core of fastmaf, on the CPU.

>>> import torch
>>> import fastmaf.torch
>>> flow = fastmaf.torch.MAF(features=3, context_features=2)
>>> flow(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
torch.Size([5])
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError:
    raise ImportError("fastmaf.torch needs PyTorch, which is not installed: pip install torch") from None

from fastmaf.torch._module import MAF, Flow, NormalizingFlow

__all__ = ["MAF", "Flow", "NormalizingFlow"]
