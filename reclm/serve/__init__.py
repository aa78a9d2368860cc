"""From a trained model to items for a person. `import reclm.serve` needs numpy alone: torch or onnxruntime is
imported by `Recommender.load`, as the model at hand requires."""

import os

# Before torch and numpy are imported: spinning, idle threads of torch halve the speed of processes that share
# cores; and of a product that two threads start at once, BLAS would make four.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from reclm.serve.catalogue import Catalogue, Filters
from reclm.serve.person import Person
from reclm.serve.recommender import Item, Reason, Recommender, Session

__all__ = ["Catalogue", "Filters", "Item", "Person", "Reason", "Recommender", "Session"]
