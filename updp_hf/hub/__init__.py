"""Merged models on the Hub and in folders.

Model files that release 0.1 has published call `updp_hf.hub.push_model`, so that name stays.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
