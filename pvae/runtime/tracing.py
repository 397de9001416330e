"""Tracing: a function of tensors becomes a graph that is replayed without the function's Python.

The function runs once under PyTorch's tracer (make_fx). Pyro's handlers, the checks and autograd's own passes leave a
flat list of tensor operations behind, forward and backward. That graph is replayed as it is, or compiled.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from pvae.runtime.torch_state import RandomState, no_validation

Tensors = tuple[Tensor, ...]
Outputs = tuple[Tensor | None, ...]
Layout = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device], ...]
Function = Callable[..., Outputs]

# Seconds that compiling takes, once and for each operation, and that it saves at each replay: for each operation, and
# for each byte between operations. Measured on two cores, see docs/benchmarks.md. Matrix products gain nothing.
COMPILING, COMPILING_EACH, SAVED_EACH, SAVED_BYTE = 10.0, 0.015, 7e-6, 5e-11
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward")


class CompileCost(NamedTuple):
    """Estimated seconds that compiling a graph takes once, and that it saves at each replay."""

    seconds: float
    saved: float


class TraceError(Exception):
    """A function can't be traced, or its graph can't be compiled; the message says why, in one line."""


def trace_function(function: Function, state: Sequence[Tensor], inputs: Sequence[Tensor]) -> GraphModule:
    """Trace ``function(*inputs)`` to a graph of tensor operations whose inputs are ``(*state, *inputs)``.

    The function is run for real, but the state and the random stream are restored.

    Arguments:
        function: tensors to a tuple of tensors or None. Its operations may depend on the shapes of its inputs, not on
            their values (`TraceError`); it may take gradients and draw random numbers.
        state: tensors that it reads besides, parameters and buffers; the graph reads them afresh at each replay.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(*tensors: Tensor) -> Outputs:
        return tuple(function(*tensors[len(state) :]))

    try:
        with restore_state(state), no_validation(), _one_fake_mode(), _NoValueAccess():
            return _clean_graph(make_fx(traced)(*state, *inputs))
    except TraceError:
        raise
    except Exception as error:  # the tracer, autograd, Pyro or the function itself: any kind
        raise TraceError(_reason(error)) from error


