"""Where something can be closed, and why elsewhere not: small models whose answer is plain to see."""

import pytest
import torch
from rings import slow_but
from torch import nn

from updp_hf.core.depth.runs import Run
from updp_hf.core.graph import roles as closable
from updp_hf.core.graph.roles import register_closable
from updp_hf.core.kinds import Form, kind_of_form
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site, Unsupported
from updp_hf.model.layout_updp import get_slot, set_slot
from updp_hf.model.modules_updp import EndActivation, Skip, Zero
from updp_hf.surgery.find import read

C, N = 8, 5


class Ffn(nn.Module):
    def __init__(self, act=None, hidden=16, between=None):
        super().__init__()
        self.fc1, self.act, self.between, self.fc2 = (
            nn.Linear(C, hidden),
            act or nn.GELU(),
            between or nn.Identity(),
            nn.Linear(hidden, C),
        )

    def forward(self, x):
        return self.fc2(self.between(self.act(self.fc1(x))))


class Gated(nn.Module):
    """A gated FFN: no run, but each token by itself."""

    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(C, 32), nn.Linear(16, C)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(nn.functional.silu(gate) * value)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, C // 2)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Explicit(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.mT / C**0.5).softmax(-1) @ v)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Residual branches in turn, each behind a norm."""

    def __init__(self, *branches):
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"norm{i}", nn.LayerNorm(C))
            self.add_module(f"branch{i}", branch)

    def forward(self, x):
        for i in range(len(self._modules) // 2):
            x = x + self._modules[f"branch{i}"](self._modules[f"norm{i}"](x))
        return x


class Vit(nn.Module):
    """The block of a ViT, with names as timm has them."""

    def __init__(self, mlp=None, attn=None, ls=None):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(C), attn or Attention(), nn.LayerNorm(C)
        self.mlp, self.ls = mlp or Ffn(), ls or nn.Identity()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ls(self.mlp(self.norm2(x)))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(C, C), nn.Tanh(), nn.Linear(C, 3)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    """Embedding, repeated blocks, head; the embedding and the head look like sites, but are no blocks."""

    def __init__(self, *blocks):
        super().__init__()
        self.embed, self.blocks = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C)), nn.ModuleList(blocks)
        self.head = Head()

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def find_all(model, tokens=N):
    """Return, by form, the sites of `model`, and by block the reasons why there are none."""
    structure = read(model, {"x": torch.randn(1, tokens, C)})
    results = {form: list(kind_of_form(form).find(structure, form)) for form in Form}
    return {
        form: (
            [result for result in found if isinstance(result, Site)],
            {result.block: result.reason for result in found if isinstance(result, Unsupported)},
        )
        for form, found in results.items()
    }


def find(model, form=Form.MERGE, tokens=N):
    return find_all(model, tokens)[form]


def runs(model, form=Form.MERGE, tokens=N):
    sites, _ = find(model, form, tokens)
    return [site.slots for site in sites]


# runs


def test_the_run_of_a_vit_block():
    sites, unsupported = find(Net(Vit(ls=LayerScale()), Vit()))
    inside = ("norm2", "mlp.fc1", "mlp.act", "mlp.fc2")
    assert sites == [
        Run(
            Form.MERGE,
            "blocks.0",
            tuple(f"blocks.0.{slot}" for slot in (*inside, "ls")),
            activations=("blocks.0.mlp.act",),
            norms=("blocks.0.norm2",),
            norm_channels=(C,),
            channels=C,
        ),
        Run(
            Form.MERGE,
            "blocks.1",
            tuple(f"blocks.1.{slot}" for slot in inside),
            activations=("blocks.1.mlp.act",),
            norms=("blocks.1.norm2",),
            norm_channels=(C,),
            channels=C,
        ),
    ]
    assert [site.saves_compute for site in sites] == [True, True]
    assert str(sites[1]) == "blocks.1 (merge)"
    assert unsupported == {}


def test_the_norm_in_front_can_be_kept():
    (site,), _ = find(Net(Vit()), Form.MERGE_KEEP_NORM)
    assert site.slots == ("blocks.0.mlp.fc1", "blocks.0.mlp.act", "blocks.0.mlp.fc2")
    assert site.norms == ()


