"""A CUDA device that is not there, for a machine and a PyTorch without one: `with PretendCuda() as gpu`.

A tensor asked for on cuda:0 is a CPU tensor whose storage is marked; of these `device` and `is_cuda` say CUDA, so that
the code under test takes its CUDA branches, with real numbers and autograd. What a GPU would refuse is raised: operands
on two devices, and while a graph is recorded all that waits for the device or is copied to it, and a generator that the
graph does not know. A recording computes nothing; a replay does, operation by operation, into the memory recorded.

gpu.waits: where the host waited, and how often. gpu.recorded: what the last recording launches, kernels by name, about
as a GPU would. Results of attention have the strides that CUDA's kernels return. Not seen: the numerics and speed of
kernels, memory, Triton, NCCL, streams.
"""

import contextlib
import traceback
from collections import Counter
from unittest import mock

import torch
import torch.nn.functional as F
import torch.nn.utils.clip_grad as clip_grad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount"}
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view", "detach", "lift_fresh"}


@torch.library.custom_op("pretend_cuda::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return F.rms_norm(x, shape, weight, eps)


class Refused(RuntimeError):
    """What a GPU, or the recording of a graph, would not do."""


def names_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class PretendCuda(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.marks: dict[int, StorageWeakRef] = {}
        self.waits, self.recorded = Counter(), None
        self.making = False  # a tensor on cuda:0 out of none
        self.graph = None  # that is being recorded

    def on(self, x) -> bool:
        while torch._C._functorch.is_functorch_wrapped_tensor(x):  # vmap's
            x = torch._C._functorch.get_unwrapped(x)
        ref = self.marks.get(x.untyped_storage()._cdata)
        return ref is not None and not ref.expired()

    def mark(self, x):
        if isinstance(x, torch.Tensor):
            self.marks[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
        return x

    def wait(self, what: str) -> None:
        if self.graph is not None:
            raise Refused(f"{what} while a graph is recorded")
        place = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__][-1]
        self.waits[f"{place.filename.rsplit('/', 1)[-1]}, {place.name}: {what}"] += 1

    # Operators, those of the backward pass too

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not self.making and not any(map(self.on, tensors)):
            return op(*args, **kwargs)
        if not isinstance(op, torch._ops.OpOverload):  # flex_attention, as written
            return tree_map(self.mark, op(*args, **kwargs))
        name = op._schema.name.removeprefix("aten::")
        self.check(name, args, kwargs, [x for x in tensors if not self.on(x) and x.dim()])
        out = self.run(op, name, args, kwargs)
        return out if name == "copy_" and not self.on(args[0]) else tree_map(self.mark, out)

    def check(self, name: str, args, kwargs, others: list) -> None:
        """others: operands that are not on cuda:0, but for scalars."""
        indices = args[1] if "index" in name and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        indices = [x for x in indices if x is not None]
        if any(x.dtype == torch.bool for x in indices) and (name == "index" or args[2].numel() > 1):
            self.wait(f"{name} by a mask")
        if not all(map(self.on, indices)):
            self.wait(f"{name} by an index on the CPU")
        others = [x for x in others if all(x is not index for index in indices)]
        if name in READS:
            self.wait(name)
        elif others and name not in ("copy_", "_to_copy"):
            raise Refused(f"{name}: operands on cuda:0 and on the CPU, these of {[tuple(x.shape) for x in others]}")
        elif others and not (kwargs.get("non_blocking") or (*args, None, None)[2] is True):
            self.wait("copy between devices")

    def run(self, op, name: str, args, kwargs):
        if op.is_view or name in NO_KERNEL:
            return op(*args, **kwargs)
        generators = [] if self.graph is None else self.graph.generators
        states = [generator.get_state() for generator in generators]
        if self.graph is not None and op._schema.is_mutable:  # what it writes to must stay as it is
            given = dict(zip((a.name for a in op._schema.arguments), args)) | kwargs
            out = tuple(given[a.name] for a in op._schema.arguments if a.alias_info and a.alias_info.is_write)
            out = out[0] if len(out) == 1 else out
        else:
            out = op(*args, **kwargs)
        for generator, state in zip(generators, states):
            generator.set_state(state)
        if name.startswith("_scaled_dot_product"):  # (B, Q, H, C) in memory
            out = (out[0].transpose(1, 2).contiguous().transpose(1, 2), *out[1:])
        if self.graph is not None:
            self.graph.ops.append((op, args, kwargs, None if op._schema.is_mutable else out))
            self.recorded[name] += 1
            self.recorded["contiguous"] += name in ("roll", "pretend_cuda::rms_norm") and not args[0].is_contiguous()
        return out

    # torch.cuda, as far as it is used

    def __enter__(self):
        gpu, empty, self.stack = self, torch.empty, contextlib.ExitStack()

        class Graph:
            def __init__(self):
                self.ops, self.generators = [], []
                self.register_generator_state = self.generators.append

            def replay(self) -> None:
                with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                    for op, args, kwargs, out in self.ops:
                        new = op(*args, **kwargs)
                        for old, value in zip(tree_leaves(out), tree_leaves(new)):
                            if isinstance(old, torch.Tensor):
                                old.copy_(value)

        @contextlib.contextmanager
        def recording(graph, pool=None, stream=None):
            gpu.graph, gpu.recorded = graph, Counter()
            try:
                yield
            finally:
                gpu.graph = None

        fakes = {"CUDAGraph": Graph, "graph": recording, "device": lambda device: contextlib.nullcontext()}
        fakes |= {name: mock.MagicMock() for name in ("Stream", "Event", "current_stream", "graph_pool_handle")}
        for name, fake in fakes.items():
            self.stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        self.stack.enter_context(mock.patch.object(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k)))
        # Clipping groups gradients by device in C++, which knows better.
        patch = mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", self.grouped)
        self.stack.enter_context(patch)
        super().__enter__()
        self.stack.enter_context(_Functions(self))
        return self

    def grouped(self, lists, group=clip_grad._group_tensors_by_device_and_dtype):
        return {(tensors[0][0].device, dtype): (tensors, at) for (_, dtype), (tensors, at) in group(lists).items()}

    def __exit__(self, *error):
        self.stack.close()
        return super().__exit__(*error)


class _Functions(TorchFunctionMode):
    """What is asked of a tensor, and what makes one, where Python still sees the device that is named."""

    def __init__(self, gpu: PretendCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, x = self.gpu, dict(kwargs or {}), args[0] if args and isinstance(args[0], torch.Tensor) else None
        ours = x is not None and gpu.on(x)
        if func == torch.Tensor.device.__get__:
            return CUDA if ours else torch.device("cpu")
        if func == torch.Tensor.is_cuda.__get__:
            return ours
        if func is torch.Tensor.pin_memory:
            if any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride())):
                raise Refused("pin_memory: elements of the tensor share memory")
            return x.clone()
        if ours and func in (torch.Tensor.tolist, torch.Tensor.numpy):
            gpu.wait(func.__name__)
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(func, x, ours, args[1:], kwargs)
        if ours and func is F.rms_norm and not torch.is_grad_enabled():  # one kernel, of which the CPU makes six
            return rms_norm(*args, **kwargs)
        if ours and func is F.scaled_dot_product_attention:
            self.check_attention(*args[:3], **kwargs)
        if ours or names_cuda(kwargs.get("device")):
            self.check_generator(kwargs.get("generator"))
        if not names_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        if func is torch.tensor:
            gpu.wait("a tensor of the host's values")
        kwargs["device"], gpu.making = "cpu", func is not torch.tensor
        try:
            return gpu.mark(func(*args, **kwargs))
        finally:
            gpu.making = False

    def move(self, func, x, ours: bool, rest, kwargs):
        """x.to(...), which is seen here, or what goes to the CPU would be marked."""
        gpu, rest = self.gpu, (*rest, *kwargs.values())
        to = [a for a in rest if isinstance(a, (str, torch.device))]
        to = to[0] if to else {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: CUDA}.get(func, CUDA if ours else "cpu")
        dtypes = [
            a.dtype if isinstance(a, torch.Tensor) else a for a in rest if isinstance(a, (torch.Tensor, torch.dtype))
        ]
        x = x.to(dtypes[0]) if dtypes else x
        if ours == names_cuda(to):
            return x
        if ours or gpu.graph is not None or not kwargs.get("non_blocking"):
            gpu.wait(f"a copy to {torch.device(to).type}")
        if not ours:
            return gpu.mark(x.clone())
        with torch._C._DisableTorchDispatch():
            return x.clone()

    def check_attention(self, q, k, v, attn_mask=None, is_causal=False, enable_gqa=False) -> None:
        """On CUDA only kernels for half precision without a mask know groups of heads; any other case would take the
        slow one, with all Q x K scores in memory."""
        grouped = enable_gqa and q.shape[1] != k.shape[1]
        if grouped and (attn_mask is not None or q.dtype not in (torch.bfloat16, torch.float16)):
            raise Refused(f"attention of {q.dtype} over groups of heads, by the kernel that keeps all scores")

    def check_generator(self, generator) -> None:
        if generator is not None and generator.device.type != "cuda":
            raise Refused("a CPU generator for a tensor on cuda:0")
        if generator is not None and self.gpu.graph is not None and generator not in self.gpu.graph.generators:
            raise Refused("a generator that is not registered with the graph")


class CudaGenerator(torch.Generator):
    """A generator that says it is on CUDA; its numbers are the CPU's."""

    device = CUDA
