"""The draft service as a program: ``python -m outrider.draft_service``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from outrider.shared.config.ngram import read_name
from outrider.shared.config.schema import ModelConfig
from outrider.shared.process import library_env
from outrider.shared.rounds import program


def build(config: ModelConfig, progress: Callable[[str], None]) -> Any:
    """Loads the model and makes the engine; torch is imported here and no earlier.

    Without a model it is not imported at all.
    """
    name = read_name(config.path)
    if name is not None:
        from outrider.draft_service.ngram.engine import make_engine

        return make_engine(config, name)
    from outrider.shared.model.locate import model_path

    model_path(config.path)  # before seconds of imports
    from outrider.draft_service.engine import DraftEngine
    from outrider.shared.model.loading import load_runner

    return DraftEngine(load_runner(config, progress), config.max_k)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service; returns the exit status."""
    library_env.before_grpc()
    from outrider.draft_service.service import make_servicer

    return program.main(
        argv, section="draft", service="Draft", make_servicer=make_servicer, build=build
    )


if __name__ == "__main__":
    sys.exit(main())
