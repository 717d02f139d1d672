"""The verify service as a program: ``python -m outrider.verify_service``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from outrider.shared.config.schema import ModelConfig
from outrider.shared.process import library_env
from outrider.shared.rounds import program


def build(config: ModelConfig, progress: Callable[[str], None]) -> Any:
    """Loads the model and makes the engine; torch is imported here and no earlier."""
    from outrider.shared.model.locate import model_path

    path = model_path(config.path)  # before seconds of imports
    from outrider.shared.model.hf.generation_defaults import warn_of_what_is_left
    from outrider.shared.model.loading import load_runner
    from outrider.verify_service.engine import VerifyEngine

    warn_of_what_is_left(config.path, path)
    return VerifyEngine(load_runner(config, progress), config.max_k)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service; returns the exit status."""
    library_env.before_grpc()
    from outrider.verify_service.service import make_servicer

    return program.main(
        argv, section="base", service="Verify", make_servicer=make_servicer, build=build
    )


if __name__ == "__main__":
    sys.exit(main())
