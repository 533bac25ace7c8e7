"""The part of a report about training: curves over the steps, what was trained, and what reconstruction gained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparse_ft.evaluation import formats
from sparse_ft.evaluation.charts import short_labels
from sparse_ft.evaluation.line_charts import LOG_FROM, Curve, Panel, Stretch, panels
from sparse_ft.evaluation.markup import Markup, tag
from sparse_ft.evaluation.tables import reconstruction_table, trainable_table

Numbers = Mapping[str, Any]
_TRAINING, _EVALUATION, _BEFORE, _AFTER = 0, 2, 1, 0  # hues


@dataclass(frozen=True)
class _Measure:
    """What a panel shows: key in the Trainer's log, axis, key of the evaluations, factor for the unit, smallest range,
    whether a running mean helps, and whether the runs may lie orders of magnitude apart."""

    key: str
    title: str
    evaluated: str = ""
    height: float = 84.0
    factor: float = 1.0
    least: float = 0.0
    noisy: bool = False
    spread: bool = False


_MEASURES = (
    _Measure("loss", "loss, nats per token", "eval_loss", height=240.0, noisy=True),
    _Measure("distill/ce", "cross-entropy, nats per token", noisy=True),
    _Measure("distill/kl", "KL from the teacher, nats per token", noisy=True),
    _Measure("distill/squarehead", "SquareHead, summed over the layers", noisy=True),
    _Measure("distill/mse", "squared distance of hidden states, summed over the layers", noisy=True),
    _Measure("distill/cosine", "1 − cosine of hidden states, summed over the layers", noisy=True),
    _Measure("learning_rate", "learning rate", spread=True),
    _Measure("grad_norm", "norm of the gradient, before clipping", noisy=True),
    _Measure("sparsity/total", "sparsity of the masked weights, %", height=56.0, factor=100.0, least=2.0),
)


@dataclass(frozen=True)
class Training:
    """One retraining: its heading, its logs by name of the run, what it trained, and its reconstruction windows."""

    heading: str
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    trainable: Mapping[str, Any]
    windows: Sequence[Mapping[str, Any]]


def training_section(numbers: Numbers) -> Markup | None:
    """Curves, trained weights and reconstruction errors of all retrainings, oldest first; None without any.

    Args:
        numbers: `report_numbers(data)`.
    """
    trainings = trainings_of(numbers)
    parts = [*_curves(trainings), *_reconstruction(trainings), *_trainable(trainings)]
    return tag("section", tag("h2", "Training"), *parts) if parts else None


def trainings_of(numbers: Numbers) -> list[Training]:
    """The retrainings a checkpoint went through, this one last; anything that is not as it should be is left out."""
    found = []
    for number, step in enumerate(numbers["steps"], 1):
        method = (step.get("arguments") or {}).get("method", "")
        found.append(_training(f"{number}. {step.get('command', '')} {method}".strip(), step.get("training")))
    kept = {"logs": numbers["history"], "trainable": numbers["trainable"], "reconstruction": numbers["reconstruction"]}
    verb = next(iter(numbers["command"].split()[1:2]), "") or numbers["title"].lower()
    found.append(_training(f"{len(found) + 1}. {verb} {numbers['method']}".strip(), kept))
    return [one for one in found if one.logs or one.trainable or one.windows]


def _training(heading: str, kept: Any) -> Training:
    kept = kept if isinstance(kept, Mapping) else {}
    logs, trainable, windows = kept.get("logs"), kept.get("trainable"), kept.get("reconstruction")
    logs = logs if isinstance(logs, Mapping) else {}
    return Training(
        heading,
        {name: entries for name, entries in logs.items() if _mappings(entries)},
        trainable if isinstance(trainable, Mapping) else {},
        [entry for entry in _mappings(windows) if all(formats.finite(entry.get(k)) for k in _ERRORS)],
    )


_ERRORS = ("loss_before", "loss_after")


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, (list, tuple)) else []


def _curves(trainings: Sequence[Training]) -> Iterable[Markup]:
    """The panels over the steps of all retrainings that were logged."""
    logged = [one for one in trainings if any(len(_points(log, "loss")) > 1 for log in one.logs.values())]
    drawn = [panel for measure in _MEASURES if (panel := _panel(measure, logged))]
    if not drawn:
        return
    headed = len(logged) > 1
    stretches = [Stretch(0.0, _last_step(one), one.heading if headed else "") for one in logged]
    evaluated = any(_points(log, "eval_loss") for one in logged for log in one.logs.values())
    several = any(len(one.logs) > 1 for one in logged)
    long = any(len(_points(log, "loss")) >= 30 for one in logged for log in one.logs.values())
    taught = any(key.startswith("distill/") for one in logged for log in one.logs.values() for e in log for key in e)
    yield tag("p", _about_curves(headed, long, taught))
    label = "optimizer step" + (" of each retraining" if headed else "")
    yield panels(drawn, stretches, "Loss and what else was logged over the training steps", x_label=label)
    if evaluated:
        hue = "s5" if several else f"s{_EVALUATION}"
        marks = [] if several else [_mark(f"stroke s{_TRAINING}", "loss on the training text")]
        yield tag("p", *marks, _mark(f"ring {hue}", "loss on the evaluation text"), class_="legend")


def _about_curves(headed: bool, long: bool, taught: bool) -> str:
    said = ["What the Trainer logged, over its optimizer steps."]
    if headed:
        said.append("The retrainings stand one after the other, each with its own steps.")
    if taught:
        said.append("With a teacher, the loss of training is the weighted sum of those below; evaluation has none.")
    if long:
        said.append("Faint: as logged; bold: its running mean.")
    return " ".join(said)


def _panel(measure: _Measure, trainings: Sequence[Training]) -> Panel | None:
    """One measure over all retrainings; None if no curve of it has two points."""
    drawn = [
        curve
        for stretch, one in enumerate(trainings)
        for place, (name, log) in enumerate(one.logs.items())
        for curve in _curves_of(measure, log, stretch, (place, name) if len(one.logs) > 1 else None)
    ]
    if not any(len(curve.points) > 1 for curve in drawn):
        return None
    if measure.spread and _differ(drawn):
        # such runs are all but one flat on a linear axis; the zero that a schedule ends at has no logarithm
        floor = min(max(y for _, y in curve.points) for curve in drawn) / 100
        above = [replace(curve, points=[point for point in curve.points if point[1] >= floor]) for curve in drawn]
        return Panel(measure.title, [curve for curve in above if curve.points], measure.height, log=True)
    return Panel(measure.title, drawn, measure.height, log=False if measure.spread else None, least=measure.least)


def _curves_of(
    measure: _Measure, log: Sequence[Mapping[str, Any]], stretch: int, of_several: tuple[int, str] | None
) -> Iterable[Curve]:
    """The line of one run and the circles of its evaluations; each of several runs has its colour and one name."""
    hue, label = of_several or (_TRAINING, "")
    label = label if measure is _MEASURES[0] else ""
    points = _points(log, measure.key, measure.factor)
    evaluated = _points(log, measure.evaluated) if measure.evaluated else []
    if points:
        yield Curve(label, points, hue, dots=len(points) == 1, noisy=measure.noisy, stretch=stretch)
    if evaluated:
        yield Curve("" if points else label, evaluated, hue if of_several else _EVALUATION, dots=True, stretch=stretch)


def _differ(drawn: Sequence[Curve]) -> bool:
    """Whether the highest points of the curves lie too far apart for one linear axis."""
    tops = [max(y for _, y in curve.points) for curve in drawn]
    return min(tops) > 0 and max(tops) / min(tops) > LOG_FROM / 2


def _points(entries: Iterable[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """(step, value) of the log entries that have a finite `key`."""
    known = (e for e in _mappings(entries) if formats.finite(e.get("step")) and formats.finite(e.get(key)))
    return [(float(e["step"]), factor * float(e[key])) for e in known]


def _last_step(one: Training) -> float:
    steps = [entry["step"] for log in one.logs.values() for entry in log if formats.finite(entry.get("step"))]
    return float(max(steps))


def _mark(kind: str, text: str) -> Markup:
    return tag("span", tag("i", class_=kind), text)


def _trainable(trainings: Sequence[Training]) -> Iterable[Markup]:
    counted = [(one.heading, one.trainable) for one in trainings if formats.finite(one.trainable.get("trainable"))]
    if counted:
        yield tag("h3", "What was trained")
        yield trainable_table(counted)


def _reconstruction(trainings: Sequence[Training]) -> Iterable[Markup]:
    """One panel per kind of window over the blocks, before and after; the numbers folded away."""
    done = [one for one in trainings if one.windows]
    if not done:
        return
    kinds = list(dict.fromkeys(str(entry.get("window", "")) for one in done for entry in one.windows))
    blocks = [list(dict.fromkeys(str(entry.get("block", "")) for entry in one.windows)) for one in done]
    stretches = [
        Stretch(-0.5, len(names) - 0.5, one.heading if len(done) > 1 else "", _short(names))
        for names, one in zip(blocks, done, strict=True)
    ]
    drawn = [
        Panel(
            f"{kind}: mean squared error of its output",
            [
                Curve("", _errors(one.windows, names, kind, key), hue, dots=True, stretch=i)
                for i, (names, one) in enumerate(zip(blocks, done, strict=True))
                for key, hue in zip(_ERRORS, (_BEFORE, _AFTER), strict=True)
                if _errors(one.windows, names, kind, key)
            ],
            height=150.0 if len(kinds) < 4 else 96.0,
            log=True,
        )
        for kind in kinds
    ]
    yield tag("h3", "Reconstruction")
    yield tag("p", _about_errors([entry for one in done for entry in one.windows]), class_="lead")
    yield panels(drawn, stretches, "Error of each reconstruction window before and after, by block", x_label="block")
    marks = [_mark(f"ring s{_BEFORE}", "after pruning"), _mark(f"ring s{_AFTER}", "after reconstruction")]
    yield tag("p", *marks, class_="legend")
    yield reconstruction_table([entry for one in done for entry in one.windows])


def _short(blocks: Sequence[str]) -> dict[float, str]:
    return {float(i): label for i, label in enumerate(short_labels(blocks))}


def _errors(
    windows: Sequence[Mapping[str, Any]], blocks: Sequence[str], kind: str, key: str
) -> list[tuple[float, float]]:
    place = {block: float(i) for i, block in enumerate(blocks)}
    of_kind = (entry for entry in windows if str(entry.get("window", "")) == kind)
    return [(place[str(entry.get("block", ""))], float(entry[key])) for entry in of_kind]


def _about_errors(windows: Sequence[Mapping[str, Any]]) -> str:
    ratios = [e["loss_after"] / e["loss_before"] for e in windows if e["loss_before"] > 0 and e["loss_after"] > 0]
    text = "Each window was trained to give the outputs of its dense original."
    if not ratios:
        return text
    left = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return f"{text} {formats.percent(left, 0)} of the error that pruning had made is left (geometric mean)."
