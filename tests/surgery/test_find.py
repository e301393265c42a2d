"""What may stand in a slot depends on how the slot is called and who else looks into it."""

import pytest
import torch
from tiny_models import pruned_once, tiny_model
from torch import nn

from updp_hf import Form, Plan, close_, find_sites, gate_
from updp_hf.core.gates.gate import gates, set_lambda_
from updp_hf.errors import PlanError
from updp_hf.surgery.find import blocks_of, read, require_sites
from updp_hf.surgery.gate import site_gates

C = 8


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)

    def forward(self, x, scale=None):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.norm, self.mlp, self.side, self.call = nn.LayerNorm(C), Mlp(), nn.Linear(C, C), call

    def forward(self, x):
        return x + self.call(self, self.norm(x))


def sites(call, form):
    model = nn.Sequential(Block(call), Block(call))
    return find_sites(model, [form], example_inputs={"input": torch.randn(1, 3, C)})


CALLS = {
    "plain": lambda block, x: block.mlp(x),
    "keyword": lambda block, x: block.mlp(x=x),
    "two arguments": lambda block, x: block.mlp(x, 1.0),
}


@pytest.mark.parametrize(("call", "can_be_fitted"), [("plain", True), ("keyword", False), ("two arguments", False)])
def test_a_linear_stands_only_for_what_is_called_like_one(call, can_be_fitted):
    branch = sites(CALLS[call], Form.BRANCH_FIT)
    assert len(branch.sites) == 2 * can_be_fitted
    assert all("so no Linear can stand in its place" in none.reason for none in branch.unsupported)
    assert len(sites(CALLS[call], Form.MERGE).sites) == 2  # whose slots are called by their own module


def test_what_returns_more_than_tensors_cannot_be_dropped():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj(nn.functional.scaled_dot_product_attention(q, k, v)), (3, 1)

    def call(block, x):
        x, (height, _) = block.attention(x)
        return x / height

    blocks = [Block(call), Block(call)]
    for block in blocks:
        block.attention = nn.Sequential(Sized())
    found = find_sites(nn.Sequential(*blocks), [Form.ATTENTION_DROP], example_inputs={"input": torch.randn(1, 3, C)})
    assert not found.sites
    assert "returns more than tensors, so zeros cannot stand in its place" in found.unsupported[0].reason


def test_an_entry_of_a_list_that_repeats_nothing_is_no_block():
    class Inside(Mlp):
        def __init__(self):
            super().__init__()
            self.out = nn.Sequential(nn.GELU(), nn.Sequential(nn.Linear(C, C)))

        def forward(self, x):
            return self.out(super().forward(x))

    blocks = [Block(CALLS["plain"]), Block(CALLS["plain"])]
    for block in blocks:
        block.mlp = Inside()
    model = nn.Sequential(nn.LayerNorm(C), *blocks)
    found = find_sites(model, [Form.BLOCK_DROP], example_inputs={"input": torch.randn(1, 3, C)})
    assert [site.block for site in found.sites] == ["1", "2"]


def test_a_parameter_handed_to_a_module_is_counted_past():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.blocks = nn.Parameter(torch.zeros(1, 1, C)), nn.Sequential(*plain_blocks())

        def forward(self, x):
            return self.blocks(torch.cat([self.blocks[0].norm2(self.token), x], 1))

    def plain_blocks():
        blocks = [Block(CALLS["plain"]), Block(CALLS["plain"])]
        blocks[0].norm2 = nn.LayerNorm(C)
        return blocks

    with torch.no_grad():
        assert len(find_sites(Token(), ["merge"], example_inputs={"x": torch.randn(1, 3, C)}).sites) == 2


class Reader(nn.Module):
    """Read the weight of a module that is not its own."""

    def __init__(self, linear):
        super().__init__()
        self.linear = (linear,)

    def forward(self, x):
        return nn.functional.linear(x, self.linear[0].weight[:C])


def test_a_module_whose_weight_others_read_is_unsupported():
    blocks = [Block(lambda block, x: block.mlp(x) + block.reader(x)) for _ in range(2)]
    for block in blocks:
        block.reader = Reader(block.mlp.fc1)
    found = find_sites(nn.Sequential(*blocks), ["merge"], example_inputs={"input": torch.randn(1, 3, C)})
    assert not found.sites
    assert "'0.mlp.fc1' has its parameters read by '0.reader'" in found.unsupported[0].reason


def test_a_module_whose_weight_its_block_reads_is_unsupported():
    found = sites(lambda block, x: block.mlp(x) + nn.functional.linear(x, block.mlp.fc1.weight[:C]), Form.MERGE)
    assert not found.sites
    assert "'0.mlp.fc1' has its parameters read by '0'" in found.unsupported[0].reason


def test_what_runs_between_the_calls_of_a_run_does_not_end_it():
    def call(block, x):
        hidden = block.mlp.fc1(x)
        side = block.side(x)
        return block.mlp.fc2(block.mlp.act(hidden)) + side

    assert sites(call, Form.MERGE_KEEP_NORM).sites[0].slots == ("0.mlp.fc1", "0.mlp.act", "0.mlp.fc2")


