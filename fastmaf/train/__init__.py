"""Fitting a flow: maximum likelihood by Adam, early stopping on held-out rows, exact checkpoints.

`loop` runs epochs around the training engine of a backend, which holds weights and moments and does the arithmetic; `data` judges rows,
splits them and finds what standardises them; `checkpoint` is the file from which a fit goes on.
"""

from fastmaf.train.data import FitWarning, shuffle
from fastmaf.train.loop import Epoch, History, Members, fit
from fastmaf.train.many import fit_members
from fastmaf.train.ranks import ranks_of

__all__ = ["Epoch", "FitWarning", "History", "Members", "fit", "fit_members", "ranks_of", "shuffle"]
