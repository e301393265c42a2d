"""Which convolutions become one: small blocks whose answer is plain to see."""

import dataclasses

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, LayerScale2d, SqueezeExcite
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.testing import assert_close

from updp_hf import Form, Plan, calibrate_, find_sites, gate_, merge
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.depth.chains import chains_in, stretches_of
from updp_hf.core.depth.runs import Run
from updp_hf.core.gates.gate import set_lambda_
from updp_hf.core.kinds import kind_of_form
from updp_hf.core.plan.site import Site, Unsupported
from updp_hf.surgery.find import read

C, H = 4, 16
SIZE = (9, 12)


def conv(inner=C, outer=C, kernel=3, **options):
    return nn.Conv2d(inner, outer, kernel, **{"padding": kernel // 2, **options})


def norm(channels=C):
    return nn.BatchNorm2d(channels)


class Chain(nn.Module):
    """One module after the other."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


class Residual(Chain):
    def forward(self, x):
        return x + super().forward(x)


class Net(nn.Module):
    """Stem, blocks, head. The stem reads the image, and the head what has been pooled."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, C, 1), nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((-2, -1))


def net_of(*blocks):
    """Build a network of `blocks` whose every number is drawn, in float64 and evaluation mode."""
    net = Net(*blocks).double().eval()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.data.normal_(0.1, (tensor[0].numel() if tensor.ndim > 1 else 16) ** -0.5)
    return net


def images(size=SIZE, count=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0)).double()


def found_in(net, form=Form.MERGE, size=SIZE):
    return list(kind_of_form(form).find(read(net, {"x": images(size)}), form))


def runs_of(net, form=Form.MERGE):
    return [site.slots for site in found_in(net, form) if isinstance(site, Site)]


def every_run_in(net, form=Form.MERGE):
    """Return a run for each way to merge a stretch of a chain, block by block."""
    structure = read(net, {"x": images()})
    return [
        Run.of(structure, block, form, chain, stretch)
        for block in structure.blocks()
        for chain in chains_in(structure, block)
        for stretch in stretches_of(structure, chain, crops=form == Form.MERGE)
    ]


def dense_of(net, site):
    return [slot for slot in site.slots if isinstance(net.get_submodule(slot), nn.Conv2d | nn.Linear)]


def slots(block, *names):
    return tuple(f"blocks.{block}.{name}" for name in names)


def basic(stride=1, outer=C, act=nn.ReLU, kind=Residual):
    first = conv(C, outer, stride=stride, bias=False)
    return kind(conv1=first, bn1=norm(outer), act=act(), conv2=conv(outer, outer, bias=False), bn2=norm(outer))


def inverted(stride=1, outer=C, se=None, act=nn.ReLU6, kind=Residual):
    return kind(
        expand=conv(C, H, 1, bias=False),
        bn1=norm(H),
        act1=act(),
        depthwise=conv(H, H, stride=stride, groups=H, bias=False),
        bn2=norm(H),
        act2=act(),
        **({} if se is None else {"se": se}),
        project=conv(H, outer, 1, bias=False),
        bn3=norm(outer),
    )


def bottleneck():
    return Residual(
        reduce=conv(C, 2, 1),
        bn1=norm(2),
        act1=nn.ReLU(),
        conv=conv(2, 2),
        bn2=norm(2),
        act2=nn.ReLU(),
        up=conv(2, C, 1),
    )


# what is found


def test_a_basic_block_is_one_run_whose_second_kernel_is_cropped():
    assert found_in(net_of(basic(), basic()))[0] == Run(
        Form.MERGE,
        "blocks.0",
        slots(0, "conv1", "bn1", "act", "conv2", "bn2"),
        activations=slots(0, "act"),
        cropped=slots(0, "conv2"),
        channels=C,
        channel_axis=1,
    )


def test_an_inverted_residual_is_one_run_of_three_convolutions():
    (site, _) = found_in(net_of(inverted(), inverted()))
    assert site.slots == slots(0, "expand", "bn1", "act1", "depthwise", "bn2", "act2", "project", "bn3")
    assert site.activations == slots(0, "act1", "act2")
    assert (site.cropped, site.norms) == ((), ())


@pytest.mark.parametrize("make", [basic, inverted])
@pytest.mark.parametrize("size", [(9, 12), (8, 7)])
def test_strides_and_other_widths_are_no_obstacle(make, size):
    block = make(stride=2, outer=8, kind=Chain)
    (site, *_) = found_in(net_of(block, Chain(conv=conv(8, C, 1)), make()), size=size)
    assert site.slots == slots(0, *(name for name, _ in block.named_children()))
    assert (site.channels, site.channel_axis) == (8, 1)
    assert site.saves_compute


def test_a_bottleneck_saves_no_compute():
    sites = found_in(net_of(bottleneck(), bottleneck()))
    assert [site.block for site in sites] == ["blocks.0", "blocks.1"]
    assert not any(site.saves_compute for site in sites)


def plain(length=8, kernel=3):
    return Chain(**{f"{name}{i}": module for i in range(length) for name, module in step(kernel).items()})


def step(kernel):
    return {"conv": conv(kernel=kernel), "act": nn.ReLU()}


@pytest.mark.parametrize("length", [4, 7, 8])
def test_a_plain_chain_becomes_short_runs_that_do_not_overlap(length):
    net = net_of(plain(length), plain(length))
    sites = [site for site in found_in(net) if site.block == "blocks.0"]
    pairs = [slots(0, f"conv{i}", f"conv{i + 1}") for i in range(0, length - 1, 2)]
    assert [tuple(dense_of(net, site)) for site in sites] == pairs
    assert all(site.saves_compute for site in sites)
    Plan(tuple(sites))


def test_of_a_chain_in_which_nothing_saves_compute_the_nearest_run_is_offered():
    net = net_of(plain(), plain())
    sites = found_in(net, Form.MERGE_WHOLE_KERNELS)
    assert [site.block for site in sites] == ["blocks.0", "blocks.1"]
    assert not any(site.saves_compute for site in sites)
    every = every_run_in(net, Form.MERGE_WHOLE_KERNELS)
    best = max(site.saving.macs / len(site.activations) for site in every)
    assert {site.saving.macs / len(site.activations) for site in sites} == {best}


def test_what_is_found_is_chosen_from_every_way_to_merge():
    net = net_of(plain(4), plain(4))
    every = [site for site in every_run_in(net) if site.block == "blocks.0"]
    found = {(tuple(dense_of(net, site)), bool(site.cropped)) for site in every}
    stretches = [slots(0, *(f"conv{i}" for i in range(a, b))) for a, b in ((0, 2), (1, 3), (2, 4), (0, 3), (1, 4))]
    assert found == {(stretch, is_cropped) for stretch in stretches for is_cropped in (True, False)}
    assert len(every) == len(found)
    assert set(found_in(net)) <= set(every_run_in(net))


def test_cropping_is_for_what_gets_cheaper_and_asked_for_by_the_form():
    net = net_of(basic(), Residual(**dict(basic(outer=H, kind=Chain).named_children()), up=conv(H, C, 1)))
    whole, cropped = (found_in(net, form)[0] for form in (Form.MERGE_WHOLE_KERNELS, Form.MERGE))
    positions = SIZE[0] * SIZE[1]
    spent = 2 * 9 * C * C * positions
    assert (whole.cropped, whole.saving.macs) == ((), spent - 25 * C * C * positions)
    assert (cropped.cropped, cropped.saving.macs) == (slots(0, "conv2"), spent - 9 * C * C * positions)


def test_a_run_never_leaves_its_block():
    net = net_of(*(basic(kind=Chain) for _ in range(3)))  # no residual: one chain of six convolutions
    blocks = [{slot.split(".")[1] for slot in run} for run in (site.slots for site in every_run_in(net))]
    assert blocks == [{"0"}, {"0"}, {"1"}, {"1"}, {"2"}, {"2"}]  # each with whole kernels and with cropped ones


# what ends a run


@pytest.mark.parametrize("make", [norm, lambda: LayerNorm2d(C), lambda: LayerScale2d(C)], ids=["bn", "ln", "scale"])
@pytest.mark.parametrize(("kernel", "padding", "is_inside"), [(3, 1, False), (1, 0, True), (3, 0, True)])
def test_what_stands_in_front_of_padding_is_not_taken_in(make, kernel, padding, is_inside):
    def block():
        layers = {"conv1": conv(C, H, kernel, padding=padding), "act": nn.ReLU(), "conv2": conv(H, C, 1)}
        return Chain(branch=Split(), front=make(), **layers)

    run = runs_of(net_of(block(), block()))[0]
    assert run == slots(0, *["front"] * is_inside, "conv1", "act", "conv2")


class Split(nn.Module):
    """Use its input twice, so that no run reaches over it."""

    def forward(self, x):
        return x + x.flip(-1)


def test_padding_that_has_moved_to_the_front_counts_as_well():
    def block():
        layers = {"conv1": conv(C, H, 1), "act": nn.ReLU(), "conv2": conv(H, C, 3)}
        return Chain(branch=Split(), front=norm(), **layers)

    assert runs_of(net_of(block(), block()))[0] == slots(0, "conv1", "act", "conv2")


def test_only_the_norm_in_front_is_kept_by_the_form_that_keeps_it():
    def block():
        return Chain(
            split=Split(), ln=LayerNorm2d(C), a=conv(C, H, 1), gn=LayerNorm2d(H), act=nn.ReLU(), b=conv(H, C, 1)
        )

    net = net_of(block(), block())
    assert runs_of(net)[0] == slots(0, "ln", "a", "gn", "act", "b")
    (kept, _) = found_in(net, Form.MERGE_KEEP_NORM)
    assert (kept.slots, kept.norms) == (slots(0, "a", "gn", "act", "b"), slots(0, "gn"))
    assert found_in(net)[0].norm_channels == (C, H)


def act_norm_block(apply_act):
    return Chain(
        conv1=conv(C, H, 1),
        bn1=BatchNormAct2d(H),
        conv2=conv(H, C, 1),
        bn2=BatchNormAct2d(C, apply_act=apply_act),
    )


def test_an_activation_inside_a_batch_norm_closes_inside_a_run_and_stays_at_its_end():
    net = net_of(act_norm_block(apply_act=True), act_norm_block(apply_act=False))
    live, free = found_in(net)
    assert live.slots == slots(0, "conv1", "bn1", "bn1.act", "conv2")
    assert free.slots == slots(1, "conv1", "bn1", "bn1.act", "conv2", "bn2")
    assert live.activations == slots(0, "bn1.act")


def test_what_recalibrates_channels_closes_inside_a_run():
    (site, _) = found_in(net_of(inverted(se=SqueezeExcite(H)), inverted()))
    assert slots(0, "se")[0] in site.slots
    assert (site.norms, site.norm_channels) == (slots(0, "se"), (H,))
    assert not any(".se." in slot for slot in site.slots)
    plain_site = found_in(net_of(inverted(), inverted()))[0]
    assert site.saving.parameters - plain_site.saving.parameters == count_parameters(SqueezeExcite(H))


class Twice(Residual):
    """Two convolutions and one activation for the whole block, as torchvision has it."""

    def __init__(self):
        super().__init__(**dict(basic().named_children()))

    def forward(self, x):
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


class Functional(Residual):
    def __init__(self):
        super().__init__(conv1=conv(), conv2=conv())

    def forward(self, x):
        return self.conv2(nn.functional.relu(self.conv1(x)))


UNSUPPORTED = {
    "no non-linearity": (lambda: Residual(conv1=conv(), bn=norm(), conv2=conv()), "only closable non-linearities"),
    "pooling": (lambda: Residual(a=conv(), act=nn.ReLU(), pool=nn.MaxPool2d(3, 1, 1), b=conv()), "max_pool2d"),
    "shuffling": (lambda: Residual(a=conv(), act=nn.ReLU(), shuffle=nn.ChannelShuffle(2), b=conv()), "feeds aten"),
    "other padding": (
        lambda: Residual(a=conv(), act=nn.ReLU(), b=conv(padding_mode="reflect")),
        "'blocks.0.b' (Conv2d) is not affine in a way that is known",
    ),
    "transposed": (
        lambda: Residual(a=conv(), act=nn.ReLU(), b=nn.ConvTranspose2d(C, C, 3, padding=1), c=conv()),
        "'blocks.0.b' (ConvTranspose2d)",
    ),
    "another axis": (
        lambda: Residual(a=conv(), act=nn.ReLU(), b=nn.Linear(SIZE[1], SIZE[1])),
        "looked for two Linears",
    ),
    "norm of another axis": (
        lambda: Residual(a=conv(), act=nn.ReLU(), norm=nn.LayerNorm(SIZE[1]), b=conv()),
        "looked for two Linears",
    ),
    "functional": (Functional, "'blocks.0' applies aten.relu.default without a module"),
    "called twice": (Twice, "'blocks.0.act' is called 2 times"),
}


@pytest.mark.parametrize(("make", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_has_no_run_says_why(make, reason):
    found = found_in(net_of(make(), make()))
    assert [type(result) for result in found] == [Unsupported, Unsupported]
    assert reason in found[0].reason


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_even_kernels_that_pad_unevenly_are_no_run():
    blocks = [Residual(a=nn.Conv2d(C, C, 4, padding="same"), act=nn.ReLU(), b=conv(C, C, 1)) for _ in range(2)]
    assert runs_of(net_of(*blocks)) == []


# blocks


class Layer(nn.Module):
    """Convolution, norm and activation, as transformers has them."""

    def __init__(self, inner, outer, act=True):
        super().__init__()
        self.convolution, self.normalization = conv(inner, outer, bias=False), norm(outer)
        self.activation = nn.ReLU() if act else nn.Identity()

    def forward(self, x):
        return self.activation(self.normalization(self.convolution(x)))


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.shortcut, self.layer = nn.Identity(), nn.Sequential(Layer(C, C), Layer(C, C, act=False))
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(self.layer(x) + self.shortcut(x))


LAYERS = tuple(f"0.{name}" for name in ("convolution", "normalization", "activation"))
LAYERS += tuple(f"1.{name}" for name in ("convolution", "normalization"))


def test_layers_in_a_block_share_it():
    sites = found_in(net_of(Layered(), Layered()))
    assert [site.block for site in sites] == ["blocks.0", "blocks.1"]
    assert sites[0].slots == slots(0, *(f"layer.{name}" for name in LAYERS))


@pytest.mark.parametrize("make", [basic, inverted, Layered])
@pytest.mark.parametrize("counts", [(1, 1), *(pytest.param(c, marks=pytest.mark.slow) for c in ((2, 1), (1, 3), (1,)))])
def test_stages_of_one_block_have_the_same_runs_as_stages_of_several(make, counts):
    net = net_of(*(nn.Sequential(*(make() for _ in range(count))) for count in counts))
    sites = found_in(net)
    expected = [f"blocks.{stage}.{i}" for stage, count in enumerate(counts) for i in range(count)]
    in_front = runs_of(net_of(make(), make()))[0]
    assert [site.slots for site in sites] == [
        tuple(slot.replace("blocks.0", block) for slot in in_front) for block in expected
    ]
    # A stage of one block may be called by the stage's name.
    assert all(site.block in (block, block.removesuffix(".0")) for site, block in zip(sites, expected, strict=True))
    assert len({site.block for site in sites}) == len(sites)


def test_stages_by_name_with_one_block_each():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stage1, self.stage2 = conv(3, C), basic(), basic()

        def forward(self, x):
            return self.stage2(self.stage1(self.stem(x))).mean((-2, -1))

    assert [site.block for site in found_in(Named().double().eval())] == ["stage1", "stage2"]


def test_a_list_of_many_layers_is_a_block():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [layer for _ in range(5) for layer in (conv(), nn.ReLU())]
            self.stem, self.features = conv(3, C), nn.Sequential(*layers, nn.MaxPool2d(2), conv(), nn.ReLU(), conv())

        def forward(self, x):
            return self.features(self.stem(x)).mean((-2, -1))

    sites = found_in(Plain().double().eval())
    assert {site.block for site in sites} == {"features"}
    assert [site.slots[0] for site in sites] == ["features.0", "features.4", "features.11"]


class Mobile(nn.Module):
    """A depthwise convolution, and Linears on the last axis."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.norm = conv(C, C, 7, groups=C), nn.LayerNorm(C)
        self.fc1, self.act, self.fc2 = nn.Linear(C, H), nn.GELU(), nn.Linear(H, C)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.fc2(self.act(self.fc1(y))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [SIZE, (C, C), (H, C)])
def test_linears_of_the_last_axis_have_their_own_run_in_a_block_of_images(size):
    (site, _) = found_in(net_of(Mobile(), Mobile()), size=size)
    assert site.slots == slots(0, "norm", "fc1", "act", "fc2")
    assert (site.channels, site.channel_axis) == (C, 1)


# what closing gives

BLOCKS = {
    "basic": basic,
    "in place": lambda: basic(act=lambda: nn.ReLU(inplace=True)),
    "stride": lambda: Chain(**dict(basic(stride=2, kind=Chain).named_children())),
    "inverted": inverted,
    "squeeze-excite": lambda: inverted(se=SqueezeExcite(H, rd_channels=8)),
    "wide": lambda: Residual(a=conv(C, H), act=nn.PReLU(H), b=conv(H, C), scale=LayerScale2d(C)),
    "dilation": lambda: Residual(a=conv(C, H, padding=2, dilation=2), act=nn.GELU(), b=conv(H, C)),
    "activations inside": lambda: act_norm_block(apply_act=True),
    "pre-norm": lambda: Residual(bn=norm(), a=conv(C, H, 1), act=nn.ReLU(), b=conv(H, C, 1)),
    "channel norm before padding": lambda: Residual(a=conv(C, H, 1), n=LayerNorm2d(H), act=nn.ReLU(), b=conv(H, C)),
    "linears": Mobile,
    "pooling before padding": lambda: Residual(
        a=conv(C, H, 1), n=nn.GroupNorm(2, H), act=nn.ReLU(), se=SqueezeExcite(H, rd_channels=8), b=conv(H, C)
    ),
    "grn": lambda: Residual(
        a=conv(C, H, 1), act=nn.GELU(), n=GlobalResponseNorm(H, channels_last=False), b=conv(H, C, 1)
    ),
    "bottleneck": bottleneck,
    "plain": lambda: plain(5),
}


def each_block_and(name, usual, other):
    """Run a test on the usual blocks with the `usual` value and on one with the `other`, on all in the slow ring."""
    rows = [(name, usual, name not in USUAL) for name in BLOCKS] + [(name, other, name != "basic") for name in BLOCKS]
    values = [
        pytest.param(BLOCKS[block], value, id=f"{block}-{value}", marks=[pytest.mark.slow] * is_slow)
        for block, value, is_slow in rows
    ]
    return pytest.mark.parametrize(("make", name), values)


USUAL = {"basic", "inverted", "squeeze-excite", "plain"}
EACH_BLOCK_AND_FORM = each_block_and("form", Form.MERGE, Form.MERGE_WHOLE_KERNELS)


def gated(net, form=Form.MERGE, start="inherit"):
    structure = read(net, {"x": images()})
    sites = find_sites(net, [form], structure=structure).sites
    gate_(net, Plan(sites, start=start), structure=structure)
    return net, sites


@EACH_BLOCK_AND_FORM
@torch.no_grad()
def test_what_a_site_saves_is_what_the_merged_model_lacks(make, form):
    net = net_of(make(), make())
    x = images(count=2)
    before = count_macs(net, {"x": x[:1]}), count_parameters(net)
    net, sites = gated(net, form)
    set_lambda_(net, 1.0)
    merged = merge(net, example_inputs={"x": x})
    assert before[0] - count_macs(merged, {"x": x[:1]}) == sum(site.saving.macs for site in sites)
    assert before[1] - count_parameters(merged) == sum(site.saving.parameters for site in sites)
    assert_close(merged(x), net(x), rtol=0, atol=1e-10 * float(net(x).abs().max()))


POOLS = {
    "group norm": lambda: nn.GroupNorm(2, H),
    "squeeze-excite": lambda: SqueezeExcite(H, rd_channels=8),
    "GRN": lambda: GlobalResponseNorm(H, channels_last=False),
}


@EACH_BLOCK_AND_FORM
def test_a_gated_model_leaves_the_checkpoint_and_reaches_the_closed_model_without_a_jump(make, form):
    assert_no_jump(net_of(make(), make()), form)


@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS)
def test_what_pools_positions_in_front_of_padding_is_no_exception(make):
    blocks = [Residual(a=conv(C, H, 1), pool=make(), act=nn.ReLU(), b=conv(H, C)) for _ in range(2)]
    assert_no_jump(net_of(*blocks), Form.MERGE_WHOLE_KERNELS)


@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS)
def test_padding_does_not_move_past_what_would_pool_its_ring(make):
    blocks = [Residual(a=conv(C, H, 3), pool=make(), act=nn.ReLU(), b=conv(H, C)) for _ in range(2)]
    net = net_of(*blocks)
    sites, _ = find_sites(net, [Form.MERGE_WHOLE_KERNELS], example_inputs={"x": images(count=1)})
    assert sites == ()
    cropped, _ = find_sites(net, [Form.MERGE], example_inputs={"x": images(count=1)})
    assert all(site.cropped for site in cropped)
    assert len(cropped) == 2
    assert_no_jump(net, Form.MERGE)


@torch.no_grad()
def assert_no_jump(net, form):
    x = images(count=2)
    checkpoint = net(x)
    net, _ = gated(net, form)
    assert torch.equal(net(x), checkpoint)
    set_lambda_(net, 1e-10)
    assert_close(net(x), checkpoint, rtol=0, atol=1e-8 * float(checkpoint.abs().max()))
    set_lambda_(net, 1.0)
    closed = net(x)
    set_lambda_(net, 1 - 2**-24)
    assert_close(net(x), closed, rtol=0, atol=1e-4 * float(closed.abs().max()))
    assert not torch.allclose(closed, checkpoint)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
@torch.no_grad()
def test_a_fitted_model_leaves_the_checkpoint_without_a_jump_and_merges_exactly(make):
    net = net_of(make(), make())
    x = images(count=4)
    checkpoint = net(x)
    net, _ = gated(net, start="fit")
    calibrate_(net, [x])
    assert torch.equal(net(x), checkpoint)
    set_lambda_(net, 1e-10)
    assert_close(net(x), checkpoint, rtol=0, atol=1e-8 * float(checkpoint.abs().max()))
    set_lambda_(net, 1.0)
    merged = merge(net, example_inputs={"x": x})
    assert_close(merged(x), net(x), rtol=0, atol=1e-10 * float(net(x).abs().max()))


@each_block_and("start", "inherit", "fit")
def test_a_gated_model_has_the_sites_of_the_stock_model(make, start):
    net = net_of(make(), make())
    before = found_in(net)
    gated(net, start=start)
    set_lambda_(net, 1.0)
    assert found_in(net) == before


def test_a_site_found_again_equals_itself_whatever_the_size_of_the_images():
    net = net_of(basic(), basic())
    small, large = found_in(net)[0], found_in(net, size=(20, 20))[0]
    assert small == large
    assert small.saving.macs < large.saving.macs
    assert dataclasses.replace(small, cropped=()) != large