def test_a_model_without_sites_says_where_the_search_stopped():
    model = nn.Sequential(*(Block(lambda block, x: block.side(x) + block.mlp.fc1(x)[..., :C]) for _ in range(2)))
    with pytest.raises(
        PlanError, match=r"has no site of the form 'merge' that saves compute. 0: looked for two Linears or conv"
    ):
        require_sites(model, "merge", {"input": torch.randn(1, 3, C)})
    with pytest.raises(PlanError, match="No repeated blocks with Linears or convolutions were found"):
        require_sites(nn.Sequential(nn.Linear(C, C), nn.GELU()), "merge", {"input": torch.randn(1, 3, C)})


class Widths(nn.Module):
    """An FFN of some inner width: the wider, the more is saved."""

    def __init__(self, hidden):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(C), nn.Linear(C, hidden), nn.GELU(), nn.Linear(hidden, C)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


X = {"input": torch.randn(1, 3, C)}


def test_what_saves_no_compute_is_found_but_not_required():
    model = nn.Sequential(Widths(2 * C), Widths(C // 4), Widths(C // 2))
    assert [site.saves_compute for site in find_sites(model, ["merge"], example_inputs=X).sites] == [True, False, False]
    assert [site.block for site in require_sites(model, "merge", X)] == ["0"]
    with pytest.raises(PlanError, match=r"'merge' that saves compute. 0: closing it costs 96 MACs more"):
        require_sites(nn.Sequential(Widths(C // 4), Widths(C // 4)), Form.MERGE, X)


def test_what_saves_no_compute_may_be_closed_all_the_same():
    model = nn.Sequential(Widths(C // 4), Widths(C // 4))
    (site, _) = find_sites(model, ["merge"], example_inputs=X).sites
    gate_(model, Plan((site,), start="inherit"), example_inputs=X)
    assert [path for path, _ in gates(model)] == ["0.act"]  # its norm reads the input of the model, and stays


def test_all_gates_have_one_lambda_and_close_at_once():
    model = nn.Sequential(Block(CALLS["plain"]), Block(CALLS["plain"]))
    sites = find_sites(model, ["merge"], example_inputs=X).sites
    gate_(model, Plan(sites, start="fit"), example_inputs=X)
    assert [len(site_gates(model, site)) for site in sites] == [len(site.slots) for site in sites]
    set_lambda_(model, 0.25)
    assert {float(gate.lam) for _, gate in gates(model)} == {0.25}
    close_(model)
    assert {gate.stage for _, gate in gates(model)} == {1.0}


class Backwards(nn.Module):
    """Blocks that run in another order than they are registered in, each in a list of its own."""

    def __init__(self):
        super().__init__()
        self.last, self.first = (nn.ModuleList([Widths(C), Widths(2 * C)]) for _ in range(2))

    def forward(self, input):
        for block in (*self.first, *reversed(self.last)):
            input = block(input)
        return input


def blocks(model):
    return blocks_of(model, read(model, X))


def test_blocks_stand_in_order_of_execution():
    assert blocks(Backwards()) == ["first.0", "first.1", "last.1", "last.0"]


def test_of_nested_blocks_the_innermost_are_taken():
    model = nn.Sequential(*(nn.Sequential(Widths(C), Widths(C)) for _ in range(2)))
    assert blocks(model) == ["0.0", "0.1", "1.0", "1.1"]


def test_without_blocks_there_are_none():
    assert blocks(nn.Sequential(nn.Linear(C, C), nn.GELU())) == []


BLOCKS = {
    "vit": [f"vit.layers.{index}" for index in range(3)],
    "timm-wrapper": [f"timm_model.blocks.{index}" for index in range(3)],
    "swin": [f"swin.encoder.layers.{stage}.blocks.{index}" for stage in range(2) for index in range(2)],
}


@pytest.mark.parametrize("name", ["vit", "timm-wrapper", "swin"])
def test_the_sites_of_a_model_lie_in_its_blocks(name):
    model = tiny_model(name)
    assert blocks_of(model) == BLOCKS[name]
    assert set(BLOCKS[name]) == {site.block for site in find_sites(model, [Form.BLOCK_DROP]).sites}


@pytest.mark.parametrize("form", [Form.MERGE, Form.ATTENTION_DROP])
def test_a_pruned_model_has_the_blocks_that_are_left(form):
    found = blocks_of(pruned_once(tiny_model("vit"), form))
    assert found == [f"base.{block}" for block in BLOCKS["vit"]]


def test_gates_do_not_change_the_blocks():
    model = tiny_model("vit")
    gate_(model, Plan(find_sites(model, ["merge"]).sites))
    assert blocks_of(model) == BLOCKS["vit"]


def test_a_model_whose_images_are_unknown_needs_an_example():
    with pytest.raises(ValueError, match="give `example_inputs`"):
        blocks_of(nn.Sequential(Widths(C), Widths(C)))
