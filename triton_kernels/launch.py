"""What every launch of this package shares: `kernel[grid](...)` without Triton's launcher.

Triton compiles to a cubin with what its wheel brings, but launches through a C extension that it
builds with a C compiler and Python.h on the machine. Here a kernel is compiled for the same
specialised arguments, kept on disk (cutemoe/runtime/cache.py) and launched by the driver.

Rejected: Triton's launcher where it works. Before it calls the driver, `sort_slots` takes 8.3 us in
Triton 3.6 and 8.8 in 3.9, `expert_gemm` 10.8 and 14.8; here 4.1 and 5.1 (two CPU cores, 2026-11).
With the driver's part, `sort_slots` on the host of an H200: 19.2 us, Triton 3.6's launcher 20.9,
torch's `add_` 10.9, `cuLaunchKernel` through ctypes alone 6.3 (2026-11-27).

Rejected: programmatic dependent launch (pdl.py) of the GEMMs. Without it the gaps between the
kernels of a layer are 0.3 to 0.5 us in a CUDA graph; with it the early programs of FC2 crowd the
multiprocessors, and FC1 at one token takes 50 us in place of 20 (one H200, 2026-11, Triton 3.6).
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from operator import itemgetter, or_
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cutemoe.errors import Unsupported
from cutemoe.runtime import driver, replay, settings
from cutemoe.runtime.compile import check_capture, facts_of, fetch
from cutemoe.runtime.device import Device, target

_TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
}
# of a parameter: struct's letter
_LETTERS = {"i1": "?", "i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}
_DIVISIBLE = [["tt.divisibility", 16]]
# signatures remembered before the memory is emptied; integers that vary make new ones
_MOST = 4096


def portable() -> bool:
    """True where kernels are interpreted, so that device code must do without PTX."""
    return settings.triton_interprets()


def options(
    warps: int, stages: int = 1, *, fusion: bool = True, pdl: bool = False
) -> dict[str, Any]:
    """Keyword arguments of a launch; FP fusion is named because its default changes.

    With pdl the launch does not wait for the kernel before it: the kernel does (pdl.py).
    """
    named = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    return {**named, "launch_pdl": True} if pdl else named


def power_of_2(n: int) -> int:
    """The least power of two that is not below n; Triton's own function costs the host 8 us."""
    return 1 << max(n - 1, 0).bit_length()


def entry(function: Any) -> Any:
    """Decorates a @triton.jit kernel that the host launches; interpreted kernels stay as they are.

    `kernel[grid](*args, **constants)` is what it is in Triton.
    """
    return function if portable() else Entry(function)


@dataclass(frozen=True)
class Call:
    """What a kernel is compiled for: Triton's words for the arguments of a launch.

    Attributes:
        signature: type of every parameter, nested like the arguments; "constexpr" for constants.
        constants, attributes: by the path to the argument.
        options: of the compiler.
    """

    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def parts(self) -> tuple[str, ...]:
        """Everything, as text that is the same in every process."""
        fields = (self.signature, self.constants, self.attributes, self.options)
        return tuple(repr(sorted(f.items())) for f in fields)

    @property
    def types(self) -> list[str]:
        """Types of the arguments that are passed, in order."""
        return [t for t in _leaves(tuple(self.signature.values())) if t != "constexpr"]


@dataclass(frozen=True)
class Loaded:
    """A kernel on a device, and how to pass it arguments.

    Attributes:
        pack: writes the size of the parameters and the parameters.
        order: takes the parameters out of the addresses and the other arguments behind them.
        offsets: of every parameter, where it lies and which of these arguments it is.
        size, scratch: bytes of the parameters, and the null pointers behind them.
        pdl: launched before the kernel before it is done.
    """

    function: Any
    threads: int
    shared: int
    pack: Any
    order: Callable[[Any], tuple[Any, ...]]
    offsets: tuple[tuple[int, int], ...]
    size: int
    scratch: tuple[int, ...]
    pdl: bool

    def start(self, grid: tuple[int, ...], index: Any, arguments: Sequence[Any]) -> None:
        """Launches with addresses and the other arguments behind them."""
        values = (self.size, *self.order(arguments), *self.scratch)
        driver.launch(
            self.function, grid, self.threads, self.shared, index, self.pack, values, self.pdl
        )

    def launch(
        self, grid: tuple[int, ...], tensors: tuple[torch.Tensor, ...], arguments: Sequence[Any]
    ) -> driver.Launch:
        """What `start` would launch."""
        words = bytearray(8 + self.size)
        self.pack(words, 0, self.size, *self.order(arguments), *self.scratch)
        sizes = (*(*grid, 1, 1)[:3], self.threads, 1, 1, self.shared)
        addresses = tuple((o, (tensors[i],)) for o, i in self.offsets if i < len(tensors))
        early = (driver.EARLY,) if self.pdl else ()
        return driver.Launch(self.function, sizes, bytes(words[8:]), addresses, early)


