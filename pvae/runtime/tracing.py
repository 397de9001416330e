"""Recording: what a function does to tensors, kept and done again without the Python that did it.

A function is run once under PyTorch's tracer. Pyro's handlers, the checks and autograd's own passes leave a flat list
of tensor operations behind, forward and backward. That list is replayed as it is, or compiled.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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

# Buffers of more numbers, such as tables of rows, are taken to be read only: a copy might not fit beside them.
MAX_RESTORED_SIZE = 1_000_000

# What compiling takes once, in seconds, and saves at each replay: by operation, and by byte that they pass on to each
# other. Measured on two cores, see docs/benchmarks.md. Matrix products gain nothing.
COMPILING, COMPILING_EACH, SAVED_EACH, SAVED_BYTE = 10.0, 0.015, 7e-6, 5e-11
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward")

# Random numbers are drawn by PyTorch's own generator, as in the function itself; its wrapper is C++ too.
INDUCTOR = {"fallback_random": True, "cpp_wrapper": True}


class CompileCost(NamedTuple):
    """What a graph's compiling is thought to take once, and to save at each replay, in seconds."""

    cost: float
    saved: float


class TraceError(Exception):
    """A function can't be recorded or its recording can't be compiled; the message says why, in one line."""


def trace_function(function: Function, state: Sequence[Tensor], inputs: Sequence[Tensor]) -> GraphModule:
    """What ``function(*inputs)`` does, as a graph of tensor operations whose inputs are ``(*state, *inputs)``.

    Arguments:
        function: tensors to a tuple of tensors or None. What it does must not depend on their values, but on
            their shapes alone; it may take gradients and draw random numbers.
        state: tensors that it reads besides, parameters and buffers; the graph reads them afresh at each replay.
        inputs: an example of its inputs.

    The function is run for real, but the state and the random stream stay where they were.

    Raises:
        TraceError: it looks at values, or does what the tracer does not know.

    >>> weight = torch.ones(2)
    >>> graph = trace_function(lambda x: ((weight * x).sum(),), [weight], [torch.ones(2)])
    >>> graph(2 * weight, torch.ones(2))[0]
    tensor(4.)
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(*tensors: Tensor) -> Outputs:
        return tuple(function(*tensors[len(state) :]))

    try:
        with restore_state(state), no_validation(), _one_fake_mode(), _NoValueAccess():
            return _remove_detach(make_fx(traced)(*state, *inputs))
    except TraceError:
        raise
    except Exception as error:  # the tracer, autograd, Pyro or the function itself: any kind
        raise TraceError(_reason(error)) from error


class _NoValueAccess(TorchFunctionMode):
    """Refuses what takes values out of a tensor without the tracer's notice: they would be kept for good."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise TraceError(f"it reads a tensor's values by {func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def restore_state(state: Sequence[Tensor]) -> Iterator[None]:
    """Run a block whose draws, and whose writes into small buffers, are taken back."""
    buffers = [t for t in state if not t.requires_grad and t.numel() <= MAX_RESTORED_SIZE]
    stream, before = RandomState(), [t.clone() for t in buffers]
    try:
        yield
    finally:
        stream.restore()
        with torch.no_grad():
            for tensor, value in zip(buffers, before, strict=True):
                tensor.copy_(value)


def _one_fake_mode() -> AbstractContextManager[Any]:
    """Let the tracer describe all tensors in one place: one for each is half of a recording's time."""
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode

        return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    except (ImportError, TypeError):  # PyTorch's own affair: without it recording is slower
        return nullcontext()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _remove_detach(graph: GraphModule) -> GraphModule:
    """Without operations that nothing follows from, or that always give the same indices; draws stay where they are."""
    for node in filter(_shaped_by_values, list(graph.graph.nodes)):
        if not _is_constant(node):
            raise TraceError(f"the shape of what {node.target} gives depends on values")
        graph.register_buffer(f"fixed_{node.name}", _constant_value(graph, node))
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"fixed_{node.name}"))
    for node in reversed(graph.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not _has_side_effect(node):
            graph.graph.erase_node(node)
    graph.meta["worth"] = _compile_cost(graph.graph)
    for node in graph.graph.nodes:
        node.meta.clear()  # of tensors that only the tracer knew
    graph.recompile()
    return graph


def _compile_cost(graph: Graph) -> CompileCost:
    made = [node for node in graph.nodes if node.op == "call_function"]
    passed = 0
    for node in made:
        schema, value = getattr(node.target, "_schema", None), node.meta.get("val")
        own = schema and not (schema.returns and schema.returns[0].alias_info) and schema.name not in PRODUCTS
        passed += value.numel() * value.element_size() if own and isinstance(value, Tensor) else 0
    return CompileCost(COMPILING + COMPILING_EACH * len(made), SAVED_EACH * len(made) + SAVED_BYTE * passed)


def _shaped_by_values(node: Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    # Places by number give a shape that is known, a mask does not.
    picks = [n.meta["val"].dtype for n in node.all_input_nodes[1:]]
    return node.target != torch.ops.aten.index.Tensor or torch.bool in picks


def _is_constant(node: Node) -> bool:
    """Whether a value follows from tensors that are no inputs, as masks are."""
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
    """The graph as Inductor compiles it for inputs of these shapes; the graph is used up.

    Raises:
        TraceError: there is no C++ compiler, or the graph has what it can't compile.
    """
    import torch._inductor as inductor

    try:
        with torch.no_grad(), _silent():
            return inductor.compile(graph, [t.detach() for t in inputs], options=INDUCTOR)
    except Exception as error:  # a missing compiler, a bug of Inductor's: any kind
        raise TraceError(_reason(error)) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Inductor's remarks on operations that it leaves to PyTorch off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _layout(inputs: Sequence[Tensor]) -> Layout:
    """What a recording is good for: views in it may depend on strides too."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)


class TracedFunction:
    """A function of tensors that is recorded once for each shape of its inputs, and replayed from then on.

    Arguments:
        function: see `trace_function`.
        modules: whose parameters and buffers it reads. They may change in place between calls, not be replaced.
        compile: compile the recording of the first shape; those of others, such as a last batch's, are replayed.

    Attributes:
        worth: of compiling the first, once it is recorded.

    Replays draw from the random stream as the function does, and give its own values: to the bit, but that
    compiled ones round differently.

    Raises:
        TraceError: when it is called, see `trace_function` and `compile_graph`.

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
        self.plays: dict[Layout, Function] = {}

    def __call__(self, *inputs: Tensor) -> Outputs:
        key = _layout(inputs)
        if key not in self.plays:
            self.plays[key] = self._recorded(inputs)
        with torch.no_grad():
            return self.plays[key](*(t.detach() for t in self.state), *inputs)

    def _recorded(self, inputs: Sequence[Tensor]) -> Function:
        held = [(m._buffers, name, b) for m in self.modules for name, b in m._buffers.items()]
        graph = trace_function(self.function, self.state, inputs)
        replaced = [(buffers, name, b) for buffers, name, b in held if buffers[name] is not b]
        for buffers, name, b in replaced:
            buffers[name] = b
        if replaced:
            raise TraceError(f"buffer '{replaced[0][1]}' is replaced where it should be written into")
        if self.plays:
            return graph
        self.worth: CompileCost = graph.meta["worth"]
        return compile_graph(graph, [*self.state, *inputs]) if self.compile else graph


class AutoTraced:
    """A function of tensors that is called again and again: recorded once it was, itself where it can't be recorded.

    Arguments:
        function: see `trace_function`; it may depend on no values and remember nothing. Tensors that it reads
            besides may change in place between calls, not be replaced.
        after: calls with inputs of one shape that go by before these are recorded; recording takes as long as some
            fifty of them.

    Replays give the function's own values, to the bit. When there were so many that compiling would have paid by then
    the recording is compiled; from then on values round differently. What gives others at the next call is not used.

    >>> double = AutoTraced(lambda x: (2 * x,), after=1)
    >>> [double(torch.full((1,), float(k)))[0].item() for k in range(4)]
    [0.0, 2.0, 4.0, 6.0]
    """

    def __init__(self, function: Callable[..., Tensors], *, after: int = 30) -> None:
        self.function, self.after = function, after
        self.calls: Counter[Layout] = Counter()
        self.plays: dict[Layout, Callable[..., Tensors]] = {}
        self.due: dict[Layout, int] = {}
        self.trials: dict[Layout, tuple[Callable[..., Tensors], CompileCost]] = {}

    def __call__(self, *inputs: Tensor) -> Tensors:
        key = _layout(inputs)
        self.calls[key] += 1
        if key in self.trials:
            return self._tried(key, inputs, *self.trials.pop(key))
        if self.calls[key] == self.due.setdefault(key, self.after + 1) and not _is_tracing():
            self._make(key, inputs)
        return self._now(key, inputs)

    def _now(self, key: Layout, inputs: Sequence[Tensor]) -> Tensors:
        with torch.no_grad() if key in self.plays else nullcontext():
            return self.plays.get(key, self.function)(*inputs)

    def _make(self, key: Layout, inputs: Sequence[Tensor]) -> None:
        """Record the function, or compile what was recorded, for the next call to try."""
        with suppress(TraceError, torch.OutOfMemoryError):
            graph = trace_function(self.function, (), inputs)
            worth = graph.meta["worth"]
            made: Any = compile_graph(graph, inputs) if key in self.plays else graph
            self.trials[key] = made, worth

    def _tried(
        self, key: Layout, inputs: Sequence[Tensor], play: Callable[..., Tensors], worth: CompileCost
    ) -> Tensors:
        """By the function and by what was made of it, on inputs that this has not seen; kept if they agree."""
        before = RandomState()
        with torch.no_grad():
            found = play(*inputs)
        before.restore()
        expected = self.function(*inputs)
        if all(map(_all_close, found, expected)):
            if key not in self.plays:
                self.due[key] = self.calls[key] + math.ceil(worth.cost / max(worth.saved, 1e-9))
            self.plays[key] = play
        return expected


def _all_close(one: Tensor, other: Tensor) -> bool:
    largest = torch.where(other.isfinite(), other, 0).abs().max().item() if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * largest, equal_nan=True)


def _is_tracing() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
