import copy

import pytest
import torch
from timm.layers import LayerNorm2d, SqueezeExcite
from timm.layers.grn import GlobalResponseNorm
from tiny_models import close_, randomise_, tiny_model
from torch import nn

from updp_hf import Form, Plan, calibrate_, find_sites, gate_
from updp_hf.core.gates.detour import Landing
from updp_hf.core.gates.gate import Blend, gates
from updp_hf.errors import PlanError
from updp_hf.model.modules_updp import ChannelBatchNorm, EndActivation
from updp_hf.surgery import fitting
from updp_hf.surgery.corrections import recalibrate_batch_norms_
from updp_hf.surgery.find import read
from updp_hf.surgery.gate import plan_of, site_gates
from updp_hf.surgery.model_io import example_inputs_of, logits_of


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


class Halve(nn.Module):
    """An "activation" that is linear, so that the branch around it is truly affine."""

    def forward(self, x):
        return x * 0.5


def gated(name="vit", form=Form.MERGE, **plan):
    model = tiny_model(name)
    structure = read(model)
    sites = find_sites(model, [form], structure=structure).sites
    gate_(model, Plan(sites, **{"start": "inherit", **plan}), structure=structure)
    return model


def batches_for(model, count=2):
    return [example_inputs_of(model, 16, seed) for seed in range(count)]


def spread(x):
    """Return by how much `x` varies over images and positions, its channels on axis 1 if it is an image's."""
    return (x - x.mean((0, *range(2, x.ndim)) if x.ndim == 4 else (0, 1), keepdim=True)).norm()


@torch.no_grad()
def errors_of_norms(model, inputs=None):
    """Return for each gate with a BatchNorm on its pruned side the error of that relative to the original's spread."""
    errors = {}

    def compare(path):
        def hook(gate, args, output):
            original, pruned = gate.original(*args), gate.pruned(*args)
            errors[path] = float((original - pruned).norm() / spread(original))

        return hook

    kinds = (ChannelBatchNorm, nn.BatchNorm2d)
    chosen = [(path, gate) for path, gate in gates(model) if isinstance(getattr(gate, "pruned", None), kinds)]
    handles = [gate.register_forward_hook(compare(path)) for path, gate in chosen]
    logits_of(model, inputs or example_inputs_of(model, 16, seed=9))
    for handle in handles:
        handle.remove()
    return errors


@torch.no_grad()
def errors_of_sites(model, inputs=None):
    """Return for each site the error of what it returns closed relative to the spread of what it returns open."""
    inputs = inputs or example_inputs_of(model, 16, seed=9)

    def output_of(site, value):
        outputs, found = [], site_gates(model, site)
        handle = found[-1].register_forward_hook(lambda gate, args, output: outputs.append(output))
        for gate in found:
            gate.set_lambda_(value)
        logits_of(model, inputs)
        for gate in found:
            gate.set_lambda_(0.0)
        handle.remove()
        return outputs[0]

    pairs = [(output_of(site, 0.0), output_of(site, 1.0)) for site in plan_of(model).sites]
    return [float((opened - closed).norm() / spread(opened)) for opened, closed in pairs]


@pytest.mark.parametrize("name", ["vit", *map(slow, ("swin", "timm-vit-n-is-c", "timm-deit3"))])
def test_batch_norm_starts_near_the_norm_that_it_replaces(name):
    model = gated(name)
    before = errors_of_norms(model)
    calibrate_(model, batches_for(model))
    after = errors_of_norms(model)
    assert len(after) >= 3
    assert all(after[path] < 0.6 * before[path] and after[path] < 0.6 for path in before)


