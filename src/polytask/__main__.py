"""``python -m polytask`` is ``polytask``."""

from __future__ import annotations

from polytask.cli import main

if __name__ == "__main__":
    main()
