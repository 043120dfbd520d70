"""What importers do without the libraries that they import from: state dicts, folds, and what they say."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import foreign
import make
import numpy as np
import pytest

import fastmaf
from fastmaf import masks
from fastmaf.interop import ImportMismatchError, _common, from_nflows, from_sbi, from_zuko
from fastmaf.layers import Affine, Autoregressive, Dense, Elementwise, Law, Linear, Normal, Permutation
from fastmaf.record import FlowRecord

RNG = np.random.default_rng(0)
X, C = RNG.normal(size=(50, 3)), RNG.normal(size=(50, 2))


def test_nothing_is_imported_before_it_is_asked_for():
    code = """
import sys, fastmaf
print([name for name in sys.modules if name.startswith("fastmaf.interop")])
fastmaf.from_zuko, fastmaf.interop.to_zuko
print([name for name in ("torch", "jax", "zuko") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=Path(fastmaf.__file__).parents[1])
    assert result.stdout == "[]\n[]\n", result.stderr


@pytest.mark.parametrize("name", fastmaf.interop.__all__)
def test_every_name_is_there(name):
    assert getattr(fastmaf.interop, name).__name__ == name and name in dir(fastmaf.interop)
    assert not name.startswith("from_") or (getattr(fastmaf, name) is getattr(fastmaf.interop, name) and name in dir(fastmaf))


# State dicts, by formulas


def normal_log_prob(z, log_det):
    return log_det - 0.5 * (z**2).sum(axis=1) - 0.5 * z.shape[1] * np.log(2 * np.pi)


def zuko_state():
    """A MAF of two transforms of three features and two context features, one hidden layer, as zuko saves it; and its log-density."""
    state, steps = {}, []
    for k, order in enumerate(([0, 1, 2], [2, 1, 0])):
        order = np.array(order)
        seen = np.arange(12) % 3  # hidden units see the variables of lower rank than this
        first = np.concatenate([order[None, :] < seen[:, None], np.ones((12, 2), bool)], axis=1)
        last = np.repeat(order[:, None] >= seen[None, :], 2, axis=0)
        own = {"order": order, "hyper.0.mask": first, "hyper.2.mask": last}
        own |= {"hyper.0.weight": RNG.normal(size=(12, 5)), "hyper.0.bias": RNG.normal(size=12)}
        own |= {"hyper.2.weight": 0.3 * RNG.normal(size=(6, 12)), "hyper.2.bias": RNG.normal(size=6)}
        state |= {f"transform.transforms.{k}.{key}": value for key, value in own.items()}
        steps.append(own)
    state |= {"base.loc": np.array([0.0, 1.0, 2.0]), "base.scale": np.array([1.0, 2.0, 3.0])}

    def log_prob(x, c, slope=1e-3):
        log_det = np.zeros(len(x))
        for own in steps:
            h = np.concatenate([x, c], axis=1) @ (own["hyper.0.weight"] * own["hyper.0.mask"]).T + own["hyper.0.bias"]
            out = np.maximum(h, 0) @ (own["hyper.2.weight"] * own["hyper.2.mask"]).T + own["hyper.2.bias"]
            shift, raw = out[:, 0::2], out[:, 1::2]
            log_scale = raw / (1 + np.abs(raw / np.log(slope)))
            x, log_det = x * np.exp(log_scale) + shift, log_det + log_scale.sum(axis=1)
        z = (x - state["base.loc"]) / state["base.scale"]
        return normal_log_prob(z, log_det - np.log(state["base.scale"]).sum())

    return state, log_prob


def test_a_state_dict_of_zuko_is_the_density_of_its_formula():
    state, log_prob = zuko_state()
    flow = from_zuko(state_dict=state, activation="relu")
    assert (flow.features, flow.context_features, flow.dtype) == (3, 2, np.float64)
    assert flow.training["source"]["importer"] == "from_zuko" and flow.training["source"]["activation"] == "relu"
    np.testing.assert_allclose(flow.log_prob(X, C), log_prob(X, C), rtol=1e-12)
    np.testing.assert_allclose(from_zuko(state_dict=state, activation="relu", slope=1e-4).log_prob(X, C), log_prob(X, C, 1e-4), rtol=1e-12)
    assert fastmaf.load(fastmaf_bytes(flow)).log_prob(X, C).tolist() == flow.log_prob(X, C).tolist()
    narrow = {key: np.float32(value) if value.dtype == float else value for key, value in state.items()}
    single = from_zuko(state_dict=narrow, activation="relu")
    assert single.dtype == np.float32


def fastmaf_bytes(flow):
    import io

    file = io.BytesIO()
    flow.save(file)
    return file.getvalue()


def nflows_state(features=3, contexts=2, units=8):
    """A z-score, a conditional feedforward MADE and a permutation, as nflows (and sbi, under "net.") saves it; and its log-density."""
    degrees = 1 + np.arange(units) % (features - 1)
    state = {"_transform._transforms.0._shift": RNG.normal(size=features), "_transform._transforms.0._scale": RNG.uniform(0.5, 2, features)}
    net = {
        "initial_layer.weight": RNG.normal(size=(units, features)),
        "initial_layer.bias": RNG.normal(size=units),
        "initial_layer.mask": (degrees[:, None] >= np.arange(1, features + 1)).astype(float),
        "initial_layer.degrees": degrees,
        "context_layer.weight": RNG.normal(size=(units, contexts)),
        "context_layer.bias": RNG.normal(size=units),
        "blocks.0.linear.weight": 0.4 * RNG.normal(size=(units, units)),
        "blocks.0.linear.bias": RNG.normal(size=units),
        "blocks.0.linear.mask": (degrees[:, None] >= degrees).astype(float),
        "blocks.0.linear.degrees": degrees,
        "final_layer.weight": 0.4 * RNG.normal(size=(2 * features, units)),
        "final_layer.bias": RNG.normal(size=2 * features),
        "final_layer.mask": (np.repeat(np.arange(1, features + 1), 2)[:, None] > degrees).astype(float),
        "final_layer.degrees": np.repeat(np.arange(1, features + 1), 2),
    }
    state |= {f"_transform._transforms.1.autoregressive_net.{key}": value for key, value in net.items()}
    state |= {"_transform._transforms.2._permutation": np.array([2, 0, 1]), "_distribution._log_z": np.float64(2.7)}
    state |= {"_embedding_net.0._mean": RNG.normal(size=contexts), "_embedding_net.0._std": RNG.uniform(0.5, 2, contexts)}

    def linear(name, h):
        return h @ (net[f"{name}.weight"] * net.get(f"{name}.mask", 1)).T + net[f"{name}.bias"]

    def log_prob(x, c):
        c = (c - state["_embedding_net.0._mean"]) / state["_embedding_net.0._std"]
        x = x * state["_transform._transforms.0._scale"] + state["_transform._transforms.0._shift"]
        h = np.tanh(linear("initial_layer", x) + np.tanh(linear("context_layer", c)))
        out = linear("final_layer", np.tanh(linear("blocks.0.linear", h)))
        scale = np.logaddexp(0, out[:, 0::2]) + 1e-3
        z = x * scale + out[:, 1::2]
        return normal_log_prob(z, np.log(scale).sum(axis=1) + np.log(state["_transform._transforms.0._scale"]).sum())

    return state, log_prob


def test_a_state_dict_of_nflows_or_sbi_is_the_density_of_its_formula():
    state, log_prob = nflows_state()
    with foreign.quiet():
        flow = from_nflows(state_dict=state, activation="tanh")
        np.testing.assert_allclose(flow.log_prob(X, C), log_prob(X, C), rtol=1e-12)
        same = from_sbi(state_dict={f"net.{key}": value for key, value in state.items()})
        np.testing.assert_allclose(same.log_prob(X, C), log_prob(X, C), rtol=1e-12)
        np.testing.assert_allclose(flow.from_noise(flow.to_noise(X, C), C), X, atol=1e-9)
    assert flow.context_layers == same.context_layers and len(flow.context_layers) == 1
    narrow = {key: np.float32(value) if value.ndim else value for key, value in state.items() if value.dtype == float}
    with foreign.quiet():
        assert (
            from_nflows(state_dict=state | narrow, activation="tanh").dtype == np.float32
        )  # the constant of the base is float64 in files of all dtypes


@pytest.mark.parametrize("importer", [from_zuko, from_nflows, from_sbi])
def test_what_is_no_model_is_said(importer):
    with pytest.raises(ValueError, match="or a state_dict instead"):
        importer()
    with pytest.raises(ValueError, match="or a state_dict instead"):
        importer(object(), state_dict={})
    with pytest.raises((ValueError, NotImplementedError), match=r"state_dict has no keys of the form"):
        importer(state_dict={"weight": np.zeros(3)})


def broken(state, key, value):
    return {name: value if name.endswith(key) else array for name, array in state.items()}


@pytest.mark.parametrize(
    ("importer", "make_state", "key", "value", "error", "message"),
    [
        (from_zuko, zuko_state, "1.hyper.0.bias", np.full(12, np.nan), ValueError, "bias, of shape .*, holds numbers that are not finite"),
        (from_zuko, zuko_state, "1.hyper.2.weight", np.array(["a"]), ValueError, "must hold real numbers"),
        (from_nflows, nflows_state, "_scale", np.array([1.0, np.inf, 1.0]), ValueError, "_scale, of shape .*, holds numbers that are not"),
        (from_nflows, nflows_state, "final_layer.weight", np.zeros((9, 8)), NotImplementedError, "3 parameters for each variable"),
    ],
)
def test_broken_state_dicts_are_refused_by_name(importer, make_state, key, value, error, message):
    with pytest.raises(error, match=message) as caught:
        importer(state_dict=broken(make_state()[0], key, value), activation="relu")
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    "key", ["transform.transforms.0.hyper.3.running_mean", "transform.transforms.1.rotation", "base.weights", "head.bias"]
)
def test_what_a_state_dict_of_zuko_has_beside_a_maf_is_refused(key):
    with pytest.raises(NotImplementedError, match=f"{re.escape(key)} of the state_dict"):
        from_zuko(state_dict=zuko_state()[0] | {key: np.zeros(3)}, activation="relu")