@pytest.mark.parametrize("value", [0.1, 0.5, 1.0])
def test_closing_a_calibrated_norm_does_less_damage(value):
    model = gated("vit")
    norms = [gate for _, gate in gates(model) if isinstance(gate, Blend) and isinstance(gate.pruned, ChannelBatchNorm)]
    inputs = example_inputs_of(model, 16, seed=9)

    @torch.no_grad()
    def logits_at(lam):
        for gate in norms:
            gate.set_lambda_(lam)
        return logits_of(model, inputs)

    expected = logits_at(0.0)
    before = float((logits_at(value) - expected).norm())
    close_(model, 0.0)
    calibrate_(model, batches_for(model))
    after = float((logits_at(value) - expected).norm())
    assert after < 0.6 * before


@pytest.mark.parametrize("form", [Form.MERGE_KEEP_NORM, Form.BRANCH_FIT])
def test_fit_of_an_affine_branch_is_exact(form):
    model = tiny_model("vit")
    for layer in model.vit.layers:
        layer.mlp.activation_fn = Halve()
    gate_(model, Plan(find_sites(model, [form]).sites, start="fit"))
    inputs = example_inputs_of(model, 4, seed=9)
    calibrate_(model, batches_for(model, 4))
    with torch.no_grad():
        expected = logits_of(model, inputs)
        close_(model)
        found = logits_of(model, inputs)
    assert float((found - expected).norm() / expected.norm()) < 2e-3  # what the ridge leaves


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("vit", Form.MERGE),
        slow("swin", Form.MERGE_KEEP_NORM),
        slow("timm-deit3", Form.MERGE),
        ("timm-eva02", Form.BRANCH_FIT),
        ("timm-swinv2", Form.MERGE),
        slow("timm-swinv2", Form.BRANCH_FIT),
    ],
)
def test_fit_is_nearer_than_the_mean(name, form):
    model = gated(name, form, start="fit")
    calibrate_(model, batches_for(model))
    errors = errors_of_sites(model)
    assert len(errors) >= 3
    assert max(errors) < 0.9


@pytest.mark.parametrize("plan", [{}, {"start": "fit", "end_activation": "relu"}])
def test_calibration_changes_the_pruned_sides_and_nothing_else(plan):
    model = gated("vit", **plan).train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    draws = torch.get_rng_state()
    calibrate_(model, batches_for(model))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed
    assert all(".pruned." in name for name in changed)
    assert {float(gate.lam) for _, gate in gates(model)} == {0.0}
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(draws, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_end_activation_starts_standardised():
    model = gated("vit", end_activation="relu")
    calibrate_(model, batches_for(model))
    outputs = []
    ends = [module.end for module in model.modules() if isinstance(module, EndActivation)]
    for gate in ends:
        gate.register_forward_hook(lambda gate, args, output: outputs.append((args[0], gate.pruned[0](args[0]))))
    with torch.no_grad():
        logits_of(model, batches_for(model)[0])
    assert len(outputs) == 3
    # In front of its activation, an affine map fitted to the identity is the identity.
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in outputs)


def test_batches_can_be_split_and_be_bare_tensors():
    whole, split = gated("vit", start="fit"), gated("vit", start="fit")
    images = example_inputs_of(whole, 16, seed=0)["pixel_values"]
    calibrate_(whole, [{"pixel_values": images, "labels": torch.zeros(16)}])
    calibrate_(split, list(images.split(5)))
    for (name, expected), found in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        assert torch.allclose(expected, found, rtol=1e-6, atol=1e-8), name


def test_sites_closed_earlier_are_passed_closed():
    together, in_turn = gated("vit", start="fit"), gated("vit", start="fit")
    images = batches_for(together)
    calibrate_(together, images)
    sites = find_sites(in_turn, [Form.MERGE]).sites
    for site in sites:
        calibrate_(in_turn, images, [site])
        for gate in site_gates(in_turn, site):
            gate.set_lambda_(1.0)

    def fitted(model):
        return [gate.pruned.weight for _, gate in gates(model) if isinstance(getattr(gate, "pruned", None), nn.Linear)]

    pairs = list(zip(fitted(together), fitted(in_turn), strict=True))
    assert torch.equal(*pairs[0])
    assert not any(torch.allclose(a, b) for a, b in pairs[1:])


