"""Make a vision checkpoint faster by removing depth, inside the Hugging Face Trainer.

Importing the package makes pruned models known to `AutoConfig`, `AutoModelForImageClassification` and, those that came
from timm, to `timm.create_model`. It imports none of these libraries itself: each name is loaded when it is first used.
"""

from importlib.metadata import version
from typing import Any

import lazy_loader

from updp_hf.registration import register_when_imported

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    return version("updp-hf") if name == "__version__" else _public(name)


register_when_imported()
