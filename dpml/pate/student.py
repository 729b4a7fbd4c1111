"""The student of PATE: a model from public inputs, few of which the teachers have answered.

Everything here is public or paid for already: inputs, answers, and what is made of them. So batch
normalisation and any augmentation are free, and the answers may be used as often as one likes.

The answers spread to first guesses for all public inputs (`dpml.pate.guesses`). The surest of these, and
for the others the confident ones of the moving average of the student itself, are the classes by which it
learns from strongly changed inputs.

Sources: Papernot et al., "Semi-supervised knowledge transfer for deep learning from private training data"
(ICLR 2017) and "Scalable private learning with PATE" (ICLR 2018); Sohn et al., "FixMatch: simplifying
semi-supervised learning with consistency and confidence" (NeurIPS 2020); Tarvainen & Valpola, "Mean teachers
are better role models" (NeurIPS 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from accounting.errors import UserError
from accounting.events import check_count, check_number, shown
from dpml.averaging import WeightAverage
from dpml.pate.guesses import first_guesses, form, require_inputs

StudentMethod = Literal["supervised", "fixmatch", "spread"]
Report = Callable[[int, int, nn.Module], None]
_METHODS: tuple[StudentMethod, ...] = get_args(StudentMethod)
_HIDDEN, _WARM_UP = 128, 30
_CHANGES = (0.35, 0.35, 0.18, 0.18, 0.17, 0.17)
"""Largest angle, shear, logarithms of two scales, and two shifts (in half sides) at strength 1."""
_BEND = 0.0375
"""Standard deviation of 5×5 shifts between which an image is bent, in half sides, at strength 1."""

_RANGES = {
    "learning_rate": (10.0, "neither"),
    "weight_decay": (1e3, "left"),
    "spread_share": (1.0, "both"),
    "spread_kept": (1.0, "right"),
    "threshold": (1.0, "left"),
    "average": (1.0, "left"),
    "strength": (2.0, "both"),
}
"""Of each setting, from 0 to what it may be, and which of these two belong to it."""


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """How a student is trained. The defaults were chosen on MNIST's training images alone."""

    method: StudentMethod = "spread"
    """supervised (from the answers alone), fixmatch (and from the student's own confident guesses on the
    other inputs), or spread (from first guesses that are made of the answers, and its own on the others)."""
    epochs: int = 24
    """Passes over the public inputs."""
    batch_size: int = 128
    """Public inputs in a step."""
    answer_batch_size: int = 32
    """Answered inputs in a step, beside the others, for the methods fixmatch and supervised."""
    width: int = 24
    """Filters of the first convolution; the next ones have two and four times as many."""
    learning_rate: float = 0.003
    """Highest learning rate of AdamW; it rises for the first steps and then falls to zero as a cosine."""
    weight_decay: float = 1e-3
    """Weight decay of AdamW."""
    spread_share: float = 0.3
    """Share of the epochs after which the student's own guesses count beside the first ones, for spread."""
    spread_kept: float = 0.9
    """Share of the public inputs, those where they are surest, for which first guesses count."""
    threshold: float = 0.95
    """Confidence from which the student's own guess counts, in [0, 1)."""
    average: float = 0.999
    """Decay of the moving average of the weights, which guesses and is the result."""
    strength: float = 0.8
    """How strongly inputs are changed. At 1, images turn by up to 20°, shift by 1/12 of a side, and bend;
    features get noise of 0.3 standard deviations."""
    flip: bool = False
    """Also mirror half of the images: for photographs, not for digits."""

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise UserError(f"The method must be one of {', '.join(_METHODS)}. Got {shown(self.method)}.")
        for name in ("epochs", "batch_size", "answer_batch_size", "width"):
            least = 1 if name == "epochs" else 2  # normalisation needs two
            object.__setattr__(self, name, check_count(getattr(self, name), name, "a student", low=least))
        for name, (high, closed) in _RANGES.items():
            value = check_number(getattr(self, name), name, "a student", low=0, high=high, closed=closed)
            object.__setattr__(self, name, value)
        if not isinstance(self.flip, bool):
            raise UserError(
                f"The 'flip' parameter of a student must be True or False. Got {shown(self.flip)}."
            )


