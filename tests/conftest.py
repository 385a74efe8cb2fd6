import os

os.environ["TQDM_DISABLE"] = "1"  # bars would bury what a failing test prints

import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("unicfg", deadline=None, max_examples=50)
settings.load_profile("unicfg")
