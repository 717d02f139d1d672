"""One service over a toy model, as a process that can be killed.

All of the product runs but the model; see ``processes.ToyProcess``. Reports go to standard output,
as a supervisor would read them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from outrider.shared.config.schema import DraftConfig, VerifyConfig, load
from outrider.shared.process import library_env, lifecycle
from outrider.shared.rounds import program

SECTIONS: dict[str, tuple[str, type[Any]]] = {
    "draft": ("draft", DraftConfig),
    "verify": ("base", VerifyConfig),
}


def main(role: str, listen: str, toy: dict[str, Any]) -> int:
    """Serves until told to stop, or until the parent is gone."""
    library_env.before_grpc()
    from outrider_testing import fakes

    name, part = SECTIONS[role]
    config = load(None, flags={}, environment={})
    config = dataclasses.replace(
        config, **{name: part(listen=listen, max_calls=16, calibrate=False)}
    )
    made = fakes.Toy(**toy)
    return program.serve(
        config,
        getattr(config, name),
        service=role.capitalize(),
        servicer=fakes.SERVICES[role].make_servicer(),
        build=lambda part, progress: fakes.engine(role, made),
        reporter=lifecycle.Reporter(1),
        watch_stdin=True,
    )
