"""One service over a toy model, as a process that can be killed.

All of the product runs but the model: ``python -m outrider_testing.toy_service ROLE LISTEN TOY``,
the last one being the fields of ``fakes.Toy`` as JSON. Reports go to standard output, as a
supervisor would read them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
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
    config = dataclasses.replace(config, **{name: part(listen=listen, max_calls=16)})
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