def test_calibration_without_images_is_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        calibrate_(gated("vit"), [])


def test_calibration_of_a_site_that_is_not_in_the_plan_is_refused_and_of_no_site_does_nothing():
    model = tiny_model("vit")
    first, second, *_ = find_sites(model).sites
    gate_(model, Plan((first,), start="fit"))
    with pytest.raises(PlanError, match=r"is to be calibrated, but the model is gated at vit"):
        calibrate_(model, batches_for(model), [second])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate_(model, batches_for(model), [])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_calibration_of_an_ungated_model_is_refused():
    model = tiny_model("vit")
    with pytest.raises(PlanError, match="has no gates"):
        calibrate_(model, batches_for(model))


# convolutions

C, H = 4, 16


def conv(inner=C, outer=C, kernel=3, **options):
    return nn.Conv2d(inner, outer, kernel, **{"padding": kernel // 2, **options})


class Branch(nn.Sequential):
    """Modules in turn, around which a block adds its input if that has the same shape."""

    def forward(self, x):
        y = super().forward(x)
        return x + y if x.shape == y.shape else y


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.stem, self.blocks = conv(3, C, 1), nn.Sequential(Branch(*make()), Branch(*make()))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


def images(count=8, size=(11, 12), seed=0):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed)).double()


def gated_net(make, form=Form.MERGE, **plan):
    net = Net(make).double().eval()
    randomise_(net)
    structure = read(net, {"x": images(1)})
    sites = find_sites(net, [form], structure=structure).sites
    gate_(net, Plan(sites, **{"start": "inherit", **plan}), structure=structure)
    return net


AFFINE = {  # exact up to the border: what pads has no bias in front of it
    "3x3, 1x1": lambda: [conv(C, H), Halve(), conv(H, C, 1)],
    "stride": lambda: [conv(C, H, stride=2), Halve(), conv(H, C, 1)],
    "stride behind": lambda: [conv(C, H, 1), Halve(), conv(H, C, 1, stride=(2, 1))],
    "dilation": lambda: [conv(C, H, padding=(1, 2), dilation=(1, 2)), Halve(), conv(H, C, 1)],
    "groups": lambda: [conv(C, H, groups=2), Halve(), conv(H, C, 1, groups=2)],
    "norms": lambda: [conv(C, H), nn.BatchNorm2d(H), Halve(), conv(H, C, 1), nn.BatchNorm2d(C)],
    "1x1, 3x3": lambda: [conv(C, H, 1, bias=False), Halve(), conv(H, C)],
    "inverted residual": lambda: [
        *(conv(C, H, 1, bias=False), Halve(), conv(H, H, groups=H, stride=2), nn.BatchNorm2d(H)),
        *(Halve(), conv(H, C, 1)),
    ],
}


@pytest.mark.parametrize("make", AFFINE.values(), ids=AFFINE)
def test_fit_of_an_affine_run_of_convolutions_is_exact(make):
    model = gated_net(make, start="fit")
    calibrate_(model, [images(seed=seed) for seed in (0, 1)])
    errors = errors_of_sites(model, {"x": images(seed=9)})
    assert len(errors) == 2
    assert max(errors) < 2e-3  # what the ridge leaves


NORMED = {
    "tokens": lambda: (gated("vit", Form.MERGE_KEEP_NORM, start="fit"), example_inputs_of(tiny_model("vit"), 16)),
    "convolutions": lambda: (gated_net(AFFINE["groups"], start="fit"), {"x": images()}),
}


@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
def test_the_batch_norm_behind_a_fit_changes_nothing_and_knows_what_it_sees(make):
    model, inputs = make()
    calibrate_(model, [*inputs.values()])
    close_(model)
    seen = {}
    landings = [gate.pruned for _, gate in gates(model) if isinstance(gate, Landing)]
    for norm in landings:
        norm.register_forward_hook(lambda norm, args, output: seen.update({norm: (args[0], output)}))
    with torch.no_grad():
        model(**inputs)
        assert len(landings) == len(seen) >= 2
        for norm, (x, y) in seen.items():
            scale = float(x.abs().max())
            assert torch.allclose(x, y, rtol=0, atol=1e-6 * scale)
            assert torch.allclose(x, norm.train()(x), rtol=0, atol=0.1 * scale)  # behind others that are closed


