"""Published private results on public benchmarks, to be drawn beside one's own.

Each was looked up in the source itself or in a later paper's table of it. What could not be is not here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        dataset: Name of the data set, as in `summary.json`.
        epsilon: ε as reported.
        accuracy: Test accuracy as reported, in [0, 1]. Most papers report the best of a search.
        method: What was trained.
        citation: Authors and year.
        address: Where to read it.
        note: What to know before comparing.
        delta: δ as reported.
        data_dependent: Whether ε was computed from private votes: smaller than what could be published.
    """

    dataset: str
    epsilon: float
    accuracy: float
    method: str
    citation: str
    address: str
    note: str = ""
    delta: float = 1e-5
    data_dependent: bool = False


_LOOSE = "ε by the moments accountant: looser than today's"
_ABADI = ("Abadi et al. 2016", "https://arxiv.org/abs/1607.00133")
_PATE = ("Papernot et al. 2017", "https://arxiv.org/abs/1610.05755")
_SCALABLE = ("Papernot et al. 2018", "https://arxiv.org/abs/1802.08908")
_TEMPERED = ("Papernot et al. 2020", "https://arxiv.org/abs/2007.14191")
_FEATURES = ("Tramèr & Boneh 2021", "https://arxiv.org/abs/2011.11660")
_SCALE = ("De et al. 2022", "https://arxiv.org/abs/2204.13650")
_PRIORS = ("Tang et al. 2023", "https://arxiv.org/abs/2306.06076")
_VOTES = "ε depends on the votes and was not sanitised"

PUBLISHED = (
    Published("mnist", 2.0, 0.95, "DP-SGD", *_ABADI, _LOOSE),
    Published("mnist", 8.0, 0.97, "DP-SGD", *_ABADI, _LOOSE),
    Published("mnist", 2.04, 0.98, "PATE, LNMax", *_PATE, _VOTES, data_dependent=True),
    Published("mnist", 1.97, 0.985, "PATE, Confident-GNMax", *_SCALABLE, _VOTES, data_dependent=True),
    Published("mnist", 2.93, 0.981, "DP-SGD, tempered sigmoids", *_TEMPERED),
    Published("mnist", 3.0, 0.987, "DP-SGD, ScatterNet + CNN", *_FEATURES),
    Published("fashion-mnist", 2.7, 0.819, "DP-SGD, ReLU", *_TEMPERED),
    Published("fashion-mnist", 2.7, 0.861, "DP-SGD, tempered sigmoids", *_TEMPERED),
    Published("fashion-mnist", 3.0, 0.897, "DP-SGD, ScatterNet + linear", *_FEATURES),
    Published("cifar10", 8.0, 0.73, "DP-SGD", *_ABADI, f"pretrained on CIFAR-100, {_LOOSE}"),
    Published("cifar10", 7.53, 0.662, "DP-SGD, tempered sigmoids", *_TEMPERED),
    Published("cifar10", 3.0, 0.693, "DP-SGD, ScatterNet + CNN", *_FEATURES),
    Published("cifar10", 8.0, 0.814, "DP-SGD, WRN-40-4", *_SCALE, "GPUs or TPUs"),
    Published("cifar10", 1.0, 0.723, "DP-RandP", *_PRIORS, "prior from synthetic images, GPU"),
)


def published_results(dataset: str) -> list[Published]:
    """What is known of a data set, smallest ε first."""
    return sorted((found for found in PUBLISHED if found.dataset == dataset), key=lambda p: p.epsilon)
