"""The coordinator as a program: ``python -m outrider.coordinator``."""

from __future__ import annotations

import sys

from outrider.coordinator.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", "coordinator", *sys.argv[1:]]))
