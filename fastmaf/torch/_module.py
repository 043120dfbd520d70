"""The module, its autograd functions, and the distribution that it is under a context."""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints
from torch.distributions import Normal as _TorchNormal

from fastmaf import _codec, _words
from fastmaf.flow import Flow as _Flow
from fastmaf.handle import Handle
from fastmaf.layers import Elementwise, Linear, Normal
from fastmaf.maf import MAF as _MAF
from fastmaf.record import FlowRecord, trainable

__all__ = ["MAF", "Flow", "NormalizingFlow"]

Array = NDArray[Any]

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def _array(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.detach().numpy()


class _Operation(torch.autograd.Function):
    """An operation of a `Handle` as a function of rows, the context and the weights: its name, and whether it gives whole rows."""

    name: str
    rows: bool
    columns = 0  # beside the rows

    @classmethod
    def on(cls, module: Flow, x: Tensor, context: Tensor | None) -> Tensor:
        """Its result with the weights of the module, with gradients."""
        result: Tensor = cls.apply(x, context, module.weight, module, cls)
        return result

    @classmethod
    def run(cls, handle: Handle, x: Array, context: Array | None) -> Array:
        """The result."""
        result: Array = getattr(handle, cls.name)(x, context)
        return result

    @classmethod
    def gradients(
        cls, handle: Handle, at: Array, context: Array | None, cotangent: Array, wanted: tuple[bool, ...]
    ) -> tuple[Array | None, ...]:
        """Gradients in the rows, the context and the weights, those that are wanted at least."""
        result: tuple[Array | None, ...] = getattr(handle, f"{cls.name}_vjp")(at, context, cotangent, dparameters=wanted[2])
        return result

    @staticmethod
    def forward(x: Tensor, context: Tensor | None, weight: Tensor, module: Flow, own: type[_Operation]) -> Any:
        with module._handle_with(weight) as handle:
            return torch.from_numpy(own.run(handle, x.detach().numpy(), _array(context)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, context, weight, ctx.module, ctx.own = inputs
        ctx.save_for_backward(output if issubclass(ctx.own, _FromNoise) else x, context, weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        arguments = (cotangent, *ctx.saved_tensors, ctx.module, ctx.own, tuple(ctx.needs_input_grad[:3]))
        recorded = torch.is_grad_enabled()  # create_graph=True, which costs time
        return (*(_Gradients.apply if recorded else _Gradients.forward)(*arguments), None, None)


class _Gradients(torch.autograd.Function):
    """The gradients of an operation, which themselves have none."""

    @staticmethod
    def forward(
        cotangent: Tensor, at: Tensor, context: Tensor | None, weight: Tensor, module: Flow, own: type[_Operation], wanted: tuple[bool, ...]
    ) -> Any:
        with module._handle_with(weight) as handle:
            gradients = own.gradients(handle, at.detach().numpy(), _array(context), cotangent.detach().numpy(), wanted)
        return tuple(None if array is None or not want else torch.from_numpy(array) for array, want in zip(gradients, wanted, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operation = inputs[5].name

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        raise NotImplementedError(f"{ctx.operation} of fastmaf.torch has first derivatives alone; these are second ones (double backward)")


class _LogProb(_Operation):
    name, rows = "log_prob", False

    @classmethod
    def gradients(
        cls, handle: Handle, at: Array, context: Array | None, cotangent: Array, wanted: tuple[bool, ...]
    ) -> tuple[Array | None, ...]:
        result = handle.vjp(at, context, cotangent, dx=wanted[0], dcontext=wanted[1], dparameters=wanted[2])
        if wanted[0] and result[0] is None:
            raise ValueError("x requires a gradient, which a flow with discrete variables does not have: detach x")
        return result


class _ToNoise(_Operation):
    name, rows = "to_noise", True


class _FromNoise(_Operation):
    name, rows = "from_noise", True


class _ToNoiseAndLogDet(_Operation):
    """The noise, and in one more column log|det| of the map: the density without that of the noise."""

    name, rows, columns = "to_noise", True, 1

    @classmethod
    def run(cls, handle: Handle, x: Array, context: Array | None) -> Array:
        result, log_det = getattr(handle, cls.name)(x, context, log_det=True)
        return np.concatenate([result, log_det[..., None]], axis=-1)

    @classmethod
    def gradients(
        cls, handle: Handle, at: Array, context: Array | None, cotangent: Array, wanted: tuple[bool, ...]
    ) -> tuple[Array | None, ...]:
        rows = np.ascontiguousarray(at[..., : cotangent.shape[-1] - 1])
        pull = getattr(handle, f"{cls.name}_vjp")
        result: tuple[Array | None, ...] = pull(rows, context, cotangent[..., :-1], log_det=cotangent[..., -1], dparameters=wanted[2])
        return result


class _FromNoiseAndLogDet(_ToNoiseAndLogDet, _FromNoise):
    """The rows, and log|det| of the map: the negative of that of the map to the noise there."""

    name = "from_noise"


class _Drawn(_FromNoise):
    """Rows that were drawn, as they are: their gradients are those of `from_noise`, the noise held."""

    @classmethod
    def run(cls, handle: Handle, x: Array, context: Array | None) -> Array:
        return x.copy()


class Flow(nn.Module):
    """A flow as a module of PyTorch, with one flat parameter; it computes in the core of fastmaf, on the CPU.

    ``flow(context)`` is a distribution, as in zuko: ``flow(context).log_prob(x)``, ``flow(context).sample((n,))``; ``flow()`` without a
    context.

    Parameters
    ----------
    flow : fastmaf.Flow
        On the CPU; what is done to it later does not reach the module. The statistics of its `BatchNorm` layers are constants.

    Attributes
    ----------
    weight : torch.nn.Parameter
        (p,), in the order of `fastmaf.Flow.parameters`. Weights that masks leave out have no effect and a gradient of zero.
    features, context_features : int

    Raises
    ------
    ValueError
        If the flow is on a GPU, or is no flow.

    Notes
    -----
    Gradients are those of the core; they have no derivatives of their own. `state_dict` holds the weights, and in ``_extra_state`` all else
    that the flow is (bounds, standardisation, orders), so that it can be loaded into any module of the same shape.

    Examples
    --------
    >>> import fastmaf, torch
    >>> flow = fastmaf.torch.Flow(fastmaf.MAF(features=3, seed=0))
    >>> x = torch.zeros(5, 3)
    >>> optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    >>> loss = -flow().log_prob(x).mean()
    >>> loss.backward()
    >>> optimizer.step()
    >>> flow().sample((10,)).shape
    torch.Size([10, 3])
    """

    def __init__(self, flow: _Flow) -> None:
        super().__init__()
        handle = Handle(flow)
        self._flow = _Flow._of(flow.record)
        self._handle: Handle | None = handle
        self.weight = nn.Parameter(torch.from_numpy(handle.parameters()))

    @property
    def features(self) -> int:
        """Number of variables D."""
        return self._flow.features

    @property
    def context_features(self) -> int:
        """Number of variables C of the context."""
        return self._flow.context_features

    def extra_repr(self) -> str:
        """The layers."""
        return repr(self._flow)

    def to_flow(self) -> _Flow:
        """The `fastmaf.Flow` with the weights as they are now: to save it, and for whatever needs no gradient in torch.

        Returns
        -------
        fastmaf.Flow

        Examples
        --------
        >>> import fastmaf.torch
        >>> fastmaf.torch.MAF(features=3).to_flow().features
        3
        """
        with self._handle_with(self.weight) as handle:
            return handle.flow

    def standardize(self, x: Any, context: Any = None) -> None:
        """Set mean and deviation of the data in the layers in front, as `fastmaf.Flow.fit` does at its start.

        Parameters
        ----------
        x, context : (n, D) and (n, C) tensors or arrays
            The rows to train on. Without a context of its own (one that a network in front computes) the context is left as it is.

        Raises
        ------
        ValueError
            As in `fastmaf.Flow.fit`.

        Warns
        -----
        fastmaf.FitWarning
            As in `fastmaf.Flow.fit`.

        Examples
        --------
        >>> import fastmaf.torch, torch
        >>> flow = fastmaf.torch.MAF(features=2)
        >>> flow.standardize(100 + torch.randn(1000, 2))
        >>> bool(flow().log_prob(torch.full((1, 2), 100.0)) > -5)
        True
        """
        from fastmaf.train import FitWarning, data

        record = self._flow.record
        beside = np.zeros((len(x), self.context_features)) if context is None and self.context_features else context
        start, notes = data.standardised(record, data.rows_of(record, "", x, beside), True)
        for note in notes:
            warnings.warn(note, FitWarning, stacklevel=2)
        self._flow, self._handle = _Flow._of(start), None

    # What it computes

    def forward(self, context: Tensor | None = None) -> NormalizingFlow:
        """The distribution under contexts.

        Parameters
        ----------
        context : (*batch, C) tensor, optional

        Returns
        -------
        NormalizingFlow
            Of this batch shape.
        """
        return NormalizingFlow(self, context)

    @torch.compiler.disable
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density, in nats; the gradient goes to x, the context and the weights.

        Parameters
        ----------
        x : (*shape, D) tensor
        context : (*shape, C) tensor, optional
            The shapes broadcast as in torch: x (n, b, D) goes with contexts (b, C).

        Returns
        -------
        (*shape,) tensor

        Raises
        ------
        ValueError
            If a shape, dtype or device does not fit.

        Examples
        --------
        >>> import fastmaf.torch, torch
        >>> flow = fastmaf.torch.MAF(features=3, context_features=2)
        >>> flow.log_prob(torch.zeros(4, 5, 3), torch.zeros(5, 2)).shape
        torch.Size([4, 5])
        """
        return self._call(_LogProb, "x", x, context)

    @torch.compiler.disable
    def to_noise(self, x: Tensor, context: Tensor | None = None, *, log_det: bool = False) -> Any:
        """The noise that rows come from; its gradient costs one of log_prob.

        Parameters
        ----------
        x, context : tensors
            As in `log_prob`.
        log_det : bool
            Whether to give log|det| of the map too, from the same pass.

        Returns
        -------
        noise : (*shape, D) tensor
        log_det : (*shape,) tensor
            If asked for; see `fastmaf.Flow.to_noise`.
        """
        if not _words.flag("log_det", log_det):
            return self._call(_ToNoise, "x", x, context)
        both = self._call(_ToNoiseAndLogDet, "x", x, context)
        return both[..., :-1], both[..., -1]

    @torch.compiler.disable
    def from_noise(self, u: Tensor, context: Tensor | None = None, *, log_det: bool = False) -> Any:
        """The rows that noise turns into; their gradient costs about one of log_prob (D + 3 on other backends than "cpu").

        Parameters
        ----------
        u : (*shape, D) tensor
        context : tensor, optional
            As in `log_prob`.
        log_det : bool
            Whether to give log|det| of the map too, from the same pass.

        Returns
        -------
        x : (*shape, D) tensor
        log_det : (*shape,) tensor
            If asked for; see `fastmaf.Flow.from_noise`.
        """
        if not _words.flag("log_det", log_det):
            return self._call(_FromNoise, "u", u, context)
        both = self._call(_FromNoiseAndLogDet, "u", u, context)
        return both[..., :-1], both[..., -1]

    def _call(self, operation: type[_Operation], name: str, x: Tensor, context: Tensor | None) -> Tensor:
        self._check(name, x, self.features)
        context, shape = self._checked_context(context), x.shape[:-1]
        if context is not None:
            shape = _broadcast(name, shape, context.shape[:-1])
        result = operation.on(self, *_aligned(x, context, shape))
        return result.reshape(*shape, self.features + operation.columns) if operation.rows else result.reshape(shape)

    @torch.compiler.disable
    def _sample(self, shape: torch.Size, context: Tensor | None, gradient: bool) -> Tensor:
        """Samples (*shape, *batch, D)."""
        if gradient and not isinstance(self._flow.base, Normal):
            raise NotImplementedError("rsample needs a normal base: samples of a mixture or of discrete variables have no such gradient")
        context = self._checked_context(context)
        n, seed = math.prod(shape), int(torch.empty((), dtype=torch.int64).random_())
        flat = None if context is None else context.reshape(-1, self.context_features)
        with self._handle_with(self.weight) as handle:
            draws = torch.from_numpy(handle.sample(n, _array(flat), seed))
        if gradient:
            draws = _Drawn.on(self, draws, None if flat is None else flat[:, None])
        if context is None:
            return draws.reshape(*shape, self.features)
        return draws.transpose(0, 1).contiguous().reshape(*shape, *context.shape[:-1], self.features)

    # Where it computes, and in which dtype

    def _check(self, name: str, tensor: Any, width: int) -> None:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is of type {type(tensor).__name__}; it must be a tensor of torch: torch.as_tensor({name})")
        _checked_dtype(name, tensor)
        if tensor.dtype != self.weight.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; the flow computes in {self.weight.dtype}: {name}.to({self.weight.dtype})")
        if not tensor.ndim or tensor.shape[-1] != width:
            what = "context features" if name == "context" else "features"
            raise ValueError(f"{name} has shape {_words.shapes(tuple(tensor.shape))}; the flow has {width or 'no'} {what}")

    def _checked_context(self, context: Any) -> Tensor | None:
        if context is None:
            if self.context_features:
                raise ValueError(f"context is missing; the flow has {self.context_features} context features")
            return None
        self._check("context", context, self.context_features)
        return context

    @contextlib.contextmanager
    def _handle_with(self, weight: Tensor) -> Iterator[Handle]:
        """The handle, with these weights and for this thread alone."""
        dtype = _checked_dtype("weight", weight)
        if self._handle is None or self._handle.dtype != dtype:
            self._flow = self._flow.astype(dtype)
            self._handle = Handle(self._flow)
        with self._handle as handle:
            handle.set_parameters(weight.detach().numpy())
            yield handle

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        self._flow.astype(_checked_dtype("weight", moved))  # what cannot be is refused before anything has moved
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}

    def get_extra_state(self) -> Tensor:
        """The flow but for its weights: what `state_dict` holds beside them."""
        data: bytes = self._flow.record.derived("without weights", _without_weights)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take what `get_extra_state` gave.

        Raises
        ------
        ValueError
            If it is that of a flow of another shape.
        """
        record = _codec.from_bytes(zlib.decompress(state.cpu().numpy().tobytes()))[0]
        if _shapes(record) != _shapes(self._flow.record):
            raise ValueError(f"the state is of another flow, {_words.cut(repr(_Flow._of(record)), 80)}; make a module of its shape")
        self._flow, self._handle = _Flow._of(record).astype(self._flow.dtype), None


def MAF(features: int, context_features: int = 0, *, seed: Any = None, **options: Any) -> Flow:
    """A masked autoregressive flow with random weights, as a module.

    Parameters
    ----------
    features, context_features : int
        D and C.
    seed : int, optional
        Of the weights; by default one of torch's generator, so that `torch.manual_seed` settles it.
    **options
        Those of `fastmaf.MAF`.

    Returns
    -------
    Flow

    Raises
    ------
    ValueError
        As in `fastmaf.MAF`.

    Examples
    --------
    >>> import fastmaf.torch
    >>> flow = fastmaf.torch.MAF(features=3, context_features=2, transforms=5, hidden_features=(64, 64))
    >>> flow.weight.shape
    torch.Size([24670])
    """
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
    return Flow(_MAF(features, context_features, seed=seed, **options))


class NormalizingFlow(Distribution):
    """The distribution that a `Flow` is, under contexts or without.

    Samples come first, as everywhere in torch: ``sample((n,))`` has the shape (n, *batch, D). `torch.manual_seed` makes them reproducible.

    Parameters
    ----------
    flow : Flow
    context : (*batch, C) tensor, optional
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, flow: Flow, context: Tensor | None = None, batch_shape: torch.Size | None = None) -> None:
        self._flow, self._context = flow, flow._checked_context(context)
        if batch_shape is None:
            batch_shape = torch.Size(()) if context is None else context.shape[:-1]
        super().__init__(batch_shape, torch.Size((flow.features,)), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether samples have gradients."""
        return isinstance(self._flow._flow.base, Normal)

    @property
    def support(self) -> Any:
        """All real vectors, or those within the bounds of the flow."""
        first = self._flow._flow.layers[:1]
        if not first or not isinstance(first[0], Elementwise):
            return constraints.real_vector
        kinds, lower, upper = first[0].kinds, *(torch.from_numpy(end.copy()) for end in (first[0].lower, first[0].upper))
        if len(set(kinds)) == 1:
            return constraints.independent(_support(kinds[0], lower, upper), 1)
        return constraints.stack([_support(*column) for column in zip(kinds, lower, upper, strict=True)], -1)  # checks column by column

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalizingFlow:
        """The same under more contexts."""
        shape = torch.Size(batch_shape)
        context = self._context
        return NormalizingFlow(self._flow, None if context is None else context.expand(*shape, context.shape[-1]), shape)

    @property
    def transform(self) -> NoiseTransform:
        """The map from rows to noise, as in zuko."""
        return NoiseTransform(self._flow, self._context)

    @property
    def base(self) -> Distribution:
        """The distribution of the noise, as in zuko.

        Raises
        ------
        NotImplementedError
            If it is not normal.
        """
        if not isinstance(self._flow._flow.base, Normal):
            raise NotImplementedError("the base is no standard normal, which is the only one that torch has a distribution for")
        zero = self._flow.weight.new_zeros((*self.batch_shape, self._flow.features))
        return Independent(_TorchNormal(zero, torch.ones_like(zero), validate_args=False), 1, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, in nats; see `Flow.log_prob`."""
        result = self._flow.log_prob(value, self._context)
        return result.expand(_broadcast("value", result.shape, self.batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw (*sample_shape, *batch, D), without a gradient."""
        return self._draw(sample_shape, False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw the same samples with a gradient to the context and the weights, at about the cost of one gradient of log_prob.

        Raises
        ------
        NotImplementedError
            If the base is not normal.
        """
        return self._draw(sample_shape, True)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draw, and evaluate the density of each sample."""
        x = self.rsample(sample_shape)
        return x, self.log_prob(x)

    def _draw(self, sample_shape: Any, gradient: bool) -> Tensor:
        shape = torch.Size(sample_shape)
        if self._context is None:
            shape += self.batch_shape
        return self._flow._sample(shape, self._context, gradient and torch.is_grad_enabled())

    def __repr__(self) -> str:
        return f"NormalizingFlow(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"


class NoiseTransform:
    """The map from rows to noise under contexts, or its inverse; what zuko's transforms are asked for.

    Parameters
    ----------
    flow : Flow
    context : (*batch, C) tensor, optional
    inverse : bool

    Examples
    --------
    >>> import fastmaf.torch, torch
    >>> transform = fastmaf.torch.MAF(features=3)().transform
    >>> noise, log_det = transform.call_and_ladj(torch.zeros(5, 3))
    >>> bool(torch.allclose(transform.inv(noise), torch.zeros(5, 3), atol=1e-5))
    True
    """

    bijective = True

    def __init__(self, flow: Flow, context: Tensor | None = None, inverse: bool = False) -> None:
        self._flow, self._context, self._inverse = flow, context, inverse

    @property
    def inv(self) -> NoiseTransform:
        """The inverse."""
        return NoiseTransform(self._flow, self._context, not self._inverse)

    @property
    def domain(self) -> Any:
        """Where it may begin."""
        return constraints.real_vector if self._inverse else self._flow(self._context).support

    @property
    def codomain(self) -> Any:
        """Where it may end."""
        return self.inv.domain

    def __call__(self, x: Tensor) -> Tensor:
        """(*shape, D), of a tensor (*shape, D)."""
        result: Tensor = (self._flow.from_noise if self._inverse else self._flow.to_noise)(x, self._context)
        return result

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result (*shape, D), and log|det| (*shape,) of the Jacobian, from one pass."""
        result, log_det = (self._flow.from_noise if self._inverse else self._flow.to_noise)(x, self._context, log_det=True)
        return result, log_det

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log|det| (*shape,) of the Jacobian at x; the result y is not needed."""
        return self.call_and_ladj(x)[1]

    def __repr__(self) -> str:
        return f"NoiseTransform({'from' if self._inverse else 'to'} noise, features={self._flow.features})"


def _support(kind: str, lower: Tensor, upper: Tensor) -> Any:
    if kind == "identity":
        return constraints.real
    if kind == "logit":
        return constraints.interval(lower, upper)
    return constraints.greater_than(lower) if kind == "log_above" else constraints.less_than(upper)


def _checked_dtype(name: str, tensor: Tensor) -> str:
    """The dtype of a tensor on the CPU."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; fastmaf.torch computes on the cpu alone: keep the flow and its arguments there")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; fastmaf.torch computes in torch.float32 and torch.float64")
    return DTYPES[tensor.dtype]


def _without_weights(record: FlowRecord) -> bytes:
    """The file of a flow with trivial weights, small."""
    weights = [np.empty(0)]
    for layer in (*record.layers, record.base):
        arrays = list(trainable(layer))
        if isinstance(layer, Linear):
            weights += [0 * arrays[0].ravel(), np.eye(len(arrays[1])).ravel(), 0 * arrays[2]]
        else:
            weights += [np.zeros(array.size) for array in arrays]
    return zlib.compress(_codec.to_bytes(record.with_parameters(np.concatenate(weights))))


def _shapes(record: FlowRecord) -> Any:
    return record.features, record.context_features, [array.shape for array in record.parameter_arrays()]


def _broadcast(name: str, shape: torch.Size, other: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(shape, other)
    except RuntimeError:
        raise ValueError(
            f"{name} has batch shape {_words.shapes(tuple(shape))}, the context {_words.shapes(tuple(other))}; they must broadcast"
        ) from None


def _aligned(x: Tensor, context: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Rows and contexts as the core takes them, nothing repeated that it repeats by itself.

    One context (C,) beside rows (n, D), or one for each; else the last axes of the result are those of the contexts, (1, b, C), and the
    rows are (s, b, D) or (s, 1, D).
    """
    features = x.shape[-1]
    batch = torch.Size(()) if context is None else context.shape[:-1]
    while batch and batch[0] == 1:
        batch = batch[1:]
    if context is None or not batch:
        return x.reshape(-1, features), None if context is None else context.reshape(-1)
    lead, tail = shape[: len(shape) - len(batch)], shape[len(shape) - len(batch) :]
    context = context.reshape(*batch, context.shape[-1]).expand(*tail, -1).reshape(-1, context.shape[-1])
    own = torch.Size((1,) * (len(shape) + 1 - x.ndim)) + x.shape[:-1]
    repeated = all(size == 1 for size in own[len(lead) :])
    if not repeated:
        x = x.expand(*lead, *tail, features)
    x = x.reshape(math.prod(lead), 1 if repeated else len(context), features)
    return (x[0], context) if len(x) == 1 and x.shape[1] == len(context) else (x, context[None])