def test_fit_of_a_run_that_pads_in_its_middle_is_no_worse_than_its_own_map():
    def make():
        return [conv(C, H), Halve(), conv(H, C)]

    fitted, inherited = (gated_net(make, Form.MERGE_WHOLE_KERNELS, start=start) for start in ("fit", "inherit"))
    calibrate_(fitted, [images()])
    pairs = zip(*(errors_of_sites(model, {"x": images()}) for model in (fitted, inherited)), strict=True)
    assert all(0.01 < fit < 0.9 * own for fit, own in pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [
            conv(C, H, 1),
            nn.BatchNorm2d(H),
            nn.ReLU6(),
            conv(H, H, groups=H),
            nn.ReLU(inplace=True),
            conv(H, C, 1),
        ],
        lambda: [conv(), nn.BatchNorm2d(C), nn.ReLU(), conv(), nn.BatchNorm2d(C)],
        lambda: [LayerNorm2d(C), conv(C, H, 1), nn.GELU(), GlobalResponseNorm(H, channels_last=False), conv(H, C, 1)],
    ],
    ids=["inverted residual", "basic block", "norms"],
)
def test_fit_of_convolutions_is_nearer_than_the_mean_and_than_closing_as_it_is(make):
    fitted, inherited = (gated_net(make, start=start) for start in ("fit", "inherit"))
    for model in (fitted, inherited):
        calibrate_(model, [images(16, seed=seed) for seed in (0, 1)])
    pairs = zip(*(errors_of_sites(model, {"x": images(seed=9)}) for model in (fitted, inherited)), strict=True)
    assert all(fit < 0.9 and fit < own for fit, own in pairs)


@pytest.mark.parametrize("sample", [240, 256])
def test_a_sample_of_patches_is_taken_from_all_columns(monkeypatch, sample):
    # Of 16 images of 16 x 16, every 16th patch lies on the border.
    errors = []
    for patches in (2**14, sample):
        monkeypatch.setattr(fitting, "PATCHES", patches)
        model = gated_net(lambda: [conv(C, H), Halve(), conv(H, C)], Form.MERGE_WHOLE_KERNELS, start="fit")
        calibrate_(model, [images(16, (16, 16))])
        errors.append(errors_of_sites(model, {"x": images(16, (16, 16), seed=9)})[0])
    assert errors[1] < 2 * errors[0]