def test_state_dicts_that_say_too_little_are_refused():
    state = zuko_state()[0]
    del state["transform.transforms.1.hyper.0.mask"]
    with pytest.raises(NotImplementedError, match=r"transforms.1 of the state_dict, no masked network of zuko"):
        from_zuko(state_dict=state, activation="relu")
    state = nflows_state()[0] | {"_embedding_net.1.weight": np.zeros((2, 2))}
    with pytest.raises(NotImplementedError, match="the embedding net of the state_dict"):
        from_nflows(state_dict=state, activation="tanh")
    with pytest.raises(NotImplementedError, match="no_such of the state_dict"):
        from_nflows(state_dict={"_transform._transforms.0.no_such": np.zeros(3)})
    for importer, make_state in ((from_zuko, zuko_state), (from_nflows, nflows_state)):
        with pytest.raises(ValueError, match="state_dict does not say the activation of its networks; name it"):
            importer(state_dict=make_state()[0])
    # Layers without weights, such as Logit, leave nothing but a gap.
    later = {
        re.sub(r"_transforms\.(\d)", lambda found: f"_transforms.{int(found[1]) + 1}", key): value
        for key, value in nflows_state()[0].items()
    }
    with pytest.raises(NotImplementedError, match=r"_transforms.0, of which the state_dict has nothing, cannot be imported; give the flow"):
        from_nflows(state_dict=later, activation="tanh")
    state = zuko_state()[0]
    for key, rows in (("weight", 9), ("mask", 9), ("bias", 9)):
        state[f"transform.transforms.0.hyper.2.{key}"] = np.ones((rows, 12) if key != "bias" else rows)
    with pytest.raises(NotImplementedError, match=r"transforms.0 of the state_dict, with 3 parameters for each variable in place of two"):
        from_zuko(state_dict=state, activation="relu")
    for slope in (0, 1, -1e-3, "x"):
        with pytest.raises(ValueError, match="slope"):
            from_zuko(state_dict=zuko_state()[0], activation="relu", slope=slope)


