"""Where threads wait for each other inside a forward.

They spin, since a step takes microseconds; one that waits longer lets others have its core.
"""

from __future__ import annotations

from typing import Any

from outrider.kernels.cpu.language import INT, POINTER, Code, Value, ir

WORDS = 16
"""Size of a barrier: its two words lie in cache lines of their own."""

SPINS = 4000
"""Looks at the barrier before the core is offered to others: some tens of microseconds."""


def write_wait(module: ir.Module, pause: str) -> Any:
    """The function ``wait``: returns when all threads have called it.

    Arguments: the barrier, threads, the address of ``sched_yield``. ``pause``: the instruction
    that tells the processor of a spinning loop.
    """
    code = Code(module, "wait", [POINTER, INT, INT])
    state, threads, give_way = code.arguments
    b = code.builder
    with code.when(threads.compare(">", 1)):
        turn = code.at(state, 8, INT)

        def seen() -> Value:
            return Value(code, b.load_atomic(turn.raw, "acquire", 8, typ=INT))

        now = seen()
        arrived = Value(code, b.atomic_rmw("add", state.raw, INT(1), "acq_rel"))
        with code.either(arrived.compare("==", threads - 1)) as (last, other):
            with last:
                b.atomic_rmw("xchg", state.raw, INT(0), "monotonic")
                b.atomic_rmw("add", turn.raw, INT(1), "release")
            with other:
                spins = code.variable(code.number(0))
                with code.loop(lambda: seen().compare("==", now)):
                    b.asm(ir.FunctionType(ir.VoidType(), []), pause, "~{memory}", [], True)
                    spins.set(spins.get() + 1)
                    with code.when(spins.get().compare(">", SPINS)):
                        spins.set(code.number(SPINS))
                        code.call_address(give_way)
    return code.done()