class Entry:
    """A kernel that the host launches."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        # by what a launch shows at once, and by what Triton makes of it
        self._known: dict[tuple[Any, ...], Loaded | None] = {}
        self._made: dict[tuple[Any, ...], Loaded | None] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        shape = outer = _SHAPES.get(tuple(map(type, args))) or _shape(args)
        flat = args
        if outer.nested:
            flat = tuple(_leaves(args))
            shape = _SHAPES.get(tuple(map(type, flat))) or _shape(flat)
        tensors, others = shape.tensors(flat), shape.others(flat)
        machine = target()
        if machine is None:
            index: Any = torch._C._cuda_getDevice()
            addresses = [x.data_ptr() for x in tensors]
        else:
            index = machine
            addresses = [x.storage_offset() * x.element_size() for x in tensors]
        key = (
            outer,
            shape,
            tuple([x.dtype for x in tensors]),
            reduce(or_, addresses, 0) & 15 == 0 or tuple([a & 15 == 0 for a in addresses]),
            others,
            tuple(constants),
            tuple(constants.values()),
            index,
        )
        found = self._known.get(key, self)
        if found is self:
            found = self._find(key, shape, args, constants, machine)
        if found is None:
            return
        given = (*addresses, *others)
        if not replay.noted(lambda: found.launch(grid, tensors, given)):
            found.start(grid, index, given)

    def _find(
        self,
        key: tuple[Any, ...],
        shape: _Shape,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        machine: Device | None,
    ) -> Loaded | None:
        """The kernel of a signature that was not seen yet; None where it is only to be compiled."""
        call = specialised(self.function, args, keywords)
        index = key[-1]
        whole = (*call.parts(), index)
        if whole not in self._made:
            check_capture(self.__name__)
            device = machine or Device.of(torch.device("cuda", index))
            made = kept(self.function, call, device)
            self._made[whole] = None if machine else _load(made, call, shape, index)
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = self._made[whole]
        return self._made[whole]


@dataclass(frozen=True, eq=False)
class _Shape:
    """The types of some arguments: where the tensors are, and the rest.

    Attributes:
        places: of the tensors, then of the others.
        tensors, others: take them out of the arguments.
    """

    nested: bool
    places: tuple[int, ...]
    tensors: Callable[[Any], tuple[Any, ...]]
    others: Callable[[Any], tuple[Any, ...]]


_SHAPES: dict[tuple[type, ...], _Shape] = {}


def _shape(args: tuple[Any, ...]) -> _Shape:
    at = range(len(args))
    tensors = [i for i in at if isinstance(args[i], torch.Tensor)]
    others = [i for i in at if i not in tensors]
    nested = any(isinstance(x, tuple) for x in args)
    shape = _Shape(nested, (*tensors, *others), _picker(tensors), _picker(others))
    return _SHAPES.setdefault(tuple(map(type, args)), shape)


def _picker(places: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    """A function from a sequence to a tuple of its elements at these places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)


