"""A small language over LLVM's instructions, in which the CPU kernels are written.

``Code`` is one function in the making; ``Value`` an expression in it, with Python's operators. A
vector meets a scalar or a Python number by repeating it. Nothing is reordered by the compiler:
floating-point operations carry no fast-math flags, so the order written is the order run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir as ir  # the other files take it from here

INT = ir.IntType(64)
INT32 = ir.IntType(32)
INT16 = ir.IntType(16)
INT8 = ir.IntType(8)
FLOAT = ir.FloatType()
HALF = ir.HalfType()
POINTER = ir.PointerType()
NOTHING = ir.VoidType()


def vector(kind: Any, lanes: int) -> Any:
    """``lanes`` elements of ``kind`` side by side."""
    return ir.VectorType(kind, lanes)


def _bytes(kind: Any) -> int:
    """Size of one element."""
    if isinstance(kind, ir.IntType):
        return int(kind.width) // 8
    return 2 if kind == HALF else 4


class Value:
    """An expression: an integer, a float, a pointer, or a vector of numbers."""

    __slots__ = ("code", "raw")

    def __init__(self, code: Code, raw: Any) -> None:
        self.code, self.raw = code, raw

    @property
    def kind(self) -> Any:
        """The LLVM type."""
        return self.raw.type

    def _is_float(self) -> bool:
        kind = self.kind.element if isinstance(self.kind, ir.VectorType) else self.kind
        return isinstance(kind, ir.FloatType | ir.HalfType)

    def _with(self, other: Any, floats: str, integers: str) -> Value:
        left, right = self.code.alike(self, other)
        method = getattr(self.code.builder, floats if left._is_float() else integers)
        return Value(self.code, method(left.raw, right.raw))

    def __add__(self, other: Any) -> Value:
        return self._with(other, "fadd", "add")

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self._with(other, "fsub", "sub")

    def __mul__(self, other: Any) -> Value:
        return self._with(other, "fmul", "mul")

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return self._with(other, "fdiv", "none")

    def __floordiv__(self, other: Any) -> Value:
        return self._with(other, "none", "sdiv")

    def __mod__(self, other: Any) -> Value:
        return self._with(other, "none", "srem")

    def __and__(self, other: Any) -> Value:
        return self._with(other, "none", "and_")

    def __lshift__(self, other: Any) -> Value:
        return self._with(other, "none", "shl")

    def __rshift__(self, other: Any) -> Value:
        return self._with(other, "none", "lshr")

    def compare(self, sign: str, other: Any) -> Value:
        """``<``, ``==`` and so on, for each lane; false where a number is NaN."""
        left, right = self.code.alike(self, other)
        b = self.code.builder
        method = b.fcmp_ordered if left._is_float() else b.icmp_signed
        return Value(self.code, method(sign, left.raw, right.raw))

    def to(self, kind: Any) -> Value:
        """The same bits as another type of equal size."""
        return Value(self.code, self.code.builder.bitcast(self.raw, kind))


class Variable:
    """A place whose value changes; becomes a register."""

    def __init__(self, code: Code, first: Value) -> None:
        self._code = code
        with code.builder.goto_entry_block():
            self._place = code.builder.alloca(first.kind)
        self._kind = first.kind
        self.set(first)

    def set(self, value: Value) -> None:
        """Changes the value."""
        self._code.builder.store(value.raw, self._place)

    def get(self) -> Value:
        """The value now."""
        return Value(self._code, self._code.builder.load(self._place, typ=self._kind))


class Code:
    """One function being written."""

    def __init__(
        self, module: ir.Module, name: str, arguments: Sequence[Any], *, seen: bool = False
    ) -> None:
        """``seen``: callable from outside."""
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(NOTHING, arguments), name)
        if not seen:
            self.function.linkage = "internal"
        self.builder = ir.IRBuilder(self.function.append_basic_block())
        self.arguments = [Value(self, one) for one in self.function.args]

    def done(self) -> ir.Function:
        """Ends the function."""
        self.builder.ret_void()
        return self.function

    def alike(self, left: Any, right: Any) -> tuple[Value, Value]:
        """Both as values of one type."""
        if not isinstance(left, Value):
            left = self.number(left, right.kind)
        if not isinstance(right, Value):
            right = self.number(right, left.kind)
        for one, other in ((left, right), (right, left)):
            if isinstance(one.kind, ir.VectorType) and not isinstance(other.kind, ir.VectorType):
                wide = self.repeat(other, one.kind.count)
                return (one, wide) if one is left else (wide, one)
        return left, right

    def number(self, value: float, kind: Any = INT) -> Value:
        """A constant, repeated where ``kind`` is a vector."""
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [value] * kind.count))
        return Value(self, ir.Constant(kind, value))

    def numbers(self, values: Iterable[int], kind: Any) -> Value:
        """A vector of constants."""
        return Value(self, ir.Constant(kind, list(values)))

    def narrow(self, value: Value) -> Value:
        """A 64-bit integer as one of 32 bits."""
        return Value(self, self.builder.trunc(value.raw, INT32))

    def widened(self, value: Value) -> Value:
        """A 32-bit integer as one of 64 bits."""
        return Value(self, self.builder.sext(value.raw, INT))

    def zeros(self, lanes: int) -> Value:
        """``lanes`` floats of 0."""
        return self.number(0.0, vector(FLOAT, lanes))

    def variable(self, first: Value) -> Variable:
        """A place that begins as ``first``."""
        return Variable(self, first)

    def null(self) -> Value:
        """No address."""
        return Value(self, ir.Constant(POINTER, None))

    def to_float(self, value: Value) -> Value:
        """An integer as a float."""
        return Value(self, self.builder.sitofp(value.raw, FLOAT))

    def side_by_side(self, low: Value, high: Value) -> Value:
        """One vector of two."""
        lanes = list(range(2 * low.kind.count))
        mask = ir.Constant(vector(INT32, len(lanes)), lanes)
        return Value(self, self.builder.shuffle_vector(low.raw, high.raw, mask))

    def repeat(self, value: Value, lanes: int) -> Value:
        """A vector whose lanes are all ``value``."""
        one = self.builder.insert_element(
            ir.Constant(vector(value.kind, lanes), ir.Undefined), value.raw, INT32(0)
        )
        mask = ir.Constant(vector(INT32, lanes), [0] * lanes)
        return Value(self, self.builder.shuffle_vector(one, one, mask))

    def at(self, pointer: Value, index: Any, kind: Any = FLOAT) -> Value:
        """The address of element ``index`` of an array of ``kind``."""
        index = index if isinstance(index, Value) else self.number(index)
        return Value(self, self.builder.gep(pointer.raw, [index.raw], source_etype=kind))

    def load(self, pointer: Value, index: Any, kind: Any, lanes: int = 0) -> Value:
        """Element ``index`` of an array of ``kind``; with ``lanes`` so many from there on."""
        place = self.at(pointer, index, kind).raw
        whole = vector(kind, lanes) if lanes else kind
        return Value(self, self.builder.load(place, typ=whole, align=_bytes(kind)))

    def store(self, value: Value, pointer: Value, index: Any, kind: Any = FLOAT) -> None:
        """Writes ``value``, a vector too, to element ``index`` of an array of ``kind``."""
        self.builder.store(value.raw, self.at(pointer, index, kind).raw, align=_bytes(kind))

    def pointer(self, table: Value, index: Any) -> Value:
        """The address that stands at place ``index`` of a table of 64-bit words."""
        return Value(self, self.builder.inttoptr(self.load(table, index, INT).raw, POINTER))

    def intrinsic(self, name: str, result: Any, *arguments: Value) -> Value:
        """One of LLVM's own functions, by its whole name."""
        kinds = [one.kind for one in arguments]
        known = self.module.globals.get(name)
        function = known or ir.Function(self.module, ir.FunctionType(result, kinds), name)
        return Value(self, self.builder.call(function, [one.raw for one in arguments]))

    def prefetch(self, pointer: Value) -> None:
        """Asks for the cache line at an address, which need not be there; changes nothing."""
        reading, near, data = (self.number(one, INT32) for one in (0, 3, 1))
        self.intrinsic("llvm.prefetch.p0", NOTHING, pointer, reading, near, data)

    def _suffix(self, kind: Any) -> str:
        return f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c``, rounded once."""
        a, b = self.alike(a, b)
        return self.intrinsic(f"llvm.fma.{self._suffix(c.kind)}", c.kind, a, b, c)

    def sqrt(self, value: Value) -> Value:
        """The square root."""
        return self.intrinsic(f"llvm.sqrt.{self._suffix(value.kind)}", value.kind, value)

    def nearest(self, value: Value) -> Value:
        """The nearest whole number, ties to even, as a float."""
        return self.intrinsic(f"llvm.rint.{self._suffix(value.kind)}", value.kind, value)

    def whole(self, value: Value) -> Value:
        """A vector of floats as integers of 32 bits, cut off; NaN becomes 0."""
        lanes = value.kind.count
        name = f"llvm.fptosi.sat.v{lanes}i32.v{lanes}f32"
        return self.intrinsic(name, vector(INT32, lanes), value)

    def largest(self, a: Value, b: Value) -> Value:
        """The larger of two, for each lane."""
        a, b = self.alike(a, b)
        return self.intrinsic(f"llvm.maxnum.{self._suffix(a.kind)}", a.kind, a, b)

    def highest_lane(self, value: Value) -> Value:
        """The largest lane."""
        return self.intrinsic(f"llvm.vector.reduce.fmax.{self._suffix(value.kind)}", FLOAT, value)

    def lowest_lane(self, value: Value) -> Value:
        """The smallest lane of a vector of 32-bit integers."""
        return self.intrinsic(f"llvm.vector.reduce.smin.v{value.kind.count}i32", INT32, value)

    def total(self, value: Value) -> Value:
        """The sum of the lanes: the upper half onto the lower, until one is left."""
        lanes = value.kind.count
        width = 1 << (lanes - 1).bit_length()
        if width != lanes:
            zeros = ir.Constant(value.kind, [0.0] * lanes)
            mask = ir.Constant(vector(INT32, width), list(range(width)))
            value = Value(self, self.builder.shuffle_vector(value.raw, zeros, mask))
        while width > 1:
            width //= 2
            low = ir.Constant(vector(INT32, width), list(range(width)))
            high = ir.Constant(vector(INT32, width), list(range(width, 2 * width)))
            b = self.builder
            value = Value(
                self,
                b.fadd(
                    b.shuffle_vector(value.raw, value.raw, low),
                    b.shuffle_vector(value.raw, value.raw, high),
                ),
            )
        return Value(self, self.builder.extract_element(value.raw, INT32(0)))

    def choose(self, condition: Value, yes: Any, no: Any) -> Value:
        """``yes`` where the condition holds, else ``no``."""
        yes, no = self.alike(yes, no)
        return Value(self, self.builder.select(condition.raw, yes.raw, no.raw))

    def smaller(self, a: Any, b: Any) -> Value:
        """The smaller of two integers."""
        a, b = self.alike(a, b)
        return self.choose(a.compare("<", b), a, b)

    def later(self, a: Any, b: Any) -> Value:
        """The larger of two integers."""
        a, b = self.alike(a, b)
        return self.choose(a.compare("<", b), b, a)

    def call(self, function: Any, *arguments: Value) -> None:
        """Calls a function that returns nothing."""
        self.builder.call(function, [one.raw for one in arguments])

    def call_address(self, address: Value) -> Value:
        """Calls the C function ``int f(void)`` at an address, and widens what it returns."""
        kind = ir.FunctionType(INT32, []).as_pointer()
        function = self.builder.inttoptr(address.raw, kind)
        return Value(self, self.builder.sext(self.builder.call(function, []), INT))

    @contextmanager
    def loop(self, goes_on: Callable[[], Value]) -> Iterator[None]:
        """``while goes_on()``: what it does is looked at anew before each turn."""
        head, body, after = (self.builder.append_basic_block() for _ in range(3))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(goes_on().raw, body, after)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def range(self, begin: Any, end: Any, step: int = 1) -> Iterator[Value]:
        """``for i in range(begin, end, step)``."""
        place = self.variable(begin if isinstance(begin, Value) else self.number(begin))
        with self.loop(lambda: place.get().compare("<", end)):
            index = place.get()
            yield index
            place.set(index + step)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """``if condition``."""
        with self.builder.if_then(condition.raw):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """``if condition … else …``: two contexts."""
        with self.builder.if_else(condition.raw) as both:
            yield both

    def call_one(self, functions: Sequence[Any], number: Value, arguments: Sequence[Value]) -> None:
        """Calls ``functions[number]``."""
        after = self.builder.append_basic_block()
        switch = self.builder.switch(number.raw, after)
        for place, function in enumerate(functions):
            block = self.builder.append_basic_block()
            switch.add_case(INT(place), block)
            self.builder.position_at_end(block)
            self.call(function, *arguments)
            self.builder.branch(after)
        self.builder.position_at_end(after)
