"""``fastmaf convert``: the weights of a flow of another library."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

import fastmaf
from fastmaf import _container, _files, _words
from fastmaf.cli import _common
from fastmaf.cli._common import UsageError

__all__ = ["add"]

LIBRARIES = ("zuko", "nflows", "sbi")
"""Those whose flows can be told from their weights alone."""

DESCRIPTION = """\
Make a flow of the weights that another library has saved: a state_dict, from zuko (a MAF), nflows or sbi.

  torch.save(theirs.state_dict(), "weights.pt")               read by torch, numbers alone
  safetensors.torch.save_file(theirs.state_dict(), "weights.safetensors")    read without torch

A pickled model is not taken, because to read one runs the code in it. In Python:
  python -c 'import fastmaf, torch; fastmaf.from_zuko(torch.load("flow.pt", weights_only=False)).save("flow.safetensors")'
and likewise from_nflows, from_sbi, from_normflows, from_pyro, from_flowjax, which compare the result with the model."""

EXAMPLES = """\
  fastmaf convert weights.pt --from zuko --activation relu -o flow.safetensors
  fastmaf convert estimator.safetensors --from sbi -o flow.safetensors"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "convert", help="a flow of zuko, nflows or sbi, of its weights", description=DESCRIPTION, examples=EXAMPLES
    )
    parser.set_defaults(run=run)
    parser.add_argument("weights", metavar="WEIGHTS", help="a state_dict: .safetensors, or what torch.save wrote (needs torch)")
    parser.add_argument("--from", required=True, choices=LIBRARIES, dest="origin", help="the library that wrote it")
    parser.add_argument("-o", "--output", required=True, metavar="FLOW", help="the .safetensors file to write")
    parser.add_argument("--activation", metavar="NAME", help="of the hidden units, which the weights do not say (sbi: of its builder)")
    parser.add_argument("--slope", type=float, metavar="S", help="of zuko: its minimum slope (default: 1e-3; zuko 1.0.1 to 1.4.1 had 1e-4)")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="default: that of the weights")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    os.stat(arguments.weights)  # if it is not there, this comes first
    options: dict[str, Any] = {"dtype": arguments.dtype, "activation": arguments.activation}
    if arguments.slope is not None:
        if arguments.origin != "zuko":
            raise UsageError("--slope is of zuko alone")
        options["slope"] = arguments.slope
    _common.apart(arguments.output, arguments.weights)
    state = _state(arguments.weights, arguments.origin)
    flow = getattr(fastmaf, f"from_{arguments.origin}")(state_dict=state, **options)
    flow.save(arguments.output)
    _common.note(f"{flow!r}: {arguments.output}")
    return 0


def _state(path: str, library: str) -> Mapping[str, Any]:
    """The arrays of a file by name; nothing in it is run."""
    data = _files.read("weights", path)
    name = _words.cut(path, 100)
    if data[8:9] == b"{" or not data.startswith((b"PK\x03\x04", b"\x80")):  # neither a ZIP nor a pickle, as torch writes them
        try:
            return _container.read(data, foreign=True)[0]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    try:
        import torch
    except ImportError:
        raise ImportError(f"{name} needs torch to be read; without it: a .safetensors of the state_dict") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of pickle, of zip, of torch
        line = f'fastmaf.from_{library}(torch.load("{_words.cut(path, 30)}", weights_only=False)).save("flow.safetensors")'
        raise ValueError(f"{name} is no state_dict; if it is a pickled model that you trust, in Python: {line}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{name} is no state_dict: torch.save(theirs.state_dict(), path) writes one")
    return {key: np.asarray(value) for key, value in state.items()}