def test_a_z_score_in_front_does_not_make_masks_sparse():
    """Of estimators of sbi: networks with an order have all that it allows."""
    state = {f"net.{key}": value for key, value in zuko_state()[0].items()}
    names = {key: re.sub(r"transforms\.(\d)", lambda found: f"transforms.{int(found[1]) + 1}", key) for key in state}
    state = {names[key]: value for key, value in state.items()}
    state |= {"net.transform.transforms.0.loc": np.zeros(3), "net.transform.transforms.0.scale": np.ones(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_sbi(state_dict=state).features == 3


# Folds


def through(layers, x):
    """Noise and log-determinant by the reference."""
    flow = fastmaf.Flow(layers, features=x.shape[1], dtype="float64")
    with make.reference():
        z = flow.to_noise(x)
        return z, flow.log_prob(x) + 0.5 * (z**2).sum(axis=1)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_a_matrix_is_two_layers(n):
    matrix, bias, x = RNG.normal(size=(n, n)), RNG.normal(size=n), RNG.normal(size=(30, n))
    layers = _common.linear("test", matrix, bias)
    z, log_det = through(layers, x)
    np.testing.assert_allclose(z, x @ matrix.T + bias, atol=1e-11)
    np.testing.assert_allclose(log_det + 0.5 * n * np.log(2 * np.pi), np.linalg.slogdet(matrix)[1], atol=1e-11)
    assert [type(layer) for layer in layers] == [Linear, Permutation]
    with pytest.raises(ValueError, match="is singular"):
        _common.linear("test", np.zeros((n, n)), bias)


def autoregressive(law, direction="data"):
    flow = make.flow(3, (7,), transforms=1)
    layer = next(layer for layer in flow.layers if isinstance(layer, Autoregressive))
    return replace(layer, law=law, direction=direction)


@pytest.mark.parametrize("direction", ["data", "noise"])
@pytest.mark.parametrize(
    "law", [Law(kind, form) for kind in ("exp", "exp_soft", "softplus", "sigmoid", "clamp") for form in ("standardize", "affine")]
)
def test_the_inverse_of_layers_takes_them_back(law, direction):
    lower = np.tril(0.3 * RNG.normal(size=(3, 3)), -1)
    linear = Linear(lower, np.triu(0.3 * RNG.normal(size=(3, 3)), 1) + np.diag([1.5, -0.5, 2.0]), RNG.normal(size=3))
    layers = [Affine([1.0, 2.0, 3.0], [0.5, -2.0, 1.0]), linear, Permutation([2, 0, 1]), autoregressive(law, direction)]
    z, log_det = through([*layers, *_common.inverse("test", layers)], X)
    np.testing.assert_allclose(z, X, atol=1e-10)
    np.testing.assert_allclose(log_det, -1.5 * np.log(2 * np.pi), atol=1e-10)


def test_the_inverse_of_bounds_is_refused():
    with pytest.raises(NotImplementedError, match="the inverse of Elementwise"):
        _common.inverse("test", [Elementwise.from_bounds([(0, 1)])])


@pytest.mark.parametrize("scale", [[2.0, 0.5, 3.0, 1.0], [-2.0, -0.5, -3.0, -1.0]])
def test_what_stands_in_front_of_bounds_goes_into_or_behind_them(scale):
    affine, order = Affine([0.5, 1.0, -1.0, 2.0], scale), Permutation([3, 1, 0, 2])
    bounds = Elementwise.from_bounds([(-1, 2), (0, None), (None, 3), None])
    inside = np.stack([RNG.uniform(-1, 2, 40), RNG.uniform(0, 4, 40), RNG.uniform(-4, 3, 40), RNG.normal(size=40)], axis=1)
    x = (inside / affine.scale + affine.loc)[:, np.argsort(order.perm)]
    layers = [order, affine, bounds]
    simpler = _common.simplified(layers)
    assert isinstance(simpler[0], Elementwise)
    for actual, expected in zip(through(simpler, x), through(layers, x), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-11)


def test_neighbours_are_merged_and_identities_left_out():
    affine, order = Affine([1.0, 2.0, 3.0], [0.5, -2.0, 1.0]), Permutation([2, 0, 1])
    layers = [affine, *_common.inverse("test", [affine]), order, *_common.inverse("test", [order]), affine, affine]
    simpler = _common.simplified(layers)
    assert len(simpler) == 1 and isinstance(simpler[0], Affine)
    np.testing.assert_allclose(through(simpler, X)[0], through([affine, affine], X)[0], atol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "leaky_relu", "identity"])
def test_units_that_the_record_lacks_are_folded(name):
    functions = {"sigmoid": lambda h: 1 / (1 + np.exp(-h)), "leaky_relu": lambda h: np.where(h > 0, h, 0.2 * h), "identity": lambda h: h}
    degrees = np.array([1, 2, 1, 2, 2])
    first = Dense(
        RNG.normal(size=(5, 3)) * masks.hidden_mask(degrees, np.arange(1, 4)), RNG.normal(size=5), degrees, "added", RNG.normal(size=(5, 2))
    )
    second = Dense(RNG.normal(size=(5, 5)) * masks.hidden_mask(degrees, degrees), RNG.normal(size=5), degrees)
    last = Dense(0.3 * RNG.normal(size=(6, 5)) * masks.output_mask(np.arange(1, 4), degrees, 2), RNG.normal(size=6))
    block = _common.Block("plain", (second,))
    net = _common.conditioner("test", first, [block], last, _common.Activation(name, 0.2), True)
    flow = fastmaf.Flow([Autoregressive(np.arange(1, 4), net, Law("exp", "affine"))], context_features=2, dtype="float64")
    h = functions[name](X @ first.weight.T + C @ first.context_weight.T + first.bias)
    out = functions[name](h @ second.weight.T + second.bias) @ last.weight.T + last.bias
    np.testing.assert_allclose(flow.to_noise(X, C), X * np.exp(out[:, 1::2]) + out[:, 0::2], rtol=1e-10, atol=1e-10)


def test_activations_are_told_by_their_values():
    assert _common.activation_by_values("test", "f", np.tanh).name == "tanh"
    assert _common.activation_by_values("test", "f", lambda x: np.where(x > 0, x, 0.3 * x)) == _common.Activation("leaky_relu", 0.3)
    approximate = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    for function in (np.sin, approximate, lambda x: x[:3], lambda x: 1 / 0):
        with pytest.raises(NotImplementedError, match="the activation"):
            _common.activation_by_values("test", function, function)


# The end of an import


def finished(log_prob, **options):
    layers = [Affine([1.0, 2.0], [0.5, 2.0])]
    return _common.finish("test", "library", layers, features=2, dtype=np.dtype("float64"), log_prob=log_prob, **options)


def test_a_wrong_import_is_noticed():
    right = fastmaf.Flow([Affine([1.0, 2.0], [0.5, 2.0])], dtype="float64")
    assert finished(lambda x, c: right.log_prob(x)).layers == right.layers
    for wrong in (lambda x, c: right.log_prob(x) + 1e-4, lambda x, c: np.full(len(x), np.nan), lambda x, c: np.full(len(x), -np.inf)):
        with pytest.raises(ImportMismatchError, match="test: log_prob of the library and of the imported flow differ"):
            finished(wrong)


def test_what_fit_would_train_is_said():
    with pytest.warns(UserWarning, match="masks of the model hold weights at zero"):
        finished(None, sparse=True)


def test_a_flow_of_others_is_fitted_from_where_it_stands():
    state, _ = zuko_state()
    flow = from_zuko(state_dict=state, activation="relu", dtype="float32")
    before, source = flow.parameters(), flow.training["source"]
    x = RNG.normal(size=(400, 3))
    flow.fit(x, RNG.normal(size=(400, 2)), max_epochs=1, seed=0, standardize=False, lr=1e-5)
    assert flow.training["source"] == source
    assert 0 < np.abs(flow.parameters() - before).max() < 1e-2


def test_a_layer_without_context_gets_one_of_zeros():
    layer = autoregressive(Law())
    made = _common.finish("test", "library", [layer], features=3, context_features=2, dtype=np.dtype("float64"), log_prob=None)
    np.testing.assert_allclose(made.log_prob(X, C), fastmaf.Flow([layer], dtype="float64").log_prob(X), rtol=1e-12)
    assert fastmaf.backends.require("reference").unsupported(made.record) is None and isinstance(made.base, Normal)


def test_linear_embeddings_are_folded():
    flow = make.flow(3, (7, 6), context_features=2)
    weight, bias, c = RNG.normal(size=(2, 4)), RNG.normal(size=2), RNG.normal(size=(50, 4))
    layers, _ = _common.fold_linear_context(flow.layers, None, weight, bias)
    record = FlowRecord(layers, context_features=4, dtype="float64")
    plain = fastmaf.Flow(flow.layers, context_features=2, dtype="float64")
    np.testing.assert_allclose(fastmaf.Flow._of(record).log_prob(X, c), plain.log_prob(X, c @ weight.T + bias), rtol=1e-12)


def test_degrees_are_read_off_masks():
    degrees, inputs = np.array([0, 1, 3, 2]), np.array([2, 1, 3])
    assert masks.degrees_from(masks.hidden_mask(degrees, inputs), inputs).tolist() == degrees.tolist()
