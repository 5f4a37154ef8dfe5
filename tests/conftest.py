"""Every test runs torch on one thread: the sizes are tiny, and results do not depend on the machine."""

import torch

torch.set_num_threads(1)
