"""The PyTorch engine: Hugging Face causal language models trained by GRPO."""

import os

# Behind `import torch` it would be too late. GNU OpenMP's threads wait by spinning ten times longer than this, which
# gains nothing here and makes any other work on the same cores slow the run manyfold.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