def test_the_norm_behind_closes_too():
    class PostNorm(Vit):
        def forward(self, x):
            return x + self.norm2(self.mlp(self.norm1(x) + x))

    (site,), _ = find(Net(PostNorm()))
    assert site.slots == tuple(f"blocks.0.{slot}" for slot in ("mlp.fc1", "mlp.act", "mlp.fc2", "norm2"))
    assert (site.norms, site.norm_channels) == (("blocks.0.norm2",), (C,))


def test_a_norm_inside_the_run_closes_whether_the_one_in_front_is_kept_or_not():
    net = Net(Vit(Ffn(between=nn.LayerNorm(16))))
    (site,), (kept,) = find(net)[0], find(net, Form.MERGE_KEEP_NORM)[0]
    assert site.norms == ("blocks.0.norm2", "blocks.0.mlp.between")
    assert site.norm_channels == (C, 16)
    assert kept.norms == ("blocks.0.mlp.between",)
    assert kept.slots == tuple(f"blocks.0.mlp.{slot}" for slot in ("fc1", "act", "between", "fc2"))


def test_a_norm_that_feeds_something_else_stays_outside():
    class Parallel(Vit):
        def forward(self, x):
            x = self.norm1(x)
            return x + self.mlp(x)

    (site,), _ = find(Net(Parallel()))
    assert site.slots[0] == "blocks.0.mlp.fc1"


def test_two_ffns_in_one_block_are_two_sites():
    sites, _ = find(Net(Block(Ffn(), Attention(), Ffn())))
    assert [site.slots[0] for site in sites] == ["blocks.0.norm0", "blocks.0.norm2"]
    assert [site.slots[-1] for site in sites] == ["blocks.0.branch0.fc2", "blocks.0.branch2.fc2"]
    Plan(tuple(sites))  # which do not overlap


def test_a_run_never_leaves_its_block():
    class Chain(nn.Module):
        """No residual: fc2 of one block feeds fc1 of the next alone."""

        def __init__(self):
            super().__init__()
            self.mlp = Ffn()

        def forward(self, x):
            return self.mlp(x)

    assert runs(Net(Chain(), Chain())) == [
        tuple(f"blocks.{i}.mlp.{slot}" for slot in ("fc1", "act", "fc2")) for i in (0, 1)
    ]


@pytest.mark.parametrize(
    "head",
    [Head(), nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, 3))],  # one of another class than the embedding
    ids=["module", "sequential"],
)
def test_embedding_and_head_are_left_alone(head):
    net = Net(nn.Sequential(nn.LayerNorm(C)))
    net.head = head
    assert find(net) == ([], {})


class Branches(nn.Module):
    """Execute another module between two that belong together."""

    def __init__(self):
        super().__init__()
        self.ffn, self.side = Ffn(), nn.Linear(C, C)

    def forward(self, x):
        h = self.ffn.fc1(x)
        return self.ffn.fc2(self.ffn.act(h)) + self.side(x)


def test_parts_may_be_called_from_outside_their_module():
    (site,), _ = find(Net(Branches()))
    assert site.slots == tuple(f"blocks.0.ffn.{slot}" for slot in ("fc1", "act", "fc2"))


class OwnAct(nn.Module):
    def forward(self, x):
        return x * (x + 1).clamp(0, 2)


@pytest.mark.parametrize("act", [OwnAct(), nn.ReLU(inplace=True), nn.Hardswish(), nn.PReLU()], ids=repr)
def test_any_pointwise_activation_is_found(act):
    (site,), _ = find(Net(Vit(Ffn(act))))
    assert site.activations == ("blocks.0.mlp.act",)


class StarRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.relu() ** 2


