"""The Trainer's arguments, and those that pruning adds."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.core.plan.budget import Budget
from updp_hf.core.plan.plan import Plan
from updp_hf.core.schedule import RAMP_END, ramp
from updp_hf.errors import PlanError, UPDPError
from updp_hf.model.modules_updp import END_ACTIVATIONS
from updp_hf.selection.selectors import SELECTORS
from updp_hf.selection.supernet import SUPERNET

__all__ = ["UPDPTrainingArguments"]


@dataclass
class UPDPTrainingArguments(TrainingArguments):
    """Arguments of `UPDPTrainer`: all of `TrainingArguments`, and what to prune and how."""

    ALTERNATIVES: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("num_pruned_blocks", "target_speed_up", "target_macs", "target_parameters", "plan"),
    )
    """Groups of fields of which one is to be given."""

    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "When to push: at the end, since unfinished weights are no pruned model."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave a loss that is NaN out of the log; by default it ends the training."}
    )
    num_pruned_blocks: int | None = field(
        default=None,
        metadata={
            "help": "How many sites to prune: in most networks there is one in a block. Give this, one of the three "
            "targets, or `plan`."
        },
    )
    target_speed_up: float | None = field(
        default=None,
        metadata={"help": "Latency before / after to be reached on this device at the evaluation batch size, above 1."},
    )
    target_macs: float | None = field(
        default=None, metadata={"help": "Largest fraction of the multiply-accumulates that may be left, below 1."}
    )
    target_parameters: float | None = field(
        default=None, metadata={"help": "Largest fraction of the parameters that may be left, below 1."}
    )
    plan: str | None = field(
        default=None, metadata={"help": "JSON file of a plan, which says exactly what to prune. In code, also a Plan."}
    )
    selector: str = field(
        default="greedy",
        metadata={"help": "How to choose the blocks if there is no plan.", "choices": [*SELECTORS, SUPERNET]},
    )
    supernet_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Length of the training of the supernet, for the selector of that name, as a fraction of the "
            "epochs or steps of the pruning that follows; each of its steps computes four networks."
        },
    )
    start_from_supernet: bool = field(
        default=False,
        metadata={"help": "Prune the supernet's weights, for the selector of that name, and not the checkpoint's."},
    )
    form: str = field(
        default=DEFAULT_FORM,
        metadata={"help": "What pruning leaves of a block.", "choices": list(map(str, Form))},
    )
    cost: str = field(
        default="macs",
        metadata={
            "help": "What merging has to save: MACs, or latency measured on this device at the evaluation batch size.",
            "choices": ["macs", "latency"],
        },
    )
    start: str = field(
        default="fit",
        metadata={
            "help": "Where the pruned branch starts: from a fit to the branch, with a BatchNorm behind it, or from the "
            "checkpoint's own weights (inherit, as in UPDP).",
            "choices": ["inherit", "fit"],
        },
    )
    end_activation: str | None = field(
        default=None,
        metadata={
            "help": "Activation put behind each pruned block after a BatchNorm (UPDP); none by default.",
            "choices": list(END_ACTIVATIONS),
        },
    )
    ramp: str = field(
        default="linear", metadata={"help": "Shape of λ over the ramp.", "choices": ["linear", "cosine", "constant"]}
    )
    ramp_start: float = field(default=0.0, metadata={"help": "Where λ leaves 0, as a fraction of all steps."})
    ramp_end: float = field(default=RAMP_END, metadata={"help": "Where λ reaches 1, as a fraction of all steps."})
    calibration_size: int = field(
        default=256, metadata={"help": "Number of training images used to calibrate, fit and select."}
    )
    distillation: str = field(
        default="none",
        metadata={
            "help": "Learn from the teacher's probabilities (soft), its classes (hard), or not at all.",
            "choices": ["none", "soft", "hard"],
        },
    )
    distillation_weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher in the loss, from 0 to 1; the labels have the rest."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Temperature of soft distillation, above 0."})
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay for each step of the exponential moving average of the weights, below 1; the average is "
            "what is evaluated and merged. None keeps no average."
        },
    )
    sync_batch_norm: bool = field(
        default=False,
        metadata={"help": "Normalise by the images of all GPUs: for few images on each. Of no effect on one device."},
    )

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()
        (asked,) = UPDPTrainingArguments.ALTERNATIVES
        given = [f"`{name}`" for name in asked if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(f"`{name}`" for name in asked[:-1])
            raise UPDPError(f"Of {names} and `plan`, {' and '.join(given) or 'none'} is given: give one of them.")
        self.budget()  # raises what is wrong with it
        for name, choices in (
            ("selector", (*SELECTORS, SUPERNET)),
            ("form", tuple(Form)),
            ("cost", ("macs", "latency")),
            ("start", ("inherit", "fit")),
            ("end_activation", (None, *END_ACTIVATIONS)),
            ("distillation", ("none", "soft", "hard")),
        ):
            if getattr(self, name) not in choices:
                raise UPDPError(f"`{name}` is {getattr(self, name)!r}, expected one of {[str(c) for c in choices]}.")
        ramp(self.ramp, self.ramp_start, self.ramp_end)  # type: ignore[arg-type]  # raises what is wrong with it
        if not 0.0 <= self.distillation_weight <= 1.0 or not self.temperature > 0.0 or self.calibration_size < 1:
            raise UPDPError(
                f"`distillation_weight` is {self.distillation_weight}, `temperature` {self.temperature} and "
                f"`calibration_size` {self.calibration_size}, expected a weight in [0, 1], a temperature above 0 and "
                "at least one image."
            )
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise UPDPError(f"`ema_decay` is {self.ema_decay}, expected a decay between 0 and 1, or none.")
        if not self.supernet_fraction > 0.0:
            raise UPDPError(f"`supernet_fraction` is {self.supernet_fraction}, expected a fraction above 0.")
        if self.start_from_supernet and self.selector != SUPERNET:
            raise UPDPError(
                f"`start_from_supernet` is on, but the selector is {self.selector!r}, which trains no supernet: set "
                "`selector` to 'supernet'."
            )
        strategy = HubStrategy(self.hub_strategy)
        if self.push_to_hub and strategy is not HubStrategy.END:
            raise UPDPError(
                f"`hub_strategy` is {strategy.value!r}, which would publish unfinished weights under the "
                "model's name: set it to 'end'."
            )
        if self.enable_jit_checkpoint:
            raise UPDPError(
                "`enable_jit_checkpoint` is on, which ends a training that was interrupted as if it were finished: "
                "leave it off, and go on from the last checkpoint with `resume_from_checkpoint`."
            )
        # An open or closed gate leaves one of its sides without gradients.
        self.ddp_find_unused_parameters: bool | None = self.ddp_find_unused_parameters is not False

    def budget(self) -> Budget | None:
        """Return how much is to be pruned, None if a plan says it.

        Raises:
            ValueError: no model could be pruned so much.
        """
        if self.plan is not None:
            return None
        return Budget(self.num_pruned_blocks, self.target_speed_up, self.target_macs, self.target_parameters)

    def selection_options(self) -> dict[str, Any]:
        """Return what `choose` and `pareto_front` are told."""
        return {
            **{name: getattr(self, name) for name in ("form", "start", "end_activation", "seed")},
            "cost": self.cost if self.target_speed_up is None else "latency",
            "batch_size": self.per_device_eval_batch_size,
        }

    def given_plan(self) -> Plan | None:
        """Return the plan that the arguments give, None if the blocks are to be selected.

        Raises:
            PlanError: the file holds no plan.
        """
        return self.plan if isinstance(self.plan, Plan) or self.plan is None else Plan.load(self.plan)

    def check_same_plan(self, plan: Plan, checkpoint: str) -> None:
        """Refuse to resume `checkpoint`, whose plan is not what the arguments ask for.

        Raises:
            PlanError: it is not.
        """
        given = self.given_plan()
        if given is not None:
            is_asked_for = given.digest() == plan.digest()
        else:
            asked = (self.num_pruned_blocks or len(plan.sites), {self.form}, self.start, self.end_activation)
            is_asked_for = asked == (len(plan.sites), {s.form for s in plan.sites}, plan.start, plan.end_activation)
        if not is_asked_for:
            raise PlanError(
                f"{checkpoint} prunes otherwise than the arguments ask ({', '.join(map(str, plan.sites))}; start "
                f"{plan.start!r}, end activation {plan.end_activation!r}): resume with the arguments of that run."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as JSON values, a plan given as an object included."""
        document: dict[str, Any] = super().to_dict()
        if isinstance(self.plan, Plan):
            document["plan"] = self.plan.to_dict()
        return document
