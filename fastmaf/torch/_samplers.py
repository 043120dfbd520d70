"""Flows for samplers that train one while they run: as one of zuko, for pocomc, and as one of nessai."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmaf import _words
from fastmaf.torch._module import MAF, Flow

__all__ = ["as_zuko", "nessai_maf"]


def as_zuko(flow: Flow) -> Any:
    """A `zuko.flows.Flow` that computes in the core; see `fastmaf.torch.as_zuko`."""
    import zuko

    _words.of_type("flow", flow, Flow)

    class Wrapped(zuko.flows.Flow):
        """A flow of fastmaf where one of zuko is asked for."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.flow = flow

        def forward(self, c: Tensor | None = None) -> Any:
            """The distribution under a context."""
            return self.flow(c)

    return Wrapped()


def nessai_maf(options: dict[str, Any]) -> Any:
    """A class of flows for nessai; see `fastmaf.torch.nessai_maf`."""
    from nessai.flows.base import BaseFlow

    class Sampled(BaseFlow):
        """A flow of fastmaf as nessai uses it."""

        def __init__(
            self, n_inputs: int, n_neurons: int, n_blocks: int, n_layers: int, context_features: int | None = None, **_: Any
        ) -> None:
            super().__init__()
            sizes = {"transforms": n_blocks, "hidden_features": (n_neurons or 2 * n_inputs,) * n_layers}
            self._arguments = (n_inputs, context_features or 0, sizes | options)
            self.flow = self._new()

        def _new(self) -> Flow:
            features, contexts, own = self._arguments
            dtype = str(torch.get_default_dtype()).removeprefix("torch.")
            return MAF(features, contexts, **{"dtype": dtype} | own)

        def reset_parameters(self) -> None:
            """Start anew, as nessai asks of every module."""
            with torch.no_grad():
                self.flow.weight.copy_(self._new().weight)

        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """Noise and log|det|."""
            result: tuple[Tensor, Tensor] = self.flow(context).transform.call_and_ladj(x)
            return result

        def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """Rows and log|det|."""
            result: tuple[Tensor, Tensor] = self.flow(context).transform.inv.call_and_ladj(z)
            return result

        def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            """Log-density."""
            return self.flow.log_prob(x, context)

        def sample(self, n: int, context: Tensor | None = None) -> Tensor:
            """Rows."""
            return self.sample_and_log_prob(n, context)[0]

        def sample_and_log_prob(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """Rows and their log-density."""
            z = self.sample_latent_distribution(n, context)
            x, log_det = self.inverse(z, context)
            return x, self.base_distribution_log_prob(z) - log_det

        def forward_and_log_prob(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """Noise of rows, and their log-density."""
            z, log_det = self.forward(x, context)
            return z, self.base_distribution_log_prob(z) + log_det

        def sample_latent_distribution(self, n: int, context: Tensor | None = None) -> Tensor:
            """Noise."""
            return torch.randn(n, self.flow.features, dtype=self.flow.weight.dtype)

        def base_distribution_log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            """Log-density of noise."""
            result: Tensor = torch.distributions.Normal(torch.zeros_like(z), 1).log_prob(z).sum(-1)
            return result

        def freeze_transform(self) -> None:
            """Keep the weights as they are."""
            self.flow.requires_grad_(False)

        def unfreeze_transform(self) -> None:
            """Train them again."""
            self.flow.requires_grad_(True)

    return Sampled
