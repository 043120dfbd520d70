"""The snippets of the page about other libraries run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import foreign
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M) if PAGE.exists() else [""]
ZUKO = "zuko\n\n" + SECTIONS[0] + "".join(part for part in SECTIONS if part.startswith("zuko"))
PARTS = [ZUKO, *(part for part in SECTIONS[1:] if "```" in part and not part.startswith("zuko"))]
NEEDS = {"zuko": ["zuko"], "nflows": ["nflows"], "sbi": ["sbi"], "flowjax": ["flowjax"], "normflows": ["normflows"], "Pyro": ["pyro"]}


@pytest.mark.parametrize("part", PARTS, ids=[part.split()[0] for part in PARTS])
def test_snippets_run(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NEEDS[part.split()[0]]:
            pytest.importorskip(name)
        code = "\n".join(re.findall(r"^```python\n(.*?)^```", part, flags=re.M | re.S))
        assert code.count("fastmaf.from_") >= 1
        with foreign.quiet():
            exec(code, {})
