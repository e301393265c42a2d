"""Make a vision checkpoint faster by removing depth, inside the Hugging Face Trainer.

Importing the package makes pruned models known to `AutoConfig`, `AutoModelForImageClassification` and, those that came
from timm, to `timm.create_model`.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoModelForImageClassification

import updp_hf.timm_models  # noqa: F401  # registers
from updp_hf.calibration import calibrate_, recalibrate_batch_norms_
from updp_hf.callback import UPDPCallback
from updp_hf.configuration_updp import UPDPConfig
from updp_hf.core.budget import Budget
from updp_hf.core.closable import register_closable
from updp_hf.core.cost import LatencyTable
from updp_hf.core.plan import Plan
from updp_hf.core.policy import ramp
from updp_hf.core.sites import Form, Site
from updp_hf.hub import HubError, push_folder
from updp_hf.merging import merge
from updp_hf.metrics import Accuracy, TopKAccuracy, compute_accuracy
from updp_hf.modeling_updp import UPDPForImageClassification
from updp_hf.prune import prune
from updp_hf.report import Report
from updp_hf.supernet import SupernetTrainer
from updp_hf.surgery import close_, find_sites, gate_
from updp_hf.trainer import UPDPTrainer
from updp_hf.training_args import UPDPTrainingArguments

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
