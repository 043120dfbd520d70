"""Messages: absurd arguments for every parameter of the public functions are refused in a few words that hold no data."""

from __future__ import annotations

import inspect
import io
import re

import numpy as np
import pytest

import fastmaf
from fastmaf import _words, layers

SECRET = 0.8414709848078965
"""A number that stands in all absurd arrays and lists, which no message may print."""


class Chatty:
    """An object whose repr has no end."""

    def __repr__(self):
        return "chatty " * 10_000 + str(SECRET)


ABSURD = {
    "array": np.full((40, 7), SECRET),
    "integers": np.full((3, 3, 3), 841470984),
    "dict": {"key": [SECRET] * 1000, **{str(k): SECRET for k in range(1000)}},
    "empty dict": {},
    "long list": [SECRET] * 5000,
    "list of arrays": [np.full(400, SECRET), np.full(300, SECRET)],
    "list of objects": [Chatty()] * 4,
    "object": Chatty(),
    "text": "wordy " * 1000,
    "bytes": b"\x84\x14" * 1000,
    "huge": 10**5000,
    "negative": -(10**40),
    "complex": 1j,
    "nan": float("nan"),
    "structured": np.zeros(3, [(f"column {k}", "f8") for k in range(100)]),
    "axes": np.full((1,) * 32, SECRET),
    "type": Chatty,
    "lists of lists": [[SECRET] * 100] * 100,
    "None": None,
}


class Zero:
    """A log-density."""

    def log_prob(self, x):
        return np.zeros(len(x))


def flow(**options):
    return fastmaf.MAF(features=3, context_features=2, transforms=1, hidden_features=(4,), names=["u", "g", "r"], **options)


def made(**options):
    return fastmaf.MADE(features=3, context_features=2, hidden_features=(4,), **options)


X, CONTEXT = np.zeros((5, 3)), np.zeros((5, 2))
LAYER = made().layers[-1]
COUNTS = made(conditional="categorical", categories=2).base.conditioner
MEMBERS = made(masks=2)


def flows():
    return fastmaf.Ensemble(flow(), members=2, seed=0)


AFFINE = {"loc": [0.0], "scale": [1.0]}

