"""fastmaf and its peers behind one face: the same kind of model at the same size, called in the fastest way each library offers.

Inputs are converted to a library's own arrays before the clock starts.  Every library evaluates its own weights in float64 as well:
that is what its float32 results are checked against.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from .cases import Array, Model, unmasked_weights

Call = Callable[[], Any]


class Unavailable(Exception):
    """Something a library does not do here; the text says why."""


class Library(ABC):
    """One library and one float32 model in it."""

    name: ClassVar[str]
    unmasked: int

    @abstractmethod
    def __init__(self, model: Model) -> None: ...

    @abstractmethod
    def log_prob(self, x: Array) -> Call:
        """Call that evaluates the rows of x."""

    @abstractmethod
    def log_prob64(self, x: Array) -> Array:
        """The same density of the same weights in float64."""

    @abstractmethod
    def to_noise64(self, x: Array) -> Array:
        """Noise of the rows of x in float64."""

    def sample(self, rows: int) -> Call:
        """Call that draws rows."""
        raise Unavailable("samples as its eager model does")

    def from_noise(self, noise: Array) -> Array:
        """Rows with this noise, by the library's own sampler."""
        raise Unavailable("samples as its eager model does")

    def train(self, x: Array, batch: int) -> Call:
        """Call that takes one Adam step (lr 1e-3) per batch of x, in order."""
        raise Unavailable("training is compared with zuko only")

    def updates(self, x: Array, batch: int) -> tuple[Array, Array]:
        """What one pass of `train` from the present weights adds to the parameters, in float32 and in float64."""
        raise Unavailable("training is compared with zuko only")