class _NoValueAccess(TorchFunctionMode):
    """Refuses functions that take values out of a tensor unseen by the tracer: they would become constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise TraceError(f"it reads a tensor's values by {func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def restore_state(state: Sequence[Tensor]) -> Iterator[None]:
    """Restore the random state, and all buffers of up to a million elements, when the block ends."""
    # Larger ones, such as tables of rows, are taken to be read only: a copy might not fit beside them.
    buffers = [t for t in state if not t.requires_grad and t.numel() <= 1_000_000]
    stream, before = RandomState(), [t.clone() for t in buffers]
    try:
        yield
    finally:
        stream.restore()
        with torch.no_grad():
            for tensor, value in zip(buffers, before, strict=True):
                tensor.copy_(value)


def _one_fake_mode() -> AbstractContextManager[Any]:
    """Let the tracer use one fake-tensor mode for all tensors: one for each takes half of the tracing time."""
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode

        return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    except (ImportError, TypeError):  # a private interface: without it tracing is slower
        return nullcontext()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _clean_graph(graph: GraphModule) -> GraphModule:
    """Remove operations without effect and replace constant indices by buffers; draws stay where they are."""
    for node in filter(_shaped_by_values, list(graph.graph.nodes)):
        if not _is_constant(node):
            raise TraceError(f"the shape of what {node.target} gives depends on values")
        graph.register_buffer(f"fixed_{node.name}", _constant_value(graph, node))
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"fixed_{node.name}"))
    for node in reversed(graph.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not _has_side_effect(node):
            graph.graph.erase_node(node)
    graph.meta["compile_cost"] = _compile_cost(graph.graph)
    for node in graph.graph.nodes:
        node.meta.clear()  # of tensors that only the tracer knew
    graph.recompile()
    return graph


def _compile_cost(graph: Graph) -> CompileCost:
    operations = [node for node in graph.nodes if node.op == "call_function"]
    bytes_between = 0
    for node in operations:
        schema, value = getattr(node.target, "_schema", None), node.meta.get("val")
        is_view = schema and schema.returns and schema.returns[0].alias_info
        if schema and not is_view and schema.name not in PRODUCTS and isinstance(value, Tensor):
            bytes_between += value.numel() * value.element_size()
    seconds = COMPILING + COMPILING_EACH * len(operations)
    return CompileCost(seconds, SAVED_EACH * len(operations) + SAVED_BYTE * bytes_between)


def _shaped_by_values(node: Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    # Indices give a shape that is known, a mask does not.
    indices = [n.meta["val"].dtype for n in node.all_input_nodes[1:]]
    return node.target != torch.ops.aten.index.Tensor or torch.bool in indices


def _is_constant(node: Node) -> bool:
    """Whether a value depends on no input, as masks do."""
    return node.op == "get_attr" or (node.op == "call_function" and all(map(_is_constant, node.all_input_nodes)))


def _constant_value(graph: GraphModule, node: Node) -> Tensor:
    if node.op == "get_attr":
        return getattr(graph, str(node.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda inner: _constant_value(graph, inner))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _has_side_effect(node: Node) -> bool:
    """Whether an operation writes into a tensor or draws."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and not node.target.__module__.startswith("_operator")
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> Function:
    """Compile a graph by Inductor for inputs of these shapes; the graph is used up."""
    import torch._inductor as inductor

    try:
        with torch.no_grad(), _silent():
            # Random numbers are drawn by PyTorch's own generator, as in the function itself.
            options = {"fallback_random": True, "cpp_wrapper": True}
            return inductor.compile(graph, [t.detach() for t in inputs], options=options)
    except Exception as error:  # a missing compiler, a bug of Inductor's: any kind
        raise TraceError(_reason(error)) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Silence Inductor's warnings of operations that it leaves to PyTorch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _layout(inputs: Sequence[Tensor]) -> Layout:
    """Return what a graph is valid for: views in it may depend on strides too."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)


class TracedFunction:
    """Function of tensors that is traced once for each layout of its inputs and replayed from then on.

    Replays draw from the random stream as the function does and give its own values: to the bit, except that
    compiled ones round differently.

    Arguments:
        function: see `trace_function`.
        modules: whose parameters and buffers it reads. They may change in place between calls, not be replaced.
        compile: compile the graph of the first layout; those of others, such as a last batch's, are replayed.

    >>> double = TracedFunction(lambda x: (2 * x,))
    >>> double(torch.ones(2))[0]
    tensor([2., 2.])
    """

    def __init__(self, function: Function, *modules: nn.Module, compile: bool = False) -> None:
        self.function, self.compile = function, compile
        self.modules = [inner for m in modules for inner in m.modules()]
        # Masks are left to be constants: shapes may depend on them.
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers()) if t.dtype != torch.bool]
        self.state = list({id(t): t for t in tensors}.values())
        self.graphs: dict[Layout, Function] = {}

    def __call__(self, *inputs: Tensor) -> Outputs:
        key = _layout(inputs)
        graph = self.graphs.get(key) or self.graphs.setdefault(key, self._trace(inputs))
        with torch.no_grad():
            return graph(*(t.detach() for t in self.state), *inputs)

    def _trace(self, inputs: Sequence[Tensor]) -> Function:
        buffers = [(m._buffers, name, buffer) for m in self.modules for name, buffer in m._buffers.items()]
        graph = trace_function(self.function, self.state, inputs)
        replaced = [(owner, name, buffer) for owner, name, buffer in buffers if owner[name] is not buffer]
        for owner, name, buffer in replaced:
            owner[name] = buffer
        if replaced:
            raise TraceError(f"buffer '{replaced[0][1]}' is replaced where it should be written into")
        if self.graphs:
            return graph
        self.compile_cost: CompileCost = graph.meta["compile_cost"]
        return compile_graph(graph, [*self.state, *inputs]) if self.compile else graph


@dataclass
class _Replay:
    """State of the calls with inputs of one layout."""

    compile_at: int  # number of the call at which to trace the function, then to compile it
    calls: int = 0
    graph: Callable[..., Tensors] | None = None  # validated; None as long as the function itself is called
    candidate: tuple[Callable[..., Tensors], CompileCost] | None = None  # to validate at the next call


class AutoTraced:
    """Function of tensors that is traced after some calls and replayed from then on, where it can be traced.

    After so many replays that compiling would have paid by then the graph is compiled; until then values are the
    function's to the bit. A graph is validated at the next call: one that gives other values is not used.

    Arguments:
        function: see `trace_function`; it must not depend on values nor remember anything. Tensors that it reads
            besides its inputs may change in place between calls, not be replaced.
        after: calls with inputs of one layout before these are traced; tracing takes as long as some fifty of them.

    >>> double = AutoTraced(lambda x: (2 * x,), after=1)
    >>> [double(torch.full((1,), float(k)))[0].item() for k in range(4)]
    [0.0, 2.0, 4.0, 6.0]
    """

    def __init__(self, function: Callable[..., Tensors], *, after: int = 30) -> None:
        self.function, self.after = function, after
        self.replays: dict[Layout, _Replay] = {}

    def __call__(self, *inputs: Tensor) -> Tensors:
        replay = self.replays.setdefault(_layout(inputs), _Replay(self.after + 1))
        replay.calls += 1
        if replay.candidate is not None:
            return self._validate(replay, inputs)
        if replay.calls == replay.compile_at and not _is_tracing():
            self._propose(replay, inputs)
        if replay.graph is None:
            return self.function(*inputs)
        with torch.no_grad():
            return replay.graph(*inputs)

    def _propose(self, replay: _Replay, inputs: Sequence[Tensor]) -> None:
        """Trace the function, or compile it if its graph is in use already."""
        with suppress(TraceError, torch.OutOfMemoryError):
            graph = trace_function(self.function, (), inputs)
            cost = graph.meta["compile_cost"]
            compiled: Any = graph if replay.graph is None else compile_graph(graph, inputs)
            replay.candidate = compiled, cost

    def _validate(self, replay: _Replay, inputs: Sequence[Tensor]) -> Tensors:
        """Call the function and the candidate on inputs that it was not traced with; adopt it if they agree."""
        assert replay.candidate is not None
        (graph, cost), replay.candidate = replay.candidate, None
        before = RandomState()
        with torch.no_grad():
            replayed = graph(*inputs)
        before.restore()
        expected = self.function(*inputs)
        if all(map(_all_close, replayed, expected)):
            if replay.graph is None:
                replay.compile_at = replay.calls + math.ceil(cost.seconds / max(cost.saved, 1e-9))
            replay.graph = graph
        return expected


def _all_close(one: Tensor, other: Tensor) -> bool:
    largest = torch.where(other.isfinite(), other, 0).abs().max().item() if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * largest, equal_nan=True)


def _is_tracing() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
