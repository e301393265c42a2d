import torch
from torch import Tensor, fx, nn

from updp_hf.core.gates.gate import set_lambda_


def assert_follows_lambda_without_recompiling(model: nn.Module, x: Tensor) -> None:
    """Compile a gated `model`: between the ends there is one graph, and at each λ it computes what eager mode does."""
    torch.compiler.reset()  # what other tests compiled counts towards the same limit
    graphs = []

    def backend(graph: fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for value in (0.25, 0.5, 0.999):
        set_lambda_(model, value)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1
    for value in (1.0, 0.0):
        set_lambda_(model, value)
        torch.testing.assert_close(compiled(x), model(x))
