"""Image features that are fitted to no data, for models that learn from few or noisy gradients.

A function of one image alone, whose settings and seeds are public, costs no privacy. `FeatureMap` makes them,
`features_of` computes those of a data set, or finds them in the user's cache.
"""

from dpml.features.cache import features_of
from dpml.features.maps import FeatureMap

__all__ = ["FeatureMap", "features_of"]
