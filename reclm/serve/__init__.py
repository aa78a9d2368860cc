"""From a trained model to items for a person. `import reclm.serve` needs numpy alone: torch or onnxruntime is
imported by `Recommender.load`, as the model at hand requires."""

import os

# Before torch is imported: spinning, its idle threads halve the speed of processes that share cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from reclm.serve.catalogue import Catalogue, Filters
from reclm.serve.person import Person
from reclm.serve.recommender import Item, Reason, Recommender, Session

__all__ = ["Catalogue", "Filters", "Item", "Person", "Reason", "Recommender", "Session"]