class Fastmaf(Library):
    """The package itself."""

    name = "fastmaf"

    def __init__(self, model: Model) -> None:
        import fastmaf
        from fastmaf import backends
        from fastmaf.backends import reference

        self.flow = fastmaf.MAF(model.features, transforms=model.transforms, hidden_features=model.hidden, seed=0)
        self.flow64 = self.flow.astype("float64")
        self.backend, self.reference = backends.choose(), reference.backend
        self.unmasked = unmasked_weights(self.flow)

    def log_prob(self, x: Array) -> Call:
        return lambda: self.flow.log_prob(x)

    def log_prob64(self, x: Array) -> Array:
        out = np.empty(len(x))
        self.reference.log_prob(self.flow64, x.astype(np.float64), None, out)
        return out

    def to_noise64(self, x: Array) -> Array:
        out = np.empty(x.shape)
        self.reference.to_noise(self.flow64, x.astype(np.float64), None, out)
        return out

    def sample(self, rows: int) -> Call:
        return lambda: self.flow.sample(rows, seed=1)

    def from_noise(self, noise: Array) -> Array:
        return self.flow.from_noise(noise)

    def train(self, x: Array, batch: int) -> Call:
        return self._epoch(self.backend.trainer(self.flow.record), x, batch)

    def updates(self, x: Array, batch: int) -> tuple[Array, Array]:
        changes = []
        for backend, flow in ((self.backend, self.flow), (self.reference, self.flow64)):
            engine = backend.trainer(flow.record)
            self._epoch(engine, x, batch)()
            changes.append(engine.parameters().astype(np.float64) - flow.parameters())
        return changes[0], changes[1]

    @staticmethod
    def _epoch(engine: Any, x: Array, batch: int) -> Call:
        rows, lr = np.arange(len(x)), np.full(-(-len(x) // batch), 1e-3)
        return lambda: engine.epoch(x, None, None, rows, batch, lr, 1.0)


class _Torch(Library):
    """What the two torch libraries share."""

    model: Any

    @property
    def model64(self) -> Any:
        return copy.deepcopy(self.model).double()

    def _count(self) -> int:
        return sum(int((m.mask != 0).sum()) for m in self.model.modules() if hasattr(m, "mask"))

    @staticmethod
    def _quiet(function: Callable[..., Any], *arguments: Any) -> Call:
        """The call without the bookkeeping of autograd."""
        import torch

        def call() -> Any:
            with torch.inference_mode():
                return function(*arguments)

        return call

    def _array(self, function: Callable[..., Any], x: Array, dtype: Any = None) -> Array:
        import torch

        return np.asarray(self._quiet(function, torch.from_numpy(np.array(x, dtype)))())


class Zuko(_Torch):
    """zuko.flows.MAF, eager."""

    name = "zuko"
    compiled = False

    def __init__(self, model: Model) -> None:
        import torch
        import zuko

        torch.manual_seed(0)
        self.model = zuko.flows.MAF(model.features, 0, transforms=model.transforms, hidden_features=model.hidden)
        self.unmasked = self._count()

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        return torch.compile(function, dynamic=False) if self.compiled else function

    def log_prob(self, x: Array) -> Call:
        import torch

        return self._quiet(self._compile(lambda t: self.model().log_prob(t)), torch.from_numpy(x))

    def log_prob64(self, x: Array) -> Array:
        return self._array(self.model64().log_prob, x, np.float64)

    def to_noise64(self, x: Array) -> Array:
        return self._array(self.model64().transform, x, np.float64)

    def sample(self, rows: int) -> Call:
        return self._quiet(lambda: self.model().sample((rows,)))

    def from_noise(self, noise: Array) -> Array:
        return self._array(self.model().transform.inv, noise)

    def train(self, x: Array, batch: int) -> Call:
        return self._steps(copy.deepcopy(self.model), x, batch)

    def updates(self, x: Array, batch: int) -> tuple[Array, Array]:
        from torch.nn.utils import parameters_to_vector

        changes = []
        for model, data in ((copy.deepcopy(self.model), x), (self.model64, x.astype(np.float64))):
            before = parameters_to_vector(model.parameters()).detach().clone()
            self._steps(model, data, batch)()
            changes.append((parameters_to_vector(model.parameters()).detach() - before).double().numpy())
        return changes[0], changes[1]

    def _steps(self, model: Any, x: Array, batch: int) -> Call:
        import torch

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = torch.split(torch.from_numpy(x), batch)
        loss = self._compile(lambda t: -model().log_prob(t).mean())

        def steps() -> None:
            for rows in batches:
                optimizer.zero_grad()
                loss(rows).backward()
                optimizer.step()

        return steps


class ZukoCompiled(Zuko):
    """zuko.flows.MAF under torch.compile, compiled anew for each number of rows."""

    name = "zuko, torch.compile"
    compiled = True

    def sample(self, rows: int) -> Call:
        raise Unavailable("torch.compile would unroll one pass per variable and MADE")


class Nflows(_Torch):
    """nflows.flows.MaskedAutoregressiveFlow with plain blocks."""

    name = "nflows"

    def __init__(self, model: Model) -> None:
        import torch
        from nflows.flows import MaskedAutoregressiveFlow

        torch.manual_seed(0)
        depth = len(model.hidden) - 1
        self.model = MaskedAutoregressiveFlow(model.features, model.hidden[0], model.transforms, depth, use_residual_blocks=False).eval()
        self.unmasked = self._count()

    def log_prob(self, x: Array) -> Call:
        import torch

        return self._quiet(self.model.log_prob, torch.from_numpy(x))

    def log_prob64(self, x: Array) -> Array:
        return self._array(self.model64.log_prob, x, np.float64)

    def to_noise64(self, x: Array) -> Array:
        return self._array(self.model64.transform_to_noise, x, np.float64)

    def sample(self, rows: int) -> Call:
        return self._quiet(self.model.sample, rows)

    def from_noise(self, noise: Array) -> Array:
        return self._array(lambda u: self.model._transform.inverse(u)[0], noise)


class Flowjax(Library):
    """flowjax.flows.masked_autoregressive_flow, jitted, the model an argument of the compiled function."""

    name = "flowjax, jit"

    def __init__(self, model: Model) -> None:
        import equinox
        import jax
        import paramax
        from flowjax.distributions import Normal
        from flowjax.flows import masked_autoregressive_flow

        if len(set(model.hidden)) > 1:
            raise Unavailable("its hidden layers share one width")
        self.jax, self.jit, self.is_float = jax, equinox.filter_jit, equinox.is_inexact_array
        base = Normal(jax.numpy.zeros(model.features))
        layers, width, depth = model.transforms, model.hidden[0], len(model.hidden)
        flow = masked_autoregressive_flow(jax.random.key(0), base_dist=base, flow_layers=layers, nn_width=width, nn_depth=depth)
        # Masks applied once: faster than the flow as constructed.
        self.flow = paramax.unwrap(flow)
        leaves = jax.tree.leaves(self.flow)
        self.unmasked = sum(int((leaf != 0).sum()) for leaf in leaves if self.is_float(leaf) and leaf.ndim == 3)

    def log_prob(self, x: Array) -> Call:
        function, t = self.jit(lambda flow, t: flow.log_prob(t)), self.jax.numpy.asarray(x)
        return lambda: function(self.flow, t).block_until_ready()

    def sample(self, rows: int) -> Call:
        function, key = self.jit(lambda flow, key: flow.sample(key, (rows,))), self.jax.random.key(1)
        return lambda: function(self.flow, key).block_until_ready()

    def from_noise(self, noise: Array) -> Array:
        return np.asarray(self.jax.jit(self.jax.vmap(self.flow.bijection.transform))(noise))

    def log_prob64(self, x: Array) -> Array:
        return self._in_float64(lambda flow, t: flow.log_prob(t), x)

    def to_noise64(self, x: Array) -> Array:
        return self._in_float64(lambda flow, t: self.jax.vmap(flow.bijection.inverse)(t), x)

    def _in_float64(self, function: Callable[..., Any], x: Array) -> Array:
        with self.jax.enable_x64(True):
            flow = self.jax.tree.map(lambda leaf: leaf.astype(np.float64) if self.is_float(leaf) else leaf, self.flow)
            return np.asarray(self.jit(function)(flow, self.jax.numpy.asarray(x, np.float64)))


class FlowjaxFrozen(Flowjax):
    """The same with the weights as constants of the compiled function: no use in training, but less to pass per call."""

    name = "flowjax, jit, constant weights"

    def log_prob(self, x: Array) -> Call:
        function, t = self.jax.jit(lambda t: self.flow.log_prob(t)), self.jax.numpy.asarray(x)
        return lambda: function(t).block_until_ready()

    def sample(self, rows: int) -> Call:
        raise Unavailable("samples as flowjax, jit does")


LIBRARIES: tuple[type[Library], ...] = (Fastmaf, Zuko, ZukoCompiled, Nflows, Flowjax, FlowjaxFrozen)


def build(model: Model, kinds: tuple[type[Library], ...] = LIBRARIES) -> tuple[list[Library], dict[str, str]]:
    """The model in each library that is there, and why the others are not; fastmaf must be there."""
    libraries: list[Library] = []
    skipped = {}
    for kind in kinds:
        try:
            libraries.append(kind(model))
        except (ImportError, Unavailable) as problem:
            if kind is Fastmaf:
                raise
            skipped[kind.name] = f"not installed ({problem})" if isinstance(problem, ImportError) else str(problem)
    return libraries, skipped