CALLS = {
    "MAF": (fastmaf.MAF, {"features": 3}),
    "MAF linear": (fastmaf.MAF, {"features": 3, "residual": True, "linear": True, "names": ["u", "g", "r"], "transforms": 2}),
    "MADE": (fastmaf.MADE, {"features": 3}),
    "categorical": (fastmaf.MADE, {"features": 3, "conditional": "categorical", "categories": 3}),
    "Flow": (fastmaf.Flow, {"layers": [LAYER], "context_features": 2}),
    "maf_paper": (fastmaf.presets.maf_paper, {"features": 3, "hidden_features": (4,)}),
    "resmade_lu": (fastmaf.presets.resmade_lu, {"features": 3, "hidden_features": (4,), "transforms": 1}),
    "load": (fastmaf.load, {}),
    "set_backend": (fastmaf.set_backend, {}),
    "Elementwise": (layers.Elementwise, {"kinds": ("identity",), "lower": [0.0], "upper": [1.0]}),
    "Affine": (layers.Affine, AFFINE),
    "BatchNorm": (layers.BatchNorm, dict.fromkeys(("log_gamma", "beta", "mean", "var"), [1.0])),
    "Permutation": (layers.Permutation, {}),
    "Linear": (layers.Linear, {"lower": [[1.0]], "upper": [[1.0]], "bias": [0.0]}),
    "Law": (layers.Law, {}),
    "Dense": (layers.Dense, {"weight": [[0.0]], "bias": [0.0], "context": "added", "context_weight": [[0.0]]}),
    "Block": (layers.Block, {"kind": "plain", "maps": (LAYER.conditioner.initial,)}),
    "Conditioner": (layers.Conditioner, {"initial": LAYER.conditioner.initial, "blocks": (), "final": LAYER.conditioner.final}),
    "Autoregressive": (layers.Autoregressive, {"ranks": [1, 2, 3], "conditioner": LAYER.conditioner}),
    "Normal": (layers.Normal, {}),
    "Terminal": (layers.Terminal, {"ranks": [1, 2, 3], "conditioner": COUNTS, "conditional": "categorical", "categories": (2, 2, 2)}),
    "Ensemble": (fastmaf.Ensemble, {"flows": flow()}),
    "MaskedEnsemble": (
        fastmaf.MaskedEnsemble,
        {name: getattr(MEMBERS, name) for name in ("conditioner", "ranks", "degrees")} | {"flow": MEMBERS.member(0)},
    ),
    "num_threads": (lambda n: fastmaf.num_threads(n).__enter__(), {}),
    "set_num_threads": (fastmaf.set_num_threads, {}),
    "set_isa": (fastmaf.set_isa, {}),
    "log_prob": (flow().log_prob, {"x": X, "context": CONTEXT}),
    "to_noise": (flow().to_noise, {"x": X, "context": CONTEXT}),
    "from_noise": (flow().from_noise, {"u": X, "context": CONTEXT}),
    "sample": (flow().sample, {"n": 2, "context": CONTEXT, "seed": 1}),
    "sample within": (flow().sample, {"n": 2, "context": CONTEXT, "seed": 1, "within": {"u": (-9, 9)}, "max_tries": 2}),
    "acceptance": (flow().acceptance, {"within": [None] * 3, "context": CONTEXT, "n": 2, "seed": 1}),
    "sample_and_log_prob": (flow().sample_and_log_prob, {"n": 2, "context": CONTEXT, "seed": 1}),
    "log_prob_and_grad": (flow().log_prob_and_grad, {"x": X, "context": CONTEXT}),
    "vjp": (flow().vjp, {"x": X, "context": CONTEXT, "cotangent": np.ones(5)}),
    "with_parameters": (flow().with_parameters, {}),
    "astype": (flow().astype, {}),
    "to": (flow().to, {"device": "cpu"}),
    "reset": (flow().reset, {}),
    "prefix": (made().prefix, {}),
    "sample_given": (made().sample_given, {"x": np.zeros(1), "context": CONTEXT[0]}),
    "conditional_probs": (made(conditional="bernoulli").conditional_probs, {"x": X, "context": CONTEXT}),
    "save": (flow().save, {}),
    "member": (made(masks=2).member, {}),
    "ensemble log_prob": (made(masks=2).log_prob, {"x": X, "context": CONTEXT}),
    "ensemble log_prob_and_grad": (made(masks=2).log_prob_and_grad, {"x": X, "context": CONTEXT}),
    "ensemble sample": (made(masks=2).sample, {"n": 2, "context": CONTEXT, "seed": 1}),
    "ensemble vjp": (flows().vjp, {"x": X, "context": CONTEXT, "cotangent": np.ones(5)}),
    "ensemble reset": (made(masks=2).reset, {}),
    "ensemble with_parameters": (made(masks=2).with_parameters, {}),
    "fit": (flow().fit, {"x": np.eye(3)[np.arange(12) % 3], "context": np.eye(2)[np.arange(12) % 2], "max_epochs": 1, "progress": False}),
    "ensemble fit": (
        made(masks=2).fit,
        {"x": np.eye(3)[np.arange(12) % 3], "context": np.eye(2)[np.arange(12) % 2], "max_epochs": 1, "progress": False},
    ),
    "hdr_level": (fastmaf.stats.hdr_level, {"flow": flow(), "context": CONTEXT, "n": 50, "seed": 1}),
    "p_value": (fastmaf.stats.p_value, {"flow": flow(), "x": X, "context": CONTEXT, "n": 50, "seed": 1}),
    "entropy": (fastmaf.stats.entropy, {"flow": flow(), "context": CONTEXT, "n": 50, "seed": 1}),
    "kl": (fastmaf.stats.kl, {"p": flow(), "q": flow(), "context": CONTEXT, "n": 50, "seed": 1}),
    "importance": (fastmaf.stats.importance, {"flow": flow(), "log_density": Zero(), "context": CONTEXT[0], "n": 50, "seed": 1}),
    "product": (fastmaf.stats.product, {"posteriors": [flow(), flow()], "contexts": CONTEXT[:2], "n": 50, "seed": 1}),
    "calibration": (fastmaf.stats.calibration, {"flow": flow(), "x": X, "context": CONTEXT, "n": 50, "seed": 1}),
    "marginal": (fastmaf.stats.marginal, {"flow": flow(), "columns": "u", "context": CONTEXT, "n": 50, "seed": 1}),
    "context_distance": (fastmaf.stats.context_distance, {"flow": flow(), "context": CONTEXT}),
}
CALLS["fit of an ensemble"] = (flows().fit, CALLS["fit"][1])
CALLS["with_parameters of an ensemble"] = (flows().with_parameters, {})
CASES = [(name, parameter) for name, (call, _) in CALLS.items() for parameter in inspect.signature(call).parameters]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_absurd_arguments_are_refused_in_a_few_words(name, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # text is a path, to some
    call, arguments = CALLS[name]
    refused = 0
    for what, value in ABSURD.items():
        try:
            call(**{**arguments, parameter: value})
        except (ValueError, MemoryError) as error:
            refused += 1
            text = str(error)
            assert len(text) <= 200, f"{what}: {len(text)} characters: {text[:300]}"
            assert not re.search(r"(8414709.*){2}|chatty|array\(", text), f"{what}: {text}"  # one number may stand for itself
            assert not re.search(r"ambiguous|unexpected keyword|object is not|unhashable|must be real number", text), f"{what}: {text}"
        except TypeError as error:  # of what is called here
            assert what == "type" and parameter in ("x", "schedule", "callback"), error
        except OSError:
            assert what in ("text", "bytes") and parameter in ("source", "path_or_file", "checkpoint"), what
    assert refused or parameter in ("conditional",), "nothing was refused"


@pytest.mark.parametrize("name", ["calibration", "corner", "history", "noise", "redshift"])
def test_absurd_arguments_of_pictures(name):
    pytest.importorskip("matplotlib")
    rows = np.random.default_rng(0).normal(size=(50, 3))
    draw = getattr(fastmaf.plot, name)
    arguments = dict.fromkeys(inspect.signature(draw).parameters) | dict(
        zip(inspect.signature(draw).parameters, (rows, rows), strict=False)
    )
    if name == "redshift":
        arguments |= {"truth": abs(rows[:, 0]), "estimate": abs(rows[:, 1])}
    if name == "noise":
        arguments["names"] = None
    if name == "calibration":
        arguments = {"found": fastmaf.stats.calibration(fastmaf.Flow([], features=3), rows, n=10, seed=1), "figure": None}
    if name == "history":
        arguments = {"history": fastmaf.History([1.0, 2.0], [1.0, 2.0], best_epoch=2), "figure": None}
    for parameter in arguments:
        for what, value in ABSURD.items():
            if (parameter, what) in {("note", "text"), ("figure", "None"), ("u", "lists of lists")}:
                continue
            try:
                draw(**{**arguments, parameter: value})
            except ValueError as error:
                assert len(str(error)) <= 200, f"{parameter}, {what}: {error}"


@pytest.mark.parametrize(
    "options",
    [{"conditional": "categorical", "categories": 10**10}, {"conditional": "mixture", "components": 10**12}, {"masks": 10**15}],
)
def test_networks_that_no_memory_holds_are_refused(options):
    with pytest.raises(ValueError, match="more than memory holds; build a smaller flow"):
        fastmaf.MADE(3, **options)


@pytest.mark.parametrize("masks", [1, 2])
def test_results_that_no_memory_holds(masks):
    density = fastmaf.MADE(3, hidden_features=(4,), masks=masks, order="sequential")
    for call in (density.sample, density.sample_and_log_prob):
        with pytest.raises(MemoryError, match=r"no memory for a result of shape \(1000000000000000000, 3\).*fewer rows at a time"):
            call(10**18)
    if masks == 1:
        with pytest.raises(MemoryError, match="no memory for a result"):
            density.sample_given([0.0], 10**18)


def test_a_file_of_text_or_one_that_is_read_is_refused(tmp_path):
    for masks in (1, 2):
        density = fastmaf.MADE(3, hidden_features=(4,), masks=masks)
        with open(tmp_path / "x", "w") as text, pytest.raises(ValueError, match=r'path_or_file is .* open it with "wb"'):
            density.save(text)
        with open(tmp_path / "x", "rb") as read, pytest.raises(ValueError, match=r'path_or_file is .* open it with "wb"'):
            density.save(read)
        with pytest.raises(ValueError, match="path_or_file is a file of text"):
            density.save(io.StringIO())


def test_a_word_for_a_value_is_short_and_has_no_data():
    for value in (*ABSURD.values(), np.float64(1), (1, 2, 3), [Chatty()], {1, 2}, np.dtype("f8"), "\x00" * 100, True):
        text = _words.shown(value)
        assert len(text) <= 60 and "chatty" not in text and "\n" not in text and str(SECRET) not in text


def test_short_values_stand_as_they_are():
    for value in (3, 1.5, "tanh", (100, 50), [1, 2], None, True, "a\nb", (7,)):
        assert _words.shown(value) == repr(value)


def test_shapes_and_dtypes_stand_for_arrays():
    assert _words.shown(np.zeros((4, 2), "f4")) == "an array of shape (4, 2) and dtype float32"
    assert _words.shown([0.5] * 9) == "a list of length 9"


def test_all_faulty_columns_are_named_and_a_few_of_many():
    assert _words.columns([0, 2], ["u", "g", "r"]) == "columns 'u', 'r'"
    assert _words.columns(range(100)) == "columns 0, 1, 2 and 97 more"
    assert len(_words.columns(range(9), ["name " * 100] * 9)) < 120


def test_a_flow_without_a_common_order_says_how_to_build_one():
    maf = fastmaf.MAF(features=784, transforms=2, hidden_features=(4,))
    for call in (lambda: maf.prefix(3), lambda: maf.sample_given(np.zeros(3)), lambda: maf.order):
        with pytest.raises(ValueError, match="order='sequential'") as error:
            call()
        assert len(str(error.value)) <= 200
    fastmaf.MAF(features=4, transforms=2, hidden_features=(4,), order="sequential").prefix(3)


def test_bounds_go_by_name():
    flow = fastmaf.MAF(3, names=["u", "g", "z"], bounds={"z": (0, None), "u": (-1, 1)}, transforms=1)
    assert flow.layers[0] == layers.Elementwise.from_bounds([(-1, 1), None, (0, None)])
    assert fastmaf.MADE(2, names=["u", "z"], bounds={"z": (0, 1)}).layers[0].kinds == ("identity", "logit")
    assert fastmaf.presets.resmade_lu(2, names=["u", "z"], bounds={"z": (0, 1)}, transforms=1)[0].layers[0].kinds[1] == "logit"
    for options, message in [
        ({"bounds": {"z": (0, 1)}}, "bounds goes by name, but names is None"),
        ({"bounds": {"z": (0, 1), "y": None}, "names": ["u", "g"]}, "bounds has columns 'z', 'y'; names has no such"),
        ({"bounds": {"g": (1, 0)}, "names": ["u", "g"]}, r"column 'g' has bounds \(1.0, 0.0\); the lower one must be below the upper one"),
        ({"bounds": {"g": "ab"}, "names": ["u", "g"]}, r"bounds\['g'\] is 'ab'; it must be None or a pair"),
    ]:
        with pytest.raises(ValueError, match=message):
            fastmaf.MAF(2, **options)


def test_a_discrete_variable_is_named():
    flow = fastmaf.MADE(2, "bernoulli", names=["wet", "cold"])
    with pytest.raises(ValueError, match=r"x has 3.0 in column 'wet'; that variable has the values 0..1"):
        flow.sample_given([3.0])


def test_files_that_are_none():
    for source in ({}, None, 3, [1], object()):
        with pytest.raises(ValueError, match="source is .*; it must be a path, a binary file or bytes"):
            fastmaf.load(source)
    with pytest.raises(ValueError, match="path_or_file is 3; it must be a path or a binary file"):
        fastmaf.MAF(2).save(3)
    fastmaf.MAF(2).save(io.BytesIO())


def test_paths_that_are_none_and_paths_that_are_long(tmp_path):
    flow = fastmaf.MAF(2, transforms=1)
    for path in ("", "a\0b"):
        with pytest.raises(ValueError, match="source is .*; it must be a path"):
            fastmaf.load(path)
        with pytest.raises(ValueError, match="path_or_file is .*; it must be a path"):
            flow.save(path)
    for call in (fastmaf.load, flow.save):
        with pytest.raises(OSError, match="name too long") as error:
            call(str(tmp_path / ("a" * 2000)))
        assert len(str(error.value)) < 260
    with pytest.raises(FileNotFoundError, match=r"'.*/none'"):
        fastmaf.load(tmp_path / "none")
    with pytest.raises(ValueError, match="checkpoint is ''; it must be a path"):
        flow.fit(np.random.default_rng(0).normal(size=(50, 2)), checkpoint="", max_epochs=1)


@pytest.mark.parametrize("build", [fastmaf.MAF, fastmaf.MADE])
@pytest.mark.parametrize(
    "size", [{"features": 10**9}, {"features": 3, "hidden_features": (10**6, 10**6)}, {"features": 10**6, "direct": True}]
)
def test_a_flow_that_no_memory_holds_is_refused_before_it_is_drawn(build, size):
    with pytest.raises(ValueError, match=r"features, hidden_features \(.*\) and . networks of .* make about .* weights, more than memory"):
        build(**size)


@pytest.mark.parametrize("clip", [-1, 0, np.inf, np.nan, "2"])
def test_clip_is_named(clip):
    with pytest.raises(ValueError, match="^clip is"):
        fastmaf.MAF(2, clip=clip)


def test_objects_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"x has dtype object; it must hold real numbers: x.astype\(float\), if they are"):
        fastmaf.MAF(2).log_prob(np.zeros((3, 2), object))


