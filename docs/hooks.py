"""What the site of the guide needs beside Markdown: formulas without scripts, and links that leave the folder of the guide."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")
FORMULA = re.compile(r"(?<!\$)(\$\$?)(?=\S)(.+?)(?<=\S)\1(?!\$)", re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The text of a page as the site has it."""
    root, source = Path(config["docs_dir"]), Path(page.file.abs_src_path)

    def link(found: re.Match[str]) -> str:
        """A link to a file of the repository that is no page becomes its name."""
        target = Path(os.path.normpath(source.parent / found[2]))
        if target.is_relative_to(root):
            return found[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_path} links to {found[2]}, which is not there")
        return f"{found[1]} (`{target.relative_to(root.parent)}`)"

    def formula(found: re.Match[str]) -> str:
        if found[1] == "$$":
            return convert(found[2], display="block")
        return f"<span>{convert(found[2])}</span>"  # <math> at the start of a line would be a paragraph of its own

    parts = CODE.split(markdown)
    parts[::2] = [FORMULA.sub(formula, LINK.sub(link, text)) for text in parts[::2]]
    return "".join(parts)
