# SPDX-License-Identifier: Apache-2.0
"""A CUDA device that is not there, for a process of its own: ``import cuda_stand_in`` comes before everything else.

Its tensors say ``cuda:0`` and hold CPU memory; ops on them run on the CPU, Triton's launches in its interpreter, by the tables
of an H100. What a GPU refuses is refused: ops between devices, CPU tensors and odd arguments in a launch, the CPU's random
generators; and, while a graph is captured or ``set_sync_debug_mode("error")`` holds, whatever waits for the device. A replay
runs again what was captured. Code under test runs ``with DEVICE:``.
"""

import contextlib
import inspect
import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.experimental.gluon  # noqa: F401  (asks for the variable, and is imported late otherwise)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

CUDA = torch.device("cuda", 0)
STATE = SimpleNamespace(captured=None, debug="default", pinned=set(), launches=0)
PROPERTIES = SimpleNamespace(
    name="a stand-in",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=4,
    shared_memory_per_block_optin=227 * 1024,
    L2_cache_size=1 << 16,
)
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2")


class CudaTensor(torch.Tensor):
    """To C++ it lies on the CPU, whose autograd then serves it; to Python on the GPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cpu",
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **options):
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        waits("tolist")
        return self.held.tolist()

    def numpy(self, *args, **options):
        raise TypeError("can't convert a CUDA tensor to numpy")


class Device(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


DEVICE = Device()


def waits(what: str) -> None:
    if STATE.captured is not None or STATE.debug == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def held(x):
    return x.held if isinstance(x, CudaTensor) else x


def on_cuda(x):
    return CudaTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor) else x


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def remember(func, args, kwargs, result) -> None:
    if STATE.captured is not None:
        STATE.captured.append((func, args, kwargs, result))


def dispatch(func, args, kwargs):
    name = func.name().split(".")[0].split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, CudaTensor)]
    if not there and not is_cuda(kwargs.get("device")):
        return _on_the_cpu(func, name, args, kwargs)
    if name == "is_pinned":
        return False
    if name == "_to_copy":
        return _copy_to(args[0], **kwargs)
    here = [x for x in tensors if not isinstance(x, CudaTensor) and x.ndim]
    if here and torch._C._current_graph_task_id() != -1:  # zeros that autograd makes where there is no gradient
        args, kwargs, here = *tree_map(on_cuda, (args, kwargs)), []
    if name == "copy_":
        if here:
            waits(f"copy of {tuple(args[1].shape)}")
    elif here and not (name.startswith(("index", "_index_put")) and isinstance(args[0], CudaTensor)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({func})")
    elif here or name in WAITING:
        waits(name)
    if any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if func.namespace == "kvcompact":
        with DEVICE:
            return _kernels()[name](*args, **kwargs)
    plain, options = tree_map(held, (args, kwargs))
    options.pop("pin_memory", None)
    if "device" in options:
        options["device"] = "cpu"
    result = func(*plain, **options)
    if func._schema.is_mutable or not any(r.alias_info for r in func._schema.returns):
        remember(func, plain, options, result)
    if not tree_leaves(result) or not isinstance(tree_leaves(result)[0], torch.Tensor):
        return result
    result = tree_map(on_cuda, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there else result


def _on_the_cpu(func, name, args, kwargs):
    if name == "is_pinned":
        return args[0].untyped_storage().data_ptr() in STATE.pinned
    if name in ("_pin_memory", "pin_memory") or kwargs.get("pin_memory"):
        result = args[0].clone() if "pin" in name else func(*args, **{**kwargs, "pin_memory": False})
        STATE.pinned.add(result.untyped_storage().data_ptr())
        return result
    return func(*args, **kwargs)


def _copy_to(x, device=None, non_blocking=False, **options):
    options.pop("pin_memory", None)
    if isinstance(x, CudaTensor) and torch._C._current_graph_task_id() != -1:
        device = None  # the gradient of a cast goes to where C++ believes that its input lies
    target = x.device if device is None else torch.device(device)
    pinned = not isinstance(x, CudaTensor) and x.untyped_storage().data_ptr() in STATE.pinned
    if isinstance(x, CudaTensor) != is_cuda(target) and not (pinned and non_blocking):
        waits(f"copy of {tuple(x.shape)} to {target}")
    result = torch.ops.aten._to_copy.default(held(x), **options)
    remember(torch.ops.aten._to_copy.default, (held(x),), options, result)
    return CudaTensor(result) if is_cuda(target) else result


def _kernels():
    """What the registered ops run on a GPU."""
    from sys import modules

    found = {}
    for op, name in (
        ("compact_attention", "compact_attention"),
        ("key_scores", "key_scores"),
        ("still_compaction", "still_cross_attention"),
    ):
        module = modules[f"kvcompact_kernels.ops.{op}"]
        found[name], found[f"{name}_backward"] = module.triton.forward, module._backward_op._init_fn
    return found


class Stream:
    def wait_stream(self, other):
        pass


class CUDAGraph:
    def replay(self):
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            if result is None or func._schema.is_mutable:
                continue
            for x, y in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(x, torch.Tensor):
                    x.copy_(y)


@contextlib.contextmanager
def graph(of, **options):
    of.steps = STATE.captured = []
    try:
        yield
    finally:
        STATE.captured = None


def launch(kernel, grid):
    """``kernel[grid]``: checks what a compiled kernel would be given, and interprets."""
    parameters = inspect.signature(kernel.fn).parameters

    def call(*args, **kwargs):
        name = kernel.fn.__name__
        STATE.launches += 1
        if not all(isinstance(n, int) and 0 < n < 1 << 31 for n in grid):
            raise AssertionError(f"{name} has grid {grid}")
        given = dict(zip(parameters, args)) | kwargs
        for parameter, value in given.items():
            if parameter in ("num_warps", "num_stages"):
                continue
            constant = "constexpr" in str(parameters[parameter].annotation)
            allowed = (int, bool) if constant else (CudaTensor, int, float)
            if type(value) not in allowed:
                raise AssertionError(
                    f"{name}: {parameter} is {type(value).__name__}, a tensor on the CPU or an odd value"
                )
        plain, options = tree_map(held, (args, kwargs))

        def run():
            with _disable_current_modes():
                INTERPRET(kernel, grid)(*plain, **options)

        run()
        remember(run, (), {}, None)

    return call


INTERPRET = InterpretedFunction.__getitem__
InterpretedFunction.__getitem__ = launch
TO, TENSOR = torch.Tensor.to, torch.tensor


def to(self, *args, copy=False, **kwargs):
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if not isinstance(self, CudaTensor) and not is_cuda(device):
        return TO(self, *args, copy=copy, **kwargs)
    if (
        isinstance(self, CudaTensor)
        and (device is None or is_cuda(device))
        and dtype in (None, self.dtype)
        and not copy
    ):
        return self
    with DEVICE:
        return torch.ops.aten._to_copy.default(self, dtype=dtype, device=device or CUDA, non_blocking=non_blocking)


def tensor(data, *, device=None, **options):
    made = TENSOR(data, **options)
    return to(made, CUDA) if is_cuda(device) else made


@contextlib.contextmanager
def nothing(*args):
    yield


def _install():
    torch.Tensor.to, torch.tensor = to, tensor
    torch.Tensor.cuda, torch.Tensor.cpu = (lambda self, device=None: to(self, CUDA)), (lambda self: to(self, "cpu"))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: CUDA,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "is_current_stream_capturing": lambda: STATE.captured is not None,
        "set_sync_debug_mode": lambda mode: setattr(STATE, "debug", mode),
        "synchronize": lambda device=None: waits("synchronize"),
        "device": nothing,
        "stream": nothing,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)


_install()

import kvcompact_kernels.ops  # noqa: F401
from kvcompact_kernels.backends.triton import runtime
from kvcompact_kernels.backends.triton.kernels import (  # noqa: F401
    attention_backward,
    attention_forward,
    key_scores,
    pack,
    still_backward,
    still_cross_attention,
)

runtime.interpreted = lambda: True  # the arithmetic of the kernels; everything else takes this for a GPU
del os.environ["TRITON_INTERPRET"]
