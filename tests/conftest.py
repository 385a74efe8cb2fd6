import os

os.environ["TQDM_DISABLE"] = "1"  # bars would bury what a failing test prints

import torch
from hypothesis import settings

# more threads than idle cores wait for one another
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
settings.register_profile("unicfg", deadline=None, max_examples=50)
settings.load_profile("unicfg")
