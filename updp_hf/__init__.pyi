"""The public names. They are imported from here when they are first used, and type checkers read them here."""

from .core.cost import LatencyTable as LatencyTable
from .core.graph.roles import register_closable as register_closable
from .core.kinds import Form as Form
from .core.plan.budget import Budget as Budget
from .core.plan.plan import Plan as Plan
from .core.plan.site import Site as Site
from .core.schedule import ramp as ramp
from .errors import HubError as HubError
from .errors import UPDPError as UPDPError
from .hub.push import push_folder as push_folder
from .model.configuration_updp import UPDPConfig as UPDPConfig
from .model.modeling_updp import UPDPForImageClassification as UPDPForImageClassification
from .prune import prune as prune
from .reporting.report import Report as Report
from .surgery.calibrate import calibrate_ as calibrate_
from .surgery.corrections import recalibrate_batch_norms_ as recalibrate_batch_norms_
from .surgery.find import find_sites as find_sites
from .surgery.gate import close_ as close_
from .surgery.gate import gate_ as gate_
from .surgery.merge import merge as merge
from .training.arguments import UPDPTrainingArguments as UPDPTrainingArguments
from .training.callback import UPDPCallback as UPDPCallback
from .training.metrics import Accuracy as Accuracy
from .training.metrics import TopKAccuracy as TopKAccuracy
from .training.metrics import compute_accuracy as compute_accuracy
from .training.supernet import SupernetTrainer as SupernetTrainer
from .training.trainer import UPDPTrainer as UPDPTrainer

__version__: str
