import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("unicfg", deadline=None, max_examples=50)
settings.load_profile("unicfg")
