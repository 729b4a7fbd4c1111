"""Teachers and their votes on the public inputs: trained, or taken from the cache of the user.

What is cached is private, and readable by its owner alone. A changed noise level then costs seconds. The key
holds everything that the votes follow from: records, public inputs, settings and versions.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from accounting import UserError
from dpml.data.official import cache_folder
from dpml.outputs import write_private
from dpml.pate.config import PATEConfig
from dpml.pate.features import Features, features_by_name
from dpml.pate.partition import Partition, default_places, record_digests
from dpml.pate.teachers import (
    Ensemble,
    Progress,
    load_ensemble,
    silent,
    train_convolutional,
    train_linear,
)
from dpml.paths import require_plain

_VERSION = 2
_VOTES = "votes.npy"


@dataclass(frozen=True, eq=False)
class Voters:
    """An ensemble and how it votes on the public inputs. Private.

    Attributes:
        ensemble: The teachers.
        votes: Int64 [public inputs, classes].
    """

    ensemble: Ensemble
    votes: Tensor


def obtain_voters(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    public: Tensor,
    config: PATEConfig,
    *,
    features: Features | None = None,
    progress: Progress,
) -> Voters:
    """Train the teachers and let them vote, or find both in the cache.

    Args:
        inputs: Private records, [n, ...].
        labels: Their classes, int64 [n].
        classes: Number of classes.
        public: Public inputs.
        config: The teachers' settings.
        features: A function of the caller's for linear teachers; its votes are not cached.
        progress: Told about finished teachers.
    """
    folder = None
    if features is None and not config.no_cache:
        folder = cache_folder() / "pate" / _key(inputs, labels, classes, public, config)
        if (found := _cached(folder, len(public), classes, config.teachers)) is not None:
            progress(config.teachers, config.teachers)
            return found
    ensemble = train_teachers(inputs, labels, classes, config, features=features, progress=progress)
    votes = ensemble.votes(public)
    if folder is not None:
        _store(folder, ensemble, votes)
    return Voters(ensemble, votes)


def train_teachers(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    config: PATEConfig,
    *,
    features: Features | None = None,
    progress: Progress = silent,
) -> Ensemble:
    """Partition the records and train a teacher on each shard, all together.

    Raises:
        UserError: if there are fewer records than teachers, or the teachers cannot take such inputs.
    """
    places = config.places or default_places(len(inputs), config.teachers)
    shape = tuple(inputs.shape[1:])
    if config.teacher == "linear":
        name, function = ("function", features) if features else features_by_name(config.features, shape)
    elif features is not None:
        raise UserError("Features are for linear teachers; leave them out for convolutional ones.")
    partition = Partition.of(inputs, labels, config.teachers, places=places, key=config.seed)
    if config.teacher == "linear":
        return train_linear(
            inputs,
            labels,
            classes,
            partition,
            features=name,
            function=function,
            ridge=config.ridge,
            progress=progress,
        )
    return train_convolutional(
        inputs,
        labels,
        classes,
        partition,
        steps=config.teacher_steps,
        batch_size=config.teacher_batch_size,
        learning_rate=config.teacher_learning_rate,
        shift=config.teacher_shift,
        seed=config.seed,
        progress=progress,
    )


def teacher_settings(config: PATEConfig) -> dict[str, object]:
    """The settings that votes follow from."""
    linear = ("features", "ridge")
    convolutional = ("teacher_steps", "teacher_batch_size", "teacher_learning_rate", "teacher_shift")
    own = linear if config.teacher == "linear" else convolutional
    return {name: getattr(config, name) for name in ("teacher", "teachers", "places", "seed", *own)}


def _key(inputs: Tensor, labels: Tensor, classes: int, public: Tensor, config: PATEConfig) -> str:
    settings = {
        **teacher_settings(config),
        "classes": classes,
        "version": _VERSION,
        "torch": torch.__version__,
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    shapes = (tuple(inputs.shape), tuple(public.shape))
    digest.update(repr(shapes).encode())
    digest.update(record_digests(inputs, labels, 0))
    digest.update(record_digests(public, torch.zeros(len(public), dtype=torch.int64), 0))
    return digest.hexdigest()


def _cached(folder: Path, public: int, classes: int, teachers: int) -> Voters | None:
    """What is in the cache, if it is whole."""
    try:
        ensemble, _ = load_ensemble(folder)
        require_plain(folder / _VOTES)
        votes = torch.from_numpy(np.load(folder / _VOTES, allow_pickle=False))
    except (UserError, OSError, ValueError, EOFError, SyntaxError, TokenError):  # a header is read as Python
        return None
    whole = votes.shape == (public, classes) and votes.dtype == torch.int64
    if not whole or ensemble.teachers != teachers or not bool((votes.sum(dim=1) == teachers).all()):
        return None
    return Voters(ensemble, votes)


def _store(folder: Path, ensemble: Ensemble, votes: Tensor) -> None:
    """Keep for the next time; a cache that cannot be written is none."""
    buffer = io.BytesIO()
    np.save(buffer, votes.numpy(), allow_pickle=False)
    try:
        ensemble.save(folder)
        write_private(folder / _VOTES, buffer.getvalue())
    except OSError:
        return
