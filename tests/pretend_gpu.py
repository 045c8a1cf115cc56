"""A GPU that is not there: tensors of `cuda` whose values lie on the CPU, under a GPU's rules.

    with pretend_gpu():
        main()                      # any command of ours, with gradients, threads and checkpoints

What mixes devices or precisions fails as it does on a GPU, also a generator of the CPU or `numpy` of
a tensor there. A copy to the host that does not block holds NaN until somebody waits for it. Inside
`no_waits` whatever makes the host wait for the GPU fails too: to ask for a value, or a plain copy
either way. The CPU's kernels compute, so that in single precision a command ends where it does on
the CPU, but for the last bits of layers that are laid out otherwise on a GPU (`on_the_cpu`: with the
attention that is used here).

What it cannot show: CUDA's own kernels, their speed and memory, compiling, streams, NCCL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch._decomp.decompositions_for_jvp  # it scripts functions that `cast` replaces
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
HOST = "lazy"  # the device that C++ sees: not the CPU, and autograd's engine serves it by itself
KEEP = torch.preserve_format
HALF = (torch.float16, torch.bfloat16)


class HostWaits(Exception):
    """The host would wait for the GPU. No RuntimeError, which is what a GPU refuses with."""


class State:
    """What holds for all threads."""

    waits: int | None = None  # that are allowed yet; None: any
    copies: ClassVar[list[tuple[Tensor, Tensor]]] = []  # to the host, under way


def wait(why: str) -> None:
    """The host waits: all copies arrive."""
    if State.waits is not None:
        State.waits -= 1
        if State.waits < 0:
            raise HostWaits(why)
    while State.copies:
        host, value = State.copies.pop(0)
        host.copy_(value)


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", HOST)


class OnGpu(torch.Tensor):
    """A tensor of the GPU: `held`, on the CPU, has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=HOST,
        )  # fmt: skip
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, OnGpu):
            raise RuntimeError("incompatible tensor type")
        self.held = new.held
        torch.Tensor.data.__set__(self, new)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("cannot pin a tensor of cuda")

    def cpu(self, memory_format: Any = KEEP) -> Tensor:
        return self.to("cpu", memory_format=memory_format)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = OnGpu(self.held.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with Operations():  # where a thread is not in one already
            return func(*args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(picked(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(picked(index), value)

    __torch_function__ = torch._C._disabled_torch_function_impl


# The CPU is slow in half precision, and a GPU sums in single: so do these, whose inputs are of one
# precision on a GPU.
SUMS = {
    "convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "native_layer_norm",
    "native_group_norm", "native_layer_norm_backward", "native_group_norm_backward",
}  # fmt: skip
ASKS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2",
        "unique_dim", "unique_consecutive", "bincount"}  # fmt: skip
PICKS = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def leaves_of(x: Any) -> list[Any]:
    """What lists, tuples and the like hold (torch's own pytree takes longer than the kernels)."""
    if isinstance(x, dict):
        x = tuple(x.values())
    if not isinstance(x, list | tuple):
        return [x]
    return [leaf for part in x for leaf in leaves_of(part)]


def changed(how: Callable[[Any], Any], x: Any) -> Any:
    """The same with every leaf changed."""
    if isinstance(x, dict):
        return {name: changed(how, part) for name, part in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(changed(how, part) for part in x)
    return how(x)


def unwrapped(x: Any) -> Any:
    return x.held if isinstance(x, OnGpu) else x


class Operations(TorchDispatchMode):
    """Each operation, below autograd: by the CPU, where the GPU's rules allow it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch would import its compiler: seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        leaves = leaves_of((args, kwargs))
        here = any(isinstance(x, OnGpu) for x in leaves)
        there = is_gpu(kwargs["device"]) if kwargs.get("device") is not None else here
        kwargs.pop("pin_memory", None)
        if name == "_pin_memory":
            return args[0].clone()
        if not here and not there:
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return SDPBackend.MATH.value
        self._check(name, leaves, args, here)
        plain_args, plain_kwargs = changed(unwrapped, (args, kwargs))
        if kwargs.get("device") is not None:
            plain_kwargs["device"] = torch.device("cpu")
        if name == "copy_":
            return self._copy(args, plain_args, kwargs)
        if name == "_to_copy" and here != there and not (there and kwargs.get("non_blocking")):
            wait("a plain copy between host and GPU")
        if name in ASKS or (name == "index" and _by_mask(args)):
            wait(f"{name} asks for a value")
        found = self._compute(name, func, plain_args, plain_kwargs)
        if not there:
            return found
        known = {id(unwrapped(x)): x for x in leaves if isinstance(x, OnGpu)}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return known[id(x)] if id(x) in known else OnGpu(x)

        return changed(wrapped, found)

    def _check(self, name: str, leaves: list[Any], args: tuple[Any, ...], here: bool) -> None:
        """What a GPU refuses, or waits for."""
        for x in leaves:
            if isinstance(x, torch.Generator):  # there are no others
                raise RuntimeError(f"{name}: a generator of the CPU for a tensor of cuda")
        others = [
            x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnGpu) and x.dim()
        ]
        if not here or not others or name in ("copy_", "_to_copy"):
            return
        picks = args[1] if name in PICKS and isinstance(args[0], OnGpu) else ()
        if len(others) != sum(isinstance(x, Tensor) and not isinstance(x, OnGpu) for x in picks):
            shapes = [(x.device.type, tuple(x.shape)) for x in leaves if isinstance(x, Tensor)]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device: {shapes}")
        wait("rows of a GPU picked by the CPU's numbers")

    def _copy(self, args: tuple[Any, ...], plain: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """self.copy_(src, non_blocking)"""
        to, other = args[0], args[1]
        soon = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if isinstance(to, OnGpu) != isinstance(other, OnGpu) and other.dim() and not soon:
            wait("a plain copy between host and GPU")
        if soon and not isinstance(to, OnGpu):
            State.copies.append((to, plain[1].clone()))
            return to.fill_(float("nan") if to.is_floating_point() else 1)
        plain[0].copy_(plain[1])
        return to

    def _compute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name == "_efficientzerotensor":
            return torch.zeros(*args, dtype=kwargs.get("dtype"))
        kinds = {
            x.dtype for x in leaves_of(args) if isinstance(x, Tensor) and x.is_floating_point()
        }
        if name == "mm" and args[0].numel() >= 1 << 26:
            return torch.empty_like(args[0])  # its rate is measured, and says nothing here
        if name not in SUMS or not kinds.intersection(HALF):
            return func(*args, **kwargs)
        if len(kinds) > 1:
            raise RuntimeError(f"{name}: expected one dtype, found {kinds}")

        def half(x: Any) -> Any:
            return x.to(*kinds) if isinstance(x, Tensor) and x.dtype == torch.float32 else x

        def single(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x

        return changed(half, func(*changed(single, args), **changed(single, kwargs)))


def _by_mask(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, OnGpu) and x.dtype == torch.bool for x in args[1])


# What autocast makes of them on a GPU: the lower precision, or the higher
LOWER = [(F, "linear"), (F, "conv2d"), (F, "scaled_dot_product_attention"), (torch, "conv2d"),
         (torch, "matmul"), (torch, "mm"), (torch, "bmm"), (torch, "baddbmm"), (torch, "addmm"),
         (torch, "einsum"), (Tensor, "matmul"), (Tensor, "__matmul__")]  # fmt: skip
HIGHER = [(F, "layer_norm"), (F, "group_norm"), (F, "softmax"), (F, "log_softmax"),
          (F, "cross_entropy"), (F, "mse_loss"), (torch, "softmax"), (torch, "exp"), (torch, "log"),
          (Tensor, "softmax"), (Tensor, "pow"), (Tensor, "sum"), (Tensor, "norm")]  # fmt: skip


def cast(func: Callable[..., Any], lower: bool) -> Callable[..., Any]:
    """`func`, for autocast of a GPU, which C++ does not know of such tensors."""

    def casting(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cuda"):
            return func(*args, **kwargs)
        to = torch.get_autocast_dtype("cuda") if lower else torch.float32

        def one(x: Any) -> Any:
            floats = isinstance(x, OnGpu) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(to) if floats else x

        return func(*changed(one, args), **changed(one, kwargs))

    return casting


def picked(index: Any) -> Any:
    """An index whose lists of numbers are on the GPU, as torch copies them to it."""
    if isinstance(index, tuple):
        return tuple(map(picked, index))
    return torch.tensor(index).to(GPU) if isinstance(index, list) else index


class Functions(TorchFunctionMode):
    """`torch.tensor(..., device="cuda")`, which torch would fill below all that is pretended."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and is_gpu(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(GPU)
        return func(*args, **kwargs)


class Event:
    """Of a stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None:
        wait("an event is waited for")


def moved(
    to: Callable[..., Tensor], self: Tensor, *args: Any, copy: bool = False, **kwargs: Any
) -> Tensor:
    """`Tensor.to`, whose devices are those that Python sees."""
    if (args and isinstance(args[0], Tensor)) or "other" in kwargs:
        other = kwargs.get("other", args[0] if args else None)
        device, dtype, soon, layout = other.device, other.dtype, False, None
    else:
        device, dtype, soon, layout = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype, layout = device or self.device, dtype or self.dtype, layout or KEEP
    if is_gpu(device) == isinstance(self, OnGpu):
        return to(self, dtype, copy=copy, memory_format=layout)
    device = GPU if is_gpu(device) else device
    return torch.ops.aten._to_copy(
        self, device=device, dtype=dtype, non_blocking=soon, memory_format=layout
    )


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside, torch finds one GPU of 80 GiB."""
    stream = SimpleNamespace(synchronize=lambda: wait("a stream is waited for"))
    facts = SimpleNamespace(total_memory=80 << 30, name="pretended", major=9, minor=0)
    capturing = SimpleNamespace(is_capturing=lambda: False)
    of_cuda: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "set_device": lambda *a: None, "current_device": lambda: 0, "Event": Event,
        "synchronize": lambda *a: wait("the GPU is waited for"),
        "current_stream": lambda *a: stream, "get_device_properties": lambda *a: facts,
        "get_device_name": lambda *a: facts.name, "get_device_capability": lambda *a: (9, 0),
        "max_memory_allocated": lambda *a: 0, "memory_allocated": lambda *a: 0,
        "memory_reserved": lambda *a: 0, "mem_get_info": lambda *a: (78 << 30, 80 << 30),
        "reset_peak_memory_stats": lambda *a: None,
        "get_rng_state": lambda *a: torch.random.get_rng_state(),
        "set_rng_state": lambda state, *a: torch.random.set_rng_state(state),
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda *a, **k: True, "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    of_accelerator: dict[str, Any] = {
        "is_available": lambda *a: False, "current_device_index": lambda: 0,
        "current_stream": lambda *a: capturing,
    }  # fmt: skip
    replaces = torch.__future__
    known = replaces.get_overwrite_module_params_on_conversion()
    to, start = torch.Tensor.to, threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with Functions(), Operations():
            start(thread)

    with ExitStack() as stack:
        for room, names in ((torch.cuda, of_cuda), (torch.accelerator, of_accelerator)):
            stack.enter_context(patch.multiple(room, **names))
        for calls, lower in ((LOWER, True), (HIGHER, False)):
            for owner, name in calls:
                made = cast(getattr(owner, name), lower)
                stack.enter_context(patch.object(owner, name, made))
        stack.enter_context(
            patch.object(torch.Tensor, "to", lambda x, *a, **k: moved(to, x, *a, **k))
        )
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda x, *a: x.clone()))
        stack.enter_context(patch.object(threading.Thread, "run", run))
        stack.callback(replaces.set_overwrite_module_params_on_conversion, known)
        replaces.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Functions())
        stack.enter_context(Operations())
        yield


@contextmanager
def no_waits(but: int = 0) -> Iterator[None]:
    """Inside, to make the host wait for the GPU (more than `but` times) raises HostWaits."""
    State.waits = but
    try:
        yield
    finally:
        State.waits = None


def on_the_cpu() -> AbstractContextManager[None]:
    """Where the CPU computes as `pretend_gpu` does: attention by its plain kernel."""
    return sdpa_kernel(SDPBackend.MATH)


MACHINES = {"gpu": pretend_gpu, "cpu": on_the_cpu}  # by what TEST_MACHINE says to tests/preloaded
