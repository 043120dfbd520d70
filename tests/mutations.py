"""Faults that tests once let pass, and the tests that must catch each.

Run by hand, or at night: ``python tests/mutations.py [name ...]``, in a clone whose package has a compiled core (``pip install -e .``, or a
``_core`` beside the sources).  Each fault is put into a copy of the tree, and the tests named beside it have to fail there; before that
they have to pass in the copy as it is.  Faults of the C++ core are not here: each takes a build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """In `file`, `old` becomes `new`; `tests` are arguments of pytest."""

    file: str
    old: str
    new: str
    tests: str


MUTATIONS = {
    "Ctrl-C keeps the last weights": Mutation(
        "train/loop.py",
        "record = self.trained(self.best, self.best_statistics)",
        "record = self.trained(self.parameters, self.statistics)",
        "test_train.py -k interruption_keeps_the_best",
    ),
    "Ctrl-C is swallowed": Mutation(
        "train/loop.py", 'if not interrupted or on_interrupt == "raise":', "if not interrupted:", "test_train.py -k interruption_keeps"
    ),
    "an exception throws the fit away": Mutation(
        "train/loop.py",
        "        if run.history.train:  # else nothing was learned, and the flow stays as it was\n            run.install()",
        "        if run.history.train and interrupted:\n            run.install()",
        "test_train.py -k an_exception_keeps",
    ),
    "the callback sees the flow as it is later": Mutation(
        "train/loop.py",
        "return Epoch(values, lambda: self.built(parameters, statistics))",
        "return Epoch(values, lambda: self.built(self.parameters, self.statistics))",
        "test_train.py -k callback_sees",
    ),
    "the digest reads the first block": Mutation(
        "train/checkpoint.py",
        "for first in range(0, len(array), step):",
        "for first in range(0, min(1, len(array)), step):",
        "test_train.py -k digest",
    ),
    "rows within are not the first ones of their stream": Mutation(
        "_within.py",
        "np.repeat(drawn[group] - begin, wanted)",
        "np.repeat(2 * drawn[group] - begin, wanted)",
        "test_within.py -k bits_depend",
    ),
    "every context is drawn from as the worst needs": Mutation(
        "_within.py", "np.sqrt(lacking) - 1) / share", "np.sqrt(lacking) - 1) / share.min()", "test_within.py -k no_context"
    ),
    "log|det| is found where there is no noise": Mutation(
        "backends/reference.py",
        "np.where(np.isfinite(z).all(axis=1), here, -np.inf)",
        "here",
        "test_log_det.py -k without_noise",
    ),
    "resample draws the same members": Mutation(
        "masked_ensemble.py", "((seed, epoch, k) for k in", "((seed, 1, k) for k in", "test_train.py -k redrawn_members"
    ),
    "context_layers keep the old pack": Mutation(
        "flow.py",
        "self._record = self._record.replaced(context_layers=layers)",
        "old = self._record; self._record = old.replaced(context_layers=layers); self._record._derived.update(old._derived)",
        "test_record.py -k context_layers",
    ),
    "layers keep the old pack": Mutation(
        "flow.py",
        "self._record = self._record.replaced(layers=layers)",
        "old = self._record; self._record = old.replaced(layers=layers); self._record._derived.update(old._derived)",
        "test_record.py -k assignments_count",
    ),
    "a start that is no number blocks the best": Mutation(
        "train/loop.py",
        "self.best_score = float(np.fmax(score, -math.inf))",
        "self.best_score = float(score)",
        "test_train.py -k not_a_number_at_the_start",
    ),
    "a second fit standardises an identity": Mutation(
        "train/data.py", "(bool(wanted) and not record.fitted)", "bool(wanted)", "test_train.py -k second_fit_leaves"
    ),
    "a note keeps a flow from being standardised": Mutation(
        "record.py",
        'return {"epochs", "best_epoch", "settings"} <= set(self.training)',
        "return bool(self.training)",
        "test_train.py -k notes_do_not_keep",
    ),
    "a value of another variable is accepted": Mutation("_partial.py", " | (x >= counts)", "", "test_partial.py"),
    "shared gradients are summed in single": Mutation(
        "_gradients.py",
        "part.sum(axis=self.axes, dtype=np.float64, keepdims=True)",
        "part.sum(axis=self.axes, keepdims=True)",
        "test_vjp.py test_flow.py",
    ),
    "a backend is asked once and for all": Mutation(
        "flow.py", "if record.approved_by is not backend:", "if record.approved_by is None:", "test_record.py -k asked_again"
    ),
    "copies lose device and precision": Mutation(
        "flow.py",
        "return Flow._of(record, self._placement)",
        "return Flow._of(record)",
        "test_record.py -k copies_keep",
    ),
    "pickles lose the precision": Mutation(
        "flow.py",
        "return _revived, (_codec.to_bytes(*self._parts()), *self._placement)",
        'return _revived, (_codec.to_bytes(*self._parts()), self._placement[0], "high")',
        "test_record.py -k copies_keep",
    ),
    "clipped variables have gradients through the networks": Mutation(
        "backends/reference.py",
        "return np.where(x == given, dx, 0), dc, gradients",
        "return dx, dc, gradients",
        "test_vjp.py -k input_clip",
    ),
    "a flipped byte in the weights is read": Mutation(
        "_container.py", "if metadata.pop(DIGEST) != digest:", "if metadata.pop(DIGEST) == 0:", "test_io.py -k flipped"
    ),
    "validation rows are drawn among all": Mutation(
        "train/data.py",
        "chosen[shuffle(seed, SPLIT, 0, total)[:count]] = True",
        "chosen[[j for j in shuffle(seed, SPLIT, 0, len(train.x))[: round(validation * len(train.x))] if j < total]] = True",
        "test_train.py -k few_rows",
    ),
    "a context that does not vary has scale 0": Mutation(
        "train/data.py",
        "moments.deviation = np.where(noise, 1.0, moments.deviation)",
        "pass",
        "test_train.py -k contexts_that_do_not_vary",
    ),
    "a column that varies in a row held out is refused": Mutation(
        "train/data.py",
        "used = np.ones(len(train.x)) if train.weights is None else train.weights",
        "used = weights",
        "test_train.py -k never_keeps_a_fit_from_starting",
    ),
    "many values far away are not seen": Mutation(
        "train/data.py",
        "half = distinct.size // 2 ",
        "distinct = np.sort(values[:, j])[values.shape[0] // 4 : -values.shape[0] // 4]; half = distinct.size - 1 ",
        "test_train.py -k far_away_are_said",
    ),
    "contexts are not looked at": Mutation(
        "train/data.py", 'notes += _spoilt("context"', '_spoilt("context"', "test_train.py -k said_of_contexts_too"
    ),
    "seconds between checkpoints count epochs": Mutation(
        "train/loop.py",
        "now - self.written_at >= self.every if isinstance(self.every, float) else done",
        "done",
        "test_train.py -k so_many_seconds",
    ),
    "another fit's checkpoint is replaced": Mutation(
        "train/checkpoint.py",
        '            raise ValueError(f"checkpoint {_words.shown(name)} exists; ',
        '            return {}\n            raise ValueError(f"checkpoint {_words.shown(name)} exists; ',
        "test_train.py -k not_replaced_by_another_fit",
    ),
    "validation rows share the caller's buffer": Mutation(
        "train/data.py", "    if reused:", "    if False:", "test_train.py -k one_array_again"
    ),
    "notes of a callback are lost": Mutation(
        "train/loop.py", "{**self.start.training, **noted,", "{**self.start.training,", "test_train.py -k notes_of_a_callback"
    ),
    "what x shares with the context is not looked for": Mutation(
        "train/data.py",
        "    if train.context is not None:\n        context = train",
        "    if False:\n        context = train",
        "test_train.py -k shares_with",
    ),
    "validation rows are not looked at": Mutation(
        "train/loop.py",
        'apart = held if settings["validation"] == "given" else None',
        "apart = None",
        "test_train.py -k far_from_all_others",
    ),
    "samples are rounded in silence": Mutation(
        "flow.py", "(rounded := self._record.rounded(samples))", "(rounded := [])", "test_sample.py -k rounded_away"
    ),
    "seconds are in the file": Mutation(
        "train/loop.py",
        '            "stopped": history.stopped,\n            "settings"',
        '            "stopped": history.stopped,\n            "s": history.seconds,\n            "settings"',
        "test_train.py -k identical_fits",
    ),
}


def run(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Pytest on a tree."""
    names, _, rest = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in names.split())]
    command += ["-k", rest] if rest else []
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def main(wanted: list[str]) -> int:
    """Try all mutations, or those named; the number of those that no test caught."""
    unknown = set(wanted) - MUTATIONS.keys()
    if unknown:
        raise SystemExit(f"there is no mutation {sorted(unknown)[0]!r}; there are: {', '.join(MUTATIONS)}")
    survived = []
    for name in wanted or MUTATIONS:
        mutation = MUTATIONS[name]
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            tree.mkdir()
            for part in ("fastmaf", "tests"):
                shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
            for part in ("pyproject.toml", "docs", "benchmarks"):
                (tree / part).symlink_to(ROOT / part)
            path = tree / "fastmaf" / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                verdict = f"does not apply: the text is there {text.count(mutation.old)} times"
            elif run(tree, mutation.tests).returncode:
                verdict = "the tests fail without it"
            else:
                path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
                verdict = "caught" if run(tree, mutation.tests).returncode == 1 else "SURVIVED"
        if verdict != "caught":
            survived.append(name)
        print(f"{verdict:>10}  {name}", flush=True)
    return len(survived)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