def train_student(
    public: Tensor,
    asked: Tensor,
    answers: Tensor,
    classes: int,
    settings: StudentSettings | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> nn.Module:
    """Train a student on public inputs, some of which have an answer. It costs no privacy.

    The result is the same for the same seed and number of threads, on the CPU. The caller's random state
    stays as it is. The method spread takes classes for about equally frequent among the inputs.

    Args:
        public: All public inputs, float32 [n, channels, height, width] (images in [0, 1], 4×4 or larger) or
            [n, features].
        asked: Rows of `public` that have an answer, int64 [k], each once.
        answers: Their classes, int64 [k]; or soft ones, floats [k, classes] that sum to one in each row.
        classes: Number of classes, 2 or more. Not each must have an answer.
        settings: How to train; by default as `StudentSettings` has it.
        seed: Fixes initial weights, order and augmentation.
        device: Where to compute.
        report: Called after each epoch as `report(epoch, epochs, student)`, epochs from 1. It must not
            change the student's weights.

    Returns:
        The student in eval mode, on `device`: from float32 [m, ...] to logits [m, classes].

    Raises:
        UserError: for inputs, rows or answers of another form, without answers, or out of range.
    """
    settings = StudentSettings() if settings is None else settings
    require_inputs(public)
    targets = _targets(public, asked, answers, check_count(classes, "classes", "a student", low=2))
    seed = check_count(seed, "seed", "a student")
    public, asked, targets = public.to(device), asked.to(device), targets.to(device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        student = _network(public, targets.shape[1], settings.width).to(device)
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # half the time
        guesses = first_guesses(public, asked, targets) if settings.method == "spread" else None
        return _learn(student, public, asked, targets, guesses, settings, report)


def _network(public: Tensor, classes: int, width: int) -> nn.Sequential:
    """Three convolutions and a hidden layer, or two hidden layers for vectors, all with BatchNorm."""
    layers: list[nn.Module] = []
    if public.dim() == 2:
        layers += [nn.Linear(public.shape[1], _HIDDEN), nn.BatchNorm1d(_HIDDEN), nn.ReLU()]
        outputs = _HIDDEN
    else:
        before, sides = public.shape[1], list(public.shape[2:])
        for after in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
            if min(sides) >= 8:
                layers.append(nn.MaxPool2d(2))
                sides = [side // 2 for side in sides]
        sides = [min(side, 7) for side in sides]
        layers += [nn.AdaptiveAvgPool2d((sides[0], sides[1])), nn.Flatten()]
        outputs = before * math.prod(sides)
    hidden = [nn.Linear(outputs, _HIDDEN, bias=False), nn.BatchNorm1d(_HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, *hidden, nn.Linear(_HIDDEN, classes))


def _learn(
    student: nn.Module,
    public: Tensor,
    asked: Tensor,
    targets: Tensor,
    guesses: Tensor | None,
    settings: StudentSettings,
    report: Report | None,
) -> nn.Module:
    """Train on answers or guesses of them; return the average over the steps.

    With first guesses [n, classes], the surest of them stand for good, and the answers are among what they
    were made of. The others are guessed by the student itself, as all are without first guesses.
    """
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=settings.weight_decay)
    average = WeightAverage(student, settings.average)
    steps = settings.epochs * _steps(len(public), settings)
    least = 0.0 if guesses is None else guesses.amax(dim=1).quantile(1 - settings.spread_kept).clamp(min=1e-6)
    for step, chosen in enumerate(_batches(len(public), settings, optimizer)):
        rows = chosen.to(public.device)
        shown, wanted = [], []
        if guesses is None:
            picked = torch.randint(len(asked), (settings.answer_batch_size,), device=public.device)
            shown.append(asked[picked])
            wanted.append(targets[picked])
        if settings.method != "supervised":
            label, weight = _guess(average.model, public, rows, guesses, least, step / steps, settings)
            shown.append(rows)
            wanted.append(functional.one_hot(label, targets.shape[1]) * weight[:, None].float())
        student.train()
        logits = student(_changed(public[torch.cat(shown)], public, settings))
        parts = zip(torch.split(logits, [len(part) for part in shown]), wanted, strict=True)
        loss = torch.stack([functional.cross_entropy(*part) for part in parts]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update(student)
        if report is not None and (step + 1) % _steps(len(public), settings) == 0:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                report((step + 1) * settings.epochs // steps, settings.epochs, average.model.eval())
    return average.model.eval()


def _guess(
    model: nn.Module,
    public: Tensor,
    rows: Tensor,
    guesses: Tensor | None,
    least: Tensor | float,
    share: float,
    settings: StudentSettings,
) -> tuple[Tensor, Tensor]:
    """The classes of `rows` [m], and which of them count: first guesses where sure, else the model's."""
    label = torch.zeros_like(rows)
    counts = label > 0
    if guesses is not None:
        sure, label = guesses[rows].max(dim=1)
        counts = sure >= least
    others = (~counts).nonzero()[:, 0]
    if len(others) and (guesses is None or share >= settings.spread_share):
        with torch.no_grad():
            seen = model.eval()(_changed(public[rows[others]], public, settings, 0.25))
            own, found = seen.softmax(dim=1).max(dim=1)
        label[others], counts[others] = found, own >= settings.threshold
    return label, counts


def _batches(n: int, settings: StudentSettings, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Rows of each step, in another order in each epoch, which leaves out an incomplete batch."""
    each, size, order = _steps(n, settings), settings.batch_size, torch.empty(0)
    for step in range(settings.epochs * each):
        place = step % each
        if place == 0:
            order = torch.randperm(n)
        warm, share = min(1.0, (step + 1) / _WARM_UP), step / (settings.epochs * each)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * (1 + math.cos(math.pi * share)) / 2
        yield order[place * size : (place + 1) * size]


def _steps(n: int, settings: StudentSettings) -> int:
    """Steps in an epoch."""
    return max(1, n // settings.batch_size)


def _changed(inputs: Tensor, public: Tensor, settings: StudentSettings, share: float = 1.0) -> Tensor:
    """Each input changed at random and by itself, as strongly as `share` of what the settings say."""
    strength = share * settings.strength
    if inputs.dim() == 2:
        spread = public.std(dim=0, unbiased=False)
        noisy = inputs + 0.3 * strength * spread * torch.randn_like(inputs)
        return torch.where(torch.rand_like(inputs) < 0.1 * strength, public.mean(dim=0), noisy)
    draws = (2 * torch.rand(6, len(inputs), device=inputs.device) - 1) * strength
    angle, shear, wide, high, right, down = draws * inputs.new_tensor(_CHANGES)[:, None]
    wide, high, cos, sin = wide.exp(), high.exp(), angle.cos(), angle.sin()
    if settings.flip:
        wide = torch.where(torch.rand_like(wide) < 0.5, -wide, wide)
    across = torch.stack([cos * wide, (shear * cos - sin) * high, right], dim=1)
    along = torch.stack([sin * wide, (shear * sin + cos) * high, down], dim=1)
    maps = torch.stack([across, along], dim=1)
    grid = functional.affine_grid(maps, list(inputs.shape), align_corners=False)
    bends = _BEND * strength * torch.randn(len(inputs), 2, 5, 5, device=inputs.device)
    bends = functional.interpolate(bends, inputs.shape[2:], mode="bicubic", align_corners=True)
    grid = grid + bends.permute(0, 2, 3, 1)
    changed = functional.grid_sample(inputs, grid, align_corners=False)
    return changed.contiguous(memory_format=torch.channels_last)


def _targets(public: Tensor, asked: object, answers: object, classes: int) -> Tensor:
    """Answers as shares of classes, float32 [k, classes]."""
    if not isinstance(asked, Tensor) or asked.dtype != torch.int64 or asked.dim() != 1:
        raise UserError(f"The rows asked must be int64 [k]. Got {form(asked)}.")
    if len(asked) == 0:
        raise UserError(
            "A student needs one answer at least. Got none: ask more, or ask less of a consensus."
        )
    if int(asked.min()) < 0 or int(asked.max()) >= len(public):
        raise UserError(f"The rows asked must be from 0 to {len(public) - 1}. Got {_range(asked)}.")
    repeated = len(asked) - len(set(asked.tolist()))
    if repeated:
        raise UserError(f"Each row may be asked once. Got {repeated} repeated: merge their answers.")
    wanted = f"Answers must be int64 [{len(asked)}] or floats [{len(asked)}, {classes}]"
    if not isinstance(answers, Tensor):
        raise UserError(f"{wanted}. Got {form(answers)}.")
    if answers.dtype == torch.int64 and answers.shape == asked.shape:
        if int(answers.min()) < 0 or int(answers.max()) >= classes:
            raise UserError(f"Answers must be classes from 0 to {classes - 1}. Got {_range(answers)}.")
        return functional.one_hot(answers, classes).float()
    if not answers.is_floating_point() or answers.shape != (len(asked), classes):
        raise UserError(f"{wanted}. Got {form(answers)}.")
    if not bool((answers >= 0).all()) or not bool(((answers.sum(dim=1) - 1).abs() < 1e-3).all()):
        raise UserError("Soft answers must be shares: zero or more, and one in sum in each row. Got others.")
    return answers.float()


def _range(values: Tensor) -> str:
    return f"{int(values.min())} to {int(values.max())}"