def test_parameters_are_finite():
    flow = fastmaf.MAF(2, transforms=1)
    parameters = flow.parameters().astype(float)
    for wrong in (np.nan, np.inf, 1e300):  # the last one is infinite in float32
        parameters[[4, 7]] = wrong
        with pytest.raises(ValueError, match="parameters are not finite in 2 places, the first at 4"):
            flow.with_parameters(parameters)


def test_a_flow_takes_no_attributes_that_mean_nothing():
    with pytest.raises(AttributeError):
        fastmaf.MAF(2).standardise = True


def test_contexts_far_from_those_of_the_fit_are_said():
    rng = np.random.default_rng(0)
    flow = fastmaf.MAF(2, context_features=2, transforms=1, hidden_features=(4,), seed=0)
    flow.sample(2, context=[1e9, 0.0], seed=0)  # nothing is known yet
    flow.fit(rng.normal(size=(200, 2)), rng.normal(size=(200, 2)), max_epochs=1, seed=0)
    flow.sample(2, context=[50.0, -50.0], seed=0)
    with pytest.raises(ValueError, match="context is not finite in column 0"):
        flow.sample(2, context=[-np.inf, 1e9])
    for context in ([0.0, 1e9], [[0.0, 0.0], [0.0, -1e300]]):
        with pytest.warns(RuntimeWarning, match="context is far away from those of the fit in column 1, 100 standard deviations and more"):
            flow.sample(2, context=context, seed=0)
