"""The guide: what its pages and the README show runs, and says what they say that it does."""

from __future__ import annotations

import builtins
import importlib.util
import os
import pathlib
import re

import numpy as np
import pytest

import fastmaf
from fastmaf import cli
from fastmaf.data import galaxies

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "command-line.md": "test_command_line.py",
    "coming-from.md": "interop/test_docs.py",
    "cuda.md": "test_embedding.py",  # its C; its Python wants a GPU
    "dask.md": "test_dask.py",
    "embedding.md": "test_embedding.py",
    "export.md": "test_export.py",
    "jax.md": "test_jax.py",
    "scikit-learn.md": "test_sklearn.py",
    "torch.md": "test_torch.py",
    "tutorial/README.md": "test_tutorial.py",
}
"""Pages that another test runs."""

NEEDS = {"frames.md": "pandas", "quick-start.md": "matplotlib"}
INSTALLS = re.compile(r"python3 -m venv |pip install |mkdocs |chain = |flow\.fit\(chain")
"""Lines of blocks without a language that are no commands of `fastmaf`: they install it, or need files of the reader's."""

CLAIMS = re.compile(r"^print\((.*)\)  # True$", re.MULTILINE)
RAISES = re.compile(r"^# (\w+(?:Error|Warning)): (.*)$", re.MULTILINE)


def text(page):
    return ((ROOT if page == "../README.md" else DOCS) / page.removeprefix("../")).read_text(encoding="utf-8")


def blocks(page):
    return re.findall(r"^```(\w*)\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def pages():
    if not DOCS.exists():
        return []
    own = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    return [page for page in ["../README.md", *own] if page not in ELSEWHERE and blocks(page)]


def run(code, page, names):
    """Run a block; the error or warning that its last comment names is what comes of it, in these words; what is `# True`, is."""
    found = RAISES.findall(code)
    compiled = compile(CLAIMS.sub(r"assert \1", code), page, "exec")
    if not found:
        exec(compiled, names)
        return
    ((kind, words),) = found
    expected = getattr(fastmaf, kind, None) or getattr(builtins, kind)
    if issubclass(expected, Warning):
        with pytest.warns(expected) as caught:
            exec(compiled, names)
        assert words in [str(warning.message) for warning in caught]
    else:
        with pytest.raises(expected) as raised:
            exec(compiled, names)
        assert str(raised.value) == words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page runs, with a table of the reader's."""
    monkeypatch.chdir(tmp_path)
    table = np.abs(galaxies()[0][:500, :5])
    np.savetxt("table.csv", table, delimiter=",", header="w,z,u,g,r", comments="")


@pytest.mark.parametrize("page", pages())
def test_a_page_runs(page, folder, monkeypatch):
    if fastmaf.get_backend() != "cpu":
        pytest.skip("the compiled core is not there; the other backends would take minutes")
    if (needed := NEEDS.get(page)) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "the page"}
    threads = fastmaf.get_num_threads()
    for language, code in blocks(page):
        if language == "python":
            run(code.replace("max_epochs=20)", "max_epochs=2)") if "galaxies()" in code else code, page, names)
            continue
        assert not language, f"a block of {language} in {page} is run by no test"
        for line in code.splitlines():
            if line.startswith("fastmaf "):
                words = line.replace("1e6", "1e3").split()[1:]
                assert cli.main([*words, *["--epochs", "1", "--seed", "1", "--quiet"] * (words[0] == "fit")]) == 0, line
            else:
                assert INSTALLS.match(line), f"a line in {page} is run by no test: {line}"
    fastmaf.set_num_threads(threads)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_the_other_pages_are_run_elsewhere(page):
    path = pathlib.Path(__file__).parent / ELSEWHERE[page]
    assert DOCS.joinpath(page).exists() and pathlib.Path(page).name in path.read_text(encoding="utf-8")


def test_links_lead_somewhere():
    """Of the README and the other pages of the folder above the guide; those of the guide are checked where its site is built."""
    for page in (path for path in ROOT.glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_guide():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {os.fspath(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", text("README.md")))
    assert linked == {page for page in listed if page != "README.md" and not page.startswith("api/")}
