"""Makes pruned models known to transformers and timm, as soon as these are imported and not before.

The order of imports does not matter: a hook runs at once if its module has been imported already.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook

__all__ = ["register_when_imported", "updp"]


def register_when_imported() -> None:
    """Wait for the libraries that look models up by name, and for the two files that hold ours."""
    for hook, module in (
        (_import_config, "transformers.models.auto.configuration_auto"),
        (_import_model, "transformers.models.auto.modeling_auto"),
        (_register_config, "updp_hf.model.configuration_updp"),
        (_register_model, "updp_hf.model.modeling_updp"),
        (_register_in_timm, "timm"),
    ):
        register_post_import_hook(hook, module)


# Our files import the auto classes, too. So they are registered when they are complete, whoever imported them.


def _import_config(_: ModuleType) -> None:
    import_module("updp_hf.model.configuration_updp")


def _import_model(_: ModuleType) -> None:
    import_module("updp_hf.model.modeling_updp")


def _register_config(ours: ModuleType) -> None:
    from transformers import AutoConfig

    AutoConfig.register(ours.UPDPConfig.model_type, ours.UPDPConfig, exist_ok=True)


def _register_model(ours: ModuleType) -> None:
    from transformers import AutoModelForImageClassification

    model_class = ours.UPDPForImageClassification
    model_class.push_with_card = _push
    AutoModelForImageClassification.register(model_class.config_class, model_class, exist_ok=True)


def _register_in_timm(_: ModuleType) -> None:
    from timm.models import register_model

    register_model(updp)


def updp(pretrained: bool = False, **options: Any) -> Any:
    """Build the timm network of a merged model: timm calls it by this name. See `updp_hf.hub.timm_models`."""
    from updp_hf.hub.timm_models import create_network

    return create_network(pretrained, **options)


def _push(model: Any, repo_id: str, **options: Any) -> Any:
    from updp_hf.hub.push import push_model

    return push_model(model, repo_id, **options)
