"""``python -m fastmaf`` is the command ``fastmaf``."""

from __future__ import annotations

from fastmaf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
