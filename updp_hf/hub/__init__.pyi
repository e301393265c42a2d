from .push import HubError as HubError
from .push import push_folder as push_folder
from .push import push_model as push_model
