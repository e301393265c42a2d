"""Make a vision checkpoint faster by removing depth, inside the Hugging Face Trainer.

Importing the package makes pruned models known to `AutoConfig`, `AutoModelForImageClassification` and, those that came
from timm, to `timm.create_model`.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoModelForImageClassification

import updp_hf.hub.timm_models  # noqa: F401  # registers
from updp_hf.core.cost import LatencyTable
from updp_hf.core.graph.roles import register_closable
from updp_hf.core.kinds import Form
from updp_hf.core.plan.budget import Budget
from updp_hf.core.plan.plan import Plan
from updp_hf.core.plan.site import Site
from updp_hf.core.schedule import ramp
from updp_hf.errors import HubError
from updp_hf.hub.push import push_folder
from updp_hf.model.configuration_updp import UPDPConfig
from updp_hf.model.modeling_updp import UPDPForImageClassification
from updp_hf.prune import prune
from updp_hf.reporting.report import Report
from updp_hf.surgery.calibrate import calibrate_
from updp_hf.surgery.corrections import recalibrate_batch_norms_
from updp_hf.surgery.find import find_sites
from updp_hf.surgery.gate import close_, gate_
from updp_hf.surgery.merge import merge
from updp_hf.training.arguments import UPDPTrainingArguments
from updp_hf.training.callback import UPDPCallback
from updp_hf.training.metrics import Accuracy, TopKAccuracy, compute_accuracy
from updp_hf.training.supernet import SupernetTrainer
from updp_hf.training.trainer import UPDPTrainer

__all__ = [
    "Accuracy",
    "Budget",
    "Form",
    "HubError",
    "LatencyTable",
    "Plan",
    "Report",
    "Site",
    "SupernetTrainer",
    "TopKAccuracy",
    "UPDPCallback",
    "UPDPConfig",
    "UPDPForImageClassification",
    "UPDPTrainer",
    "UPDPTrainingArguments",
    "calibrate_",
    "close_",
    "compute_accuracy",
    "find_sites",
    "gate_",
    "merge",
    "prune",
    "push_folder",
    "ramp",
    "recalibrate_batch_norms_",
    "register_closable",
]

__version__ = version("updp-hf")

AutoConfig.register(UPDPConfig.model_type, UPDPConfig, exist_ok=True)
AutoModelForImageClassification.register(UPDPConfig, UPDPForImageClassification, exist_ok=True)