def _leaves(values: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    for x in values:
        if isinstance(x, tuple):
            found += _leaves(x)
        else:
            found.append(x)
    return found


def specialised(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
    """What Triton would compile for these arguments: the same words for the same code.

    Raises:
        TypeError: arguments that do not fit, or a run-time argument passed by keyword.
    """
    names = {p.name for p in function.params}
    given = {n: v for n, v in keywords.items() if n in names}
    bound = function.signature.bind(*args, **given)
    bound.apply_defaults()
    call = Call({}, {}, {}, {n: v for n, v in keywords.items() if n not in names})
    for i, p in enumerate(function.params):
        value = bound.arguments[p.name]
        if p.is_constexpr:
            call.signature[p.name], call.constants[(i,)] = "constexpr", value
        elif p.name in given:
            raise TypeError(f"{function.__name__}: pass {p.name} by position")
        else:
            call.signature[p.name] = _described(value, (i,), not p.do_not_specialize, call)
    return call


def _described(value: Any, path: tuple[int, ...], specialise: bool, call: Call) -> Any:
    """The type of an argument; notes constants and divisibility in `call`."""
    if isinstance(value, tuple):
        parts = [_described(v, (*path, i), specialise, call) for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or (specialise and type(value) is int and value == 1):
        call.constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        meta = value.device.type == "meta"
        at = value.storage_offset() * value.element_size() if meta else value.data_ptr()
        kind = "*" + _TYPES[value.dtype]
    elif isinstance(value, bool):
        return "i1"
    elif isinstance(value, int):
        at = value
        kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    elif isinstance(value, float):
        return "fp32"
    else:
        raise TypeError(f"no kernel takes a {type(value).__name__}")
    if specialise and at % 16 == 0:
        call.attributes[path] = _DIVISIBLE
    return kind


def kept(function: Any, call: Call, device: Device) -> Any:
    """The cache's entry of a kernel for a device's architecture, compiled where there is none."""
    name = f"{function.__module__}:{function.__name__}"
    what = f"{function.__name__}({', '.join(map(str, call.signature.values()))}; {call.constants})"
    facts = (*facts_of("triton", function.__module__), *_environment())

    def make() -> tuple[bytes, dict[str, Any]]:
        return _compiled(function, call, device.arch)

    return fetch(what, (*facts, name, *call.parts()), device.target, make)


def _compiled(function: Any, call: Call, arch: int) -> tuple[bytes, dict[str, Any]]:
    """A cubin, and what a launch has to know of it; Triton's own folder is not looked at."""
    source = ASTSource(function, call.signature, call.constants, call.attributes)
    knobs = triton.knobs
    with (
        tempfile.TemporaryDirectory(prefix="cutemoe-") as folder,
        knobs.compilation.scope(),
        knobs.cache.scope(),
    ):
        knobs.compilation.always_compile = True
        knobs.cache.dir = folder
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.options)
    m = made.metadata
    if m.global_scratch_size or m.profile_scratch_size or m.num_ctas != 1:
        raise Unsupported(f"{function.__name__}: needs scratch memory or a cluster of CTAs")
    letters = "".join(_LETTERS.get(t, "P") for t in call.types)
    scratch = _parameters(made.asm["ptx"]) - len(letters)
    fields = {
        "language": "triton",
        "kernel": f"{function.__module__}:{function.__name__}",
        "name": m.name,
        "shared": m.shared,
        "threads": 32 * m.num_warps,
        "letters": letters,
        "scratch": scratch,
    }
    return made.asm["cubin"], fields


def _parameters(ptx: str) -> int:
    """How many parameters the kernel of a PTX text takes, scratch pointers included."""
    found = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    return found.group(1).count(".param") if found else 0


def _load(made: Any, call: Call, shape: _Shape, index: int) -> Loaded:
    """A kernel of the cache on a device."""
    m = made.manifest
    layout = struct.Struct("@N" + m["letters"] + "P" * m["scratch"])
    passed = [t != "constexpr" for t in _leaves(tuple(call.signature.values()))]
    order = [shape.places.index(i) for i in range(len(shape.places)) if passed[i]]
    letters = m["letters"]
    # 0 of a letter aligns what is before it
    ends = [struct.calcsize(f"@N{letters[:i]}0{x}") for i, x in enumerate(letters)]
    return Loaded(
        function=driver.load(made.data, m["name"], m["shared"], index),
        threads=m["threads"],
        shared=m["shared"],
        pack=layout.pack_into,
        order=_picker(order),
        offsets=tuple((end - struct.calcsize("@N"), x) for end, x in zip(ends, order, strict=True)),
        size=layout.size - struct.calcsize("@N"),
        scratch=(0,) * m["scratch"],
        pdl=call.options.get("launch_pdl", False),
    )


@lru_cache(maxsize=1)
def _environment() -> tuple[str, ...]:
    """Triton, and the variables that change what it makes."""
    try:
        from triton._C.libtriton import get_cache_invalidating_env_vars
    except ImportError:
        return (triton.__version__,)
    return triton.__version__, repr(sorted(get_cache_invalidating_env_vars().items()))