KINDS = {
    "squeeze-excite": lambda: SqueezeExcite(H, rd_channels=8),
    "GRN": lambda: GlobalResponseNorm(H, channels_last=False),
    "norm": lambda: LayerNorm2d(H),
    "groups": lambda: nn.GroupNorm(2, H),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_batch_norm_starts_near_the_module_that_it_replaces_in_an_image(kind):
    model = gated_net(lambda: [conv(C, H), kind(), nn.ReLU(), conv(H, C, 1)])
    inputs = {"x": images(16, seed=9)}
    before = errors_of_norms(model, inputs)
    calibrate_(model, [images(16, seed=seed) for seed in (0, 1)])
    after = errors_of_norms(model, inputs)
    assert len(after) == 2
    assert all(after[path] < 0.8 * before[path] and after[path] < 0.5 for path in before)


def test_convolutions_are_fitted_alike_however_the_images_are_split():
    def make():
        return [conv(C, H, groups=2), nn.BatchNorm2d(H), nn.ReLU(), conv(H, C, 1, groups=2)]

    whole, split = (gated_net(make, start="fit", end_activation="relu") for _ in range(2))
    calibrate_(whole, [{"x": images(), "labels": torch.zeros(8)}])
    calibrate_(split, list(images().split(3)))
    for (name, expected), found in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        assert torch.allclose(expected, found, rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("start", ["inherit", "fit"])
def test_calibration_of_convolutions_changes_the_pruned_sides_and_nothing_else(start):
    def make():
        return [conv(C, H), SqueezeExcite(H), nn.ReLU(), conv(H, C, 1), nn.BatchNorm2d(C)]

    model = gated_net(make, start=start, end_activation="relu").train()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    calibrate_(model, [images()])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed
    assert all(".pruned." in name for name in changed)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_end_of_a_convolutional_block_starts_standardised():
    model = gated_net(lambda: [conv(), nn.BatchNorm2d(C), nn.ReLU(), conv()], end_activation="relu")
    calibrate_(model, [images()])
    ends = [module.end for module in model.modules() if isinstance(module, EndActivation)]
    assert [type(end.pruned[0]) for end in ends] == [nn.BatchNorm2d, nn.BatchNorm2d]
    outputs = []
    for end in ends:
        end.register_forward_hook(lambda gate, args, output: outputs.append((args[0], gate.pruned[0](args[0]))))
    with torch.no_grad():
        model(images())
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in outputs)


# statistics of what is left


class Norms(nn.Module):
    """BatchNorms whose input is plain to see: each is given the images themselves."""

    def __init__(self):
        super().__init__()
        self.first, self.tokens = nn.BatchNorm2d(3, momentum=0.25), ChannelBatchNorm(12)
        self.drop, self.unused = nn.Dropout(), nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return (self.first(x) + self.frozen(x) + self.tokens(self.drop(x))).mean((2, 3))


def test_recalibration_gives_the_statistics_of_the_images():
    model = Norms().double().eval()
    model.first.train()
    model.first.running_mean.fill_(7.0)
    modes = [module.training for module in model.modules()]
    batches = [images(6, seed=seed) * (seed + 1) + seed for seed in (0, 1, 2)]
    recalibrate_batch_norms_(model, batches)
    for norm, axes in ((model.first, (0, 2, 3)), (model.tokens.norm, (0, 1, 2))):
        mean = sum(x.mean(axes) for x in batches) / 3
        variance = sum(x.var(axes) for x in batches) / 3
        assert torch.allclose(norm.running_mean, mean, rtol=1e-10, atol=1e-12)
        assert torch.allclose(norm.running_var, variance, rtol=1e-10, atol=1e-12)
    assert (model.first.momentum, model.tokens.norm.momentum) == (0.25, 0.1)
    assert [module.training for module in model.modules()] == modes
    assert model.first.weight.grad is None


def test_recalibration_does_not_depend_on_what_was_there_nor_on_the_order_of_batches():
    batches = [images(4, seed=seed) for seed in (0, 1)]
    states = []
    for order in (1, -1):
        model = Norms().double().eval()
        model.first.running_mean.normal_()
        model.first.running_var.uniform_(0.5, 1.5)
        recalibrate_batch_norms_(model, batches[::order])
        states.append([model.first.running_mean, model.first.running_var, model.tokens.norm.running_var])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*states, strict=True))


def test_recalibration_restores_momentum_and_modes_when_a_forward_fails():
    model = Norms().double()
    model.drop.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        recalibrate_batch_norms_(model, [images(), torch.zeros(2, 5, 7, 7)])
    assert (model.first.momentum, model.tokens.norm.momentum) == (0.25, 0.1)
    assert [module.training for module in model.modules()] == modes


def test_recalibration_leaves_what_saw_nothing_alone():
    model = Norms().double().eval()
    model.unused.running_mean.fill_(7.0)
    recalibrate_batch_norms_(model, [images()])
    assert float(model.unused.running_mean[0]) == 7.0


def test_recalibration_without_images_is_refused_and_without_norms_does_nothing():
    with pytest.raises(ValueError, match="no calibration batches"):
        recalibrate_batch_norms_(Norms(), [])
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    state = copy.deepcopy(model.state_dict())
    recalibrate_batch_norms_(model, [images().float()])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