class MaxOfMean(nn.Module):
    """Mix elements, so that only its author knows that it can be closed."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * torch.maximum(x, x.mean(-1, keepdim=True))


def test_an_activation_may_have_parameters():
    (site,), _ = find(Net(Vit(Ffn(StarRelu()))))
    assert site.activations == ("blocks.0.mlp.act",)


def test_a_non_linearity_that_mixes_elements_is_found_once_it_is_registered(monkeypatch):
    monkeypatch.setattr(closable, "_REGISTERED", dict(closable._REGISTERED))
    net = Net(Vit(Ffn(MaxOfMean())))
    sites, unsupported = find(net)
    assert sites == []
    assert "'blocks.0.mlp.act' (MaxOfMean)" in unsupported["blocks.0"]
    register_closable(MaxOfMean)
    (site,), _ = find(net)
    assert site.activations == ("blocks.0.mlp.act",)


@pytest.mark.parametrize("tokens", [N, C])
def test_as_many_tokens_as_channels_make_no_difference(tokens):
    net = Net(Vit(), Block(Ffn()))
    assert runs(net, tokens=tokens) == runs(net, tokens=tokens + 1)


@pytest.mark.parametrize("tokens", [N, 16])
def test_a_batch_norm_over_tokens_ends_a_run(tokens):
    net = Net(Vit(Ffn(between=nn.BatchNorm1d(tokens))))
    assert runs(net, tokens=tokens) == []


# what is unsupported


class Functional(Ffn):
    """Apply the non-linearity without a module, so that there is no slot to put a gate in."""

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Peek(Ffn):
    """Use the hidden value a second time."""

    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden)) + hidden[..., :C]


class PeekInPlace(Ffn):
    """Use the hidden value after the activation has changed it in place."""

    def __init__(self):
        super().__init__(nn.ReLU(inplace=True))

    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden)) + hidden[..., :C]


class Twice(Ffn):
    """Call the activation again behind the second Linear."""

    def forward(self, x):
        return self.act(super().forward(x))


class TwiceAll(Ffn):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize(
    ("ffn", "reason"),
    [
        (Functional(), "two Linears or convolutions with only closable non-linearities between them"),
        (Peek(), "each feeding only the next"),
        (PeekInPlace(), "each feeding only the next"),
        (Twice(), "'blocks.0.mlp.act' is called 2 times"),
        (TwiceAll(), "'blocks.0.mlp.fc1' is called 2 times"),
        (Ffn(nn.Softmax(-1)), "two Linears"),
        (Ffn(nn.Identity()), "two Linears"),
        (Ffn(between=nn.LayerNorm((N, 16))), "'blocks.0.mlp.between' (LayerNorm) is not affine"),
    ],
    ids=[
        "functional",
        "used elsewhere",
        "used after in-place",
        "act twice",
        "twice",
        "softmax",
        "linear",
        "over tokens",
    ],
)
def test_what_cannot_be_closed_is_unsupported_for_a_reason(ffn, reason):
    sites, unsupported = find(Net(Vit(ffn)))
    assert sites == []
    assert list(unsupported) == ["blocks.0"]
    assert reason in unsupported["blocks.0"]


def test_one_activation_for_all_blocks_is_unsupported():
    act = nn.ReLU()
    sites, unsupported = find(Net(Vit(Ffn(act)), Vit(Ffn(act)), Vit()))
    assert [site.block for site in sites] == ["blocks.2"]
    assert all("act" in unsupported[block] for block in ("blocks.0", "blocks.1"))


def test_tied_modules_are_unsupported():
    first, second = Ffn(), Ffn()
    second.fc1 = first.fc1
    sites, unsupported = find(Net(Vit(first), Vit(second)))
    assert sites == []
    assert "fc1" in unsupported["blocks.0"] + unsupported["blocks.1"]


def test_a_module_in_two_slots_of_which_one_is_never_called_is_unsupported():
    block = Vit()
    block.alias = block.mlp.fc2
    sites, unsupported = find(Net(block))
    assert sites == []
    assert "the same module as" in unsupported["blocks.0"]


# branches and blocks


@pytest.mark.parametrize("ffn", [Gated(), Ffn(), Functional(), Ffn(between=nn.LayerNorm(16))])
def test_any_branch_of_each_token_by_itself_can_be_fitted(ffn):
    (site,), _ = find(Net(Vit(ffn)), Form.BRANCH_FIT)
    assert (site.slots, site.channels) == (("blocks.0.mlp",), C)


def test_a_gated_ffn_is_a_branch_and_not_a_run():
    sites, unsupported = find(Net(Vit(Gated())))
    assert sites == []
    assert "two Linears" in unsupported["blocks.0"]


class Mixing(Ffn):
    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True))


class Transposed(Ffn):
    """Mix tokens, as MLP-Mixer does."""

    def forward(self, x):
        return super().forward(x.mT).mT


class Rolled(Ffn):
    def forward(self, x):
        return super().forward(x.roll(1, 1))


class Halved(Ffn):
    """Multiply one half of the tokens with the other, where a gated FFN does so with channels."""

    def forward(self, x):
        first, second = x.chunk(2, 1)
        return x + super().forward(first * second)


def test_a_branch_that_splits_tokens_is_not_fitted():
    assert find(Net(Block(Halved())), Form.BRANCH_FIT, tokens=2)[0] == []


@pytest.mark.parametrize("ffn", [Mixing(), Transposed(), Rolled()], ids=["mean", "transposed", "rolled"])
def test_a_branch_that_mixes_tokens_is_not_fitted(ffn):
    # As many tokens as channels, so that shapes give nothing away.
    assert find(Net(Block(ffn)), Form.BRANCH_FIT, tokens=C)[0] == []


@pytest.mark.parametrize("attention", [Attention(), Explicit()], ids=["fused", "explicit"])
def test_attention_is_found_with_the_norm_that_feeds_it_alone(attention):
    (site,), _ = find(Net(Vit(attn=attention)), Form.ATTENTION_DROP)
    assert site.slots == ("blocks.0.norm1", "blocks.0.attn")
    assert site.channels == C


def test_a_norm_that_feeds_more_than_attention_is_kept():
    class Parallel(Vit):
        def forward(self, x):
            y = self.norm1(x)
            return x + self.attn(y) + self.mlp(y)

    assert runs(Net(Parallel()), Form.ATTENTION_DROP) == [("blocks.0.attn",)]


def test_a_block_without_attention_says_so():
    sites, unsupported = find(Net(Block(Ffn()), Vit()), Form.ATTENTION_DROP)
    assert [site.block for site in sites] == ["blocks.1"]
    assert "a module with attention in it" in unsupported["blocks.0"]


def test_whole_blocks_are_found_where_the_shape_stays():
    class Wider(Vit):
        def __init__(self):
            super().__init__()
            self.reduce = nn.Linear(C, 2 * C)

        def forward(self, x):
            return self.reduce(super().forward(x)).unflatten(-1, (2, C)).flatten(1, 2)

    sites, unsupported = find(Net(Vit(), Wider(), Vit()), Form.BLOCK_DROP)
    assert [site.slots for site in sites] == [("blocks.0",), ("blocks.2",)]
    assert "same shape" in unsupported["blocks.1"]


def test_a_block_with_a_second_input_is_not_dropped():
    class Joined(Net):
        def forward(self, x):
            x = self.embed(x)
            first = self.blocks[0](x)
            return self.head(self.blocks[1](first, x))

    class Second(Vit):
        def forward(self, x, other):
            return super().forward(x) + other

    sites, unsupported = find(Joined(Vit(), Second()), Form.BLOCK_DROP)
    assert [site.block for site in sites] == ["blocks.0"]
    assert "one tensor into the block" in unsupported["blocks.1"]


# gated models


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(
    ("start", "value"), slow_but([("inherit", 0.5), ("inherit", 1.0), ("fit", 1.0)], ("inherit", 0.5))
)
def test_a_gated_model_has_the_sites_of_the_stock_model(form, start, value):
    net = Net(Vit(ls=LayerScale()), Vit())
    before = find_all(net)
    plan = Plan(tuple(before[form][0]), start=start)
    assert plan.blocks == ["blocks.0", "blocks.1"]
    for site in plan.sites:
        for slot, gate in site.gates(net, start).items():
            gate.set_lambda_(value)
            set_slot(net, slot, gate)
    end = nn.Sequential(nn.LayerNorm(C), nn.ReLU())
    set_slot(net, "blocks.1", EndActivation(get_slot(net, "blocks.1"), end))
    assert find_all(net) == before


@pytest.mark.parametrize("form", Form)
def test_a_closed_and_merged_place_is_no_site_any_more(form):
    net = Net(Vit(), Vit())
    for site in find(net, form)[0]:
        for slot in site.slots:
            set_slot(net, slot, nn.Identity())
        left = {Form.ATTENTION_DROP: Zero, Form.BLOCK_DROP: Skip}.get(form, lambda: nn.Linear(C, C))()
        set_slot(net, site.slots[-1], left)
    assert find(net, form)[0] == []
