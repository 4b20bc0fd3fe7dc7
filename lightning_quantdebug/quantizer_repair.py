"""Repairs single quantizers: worst first, measured after each try, until the tolerance is met; then gives bits back.

What to try and what is kept is decided by :mod:`~lightning_quantdebug.repair_plan`, and done here, as
:mod:`~lightning_quantdebug.repair` does for whole boxes. The outcome is a small mixed-precision setting with its cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_quantdebug.activation_ranges import set_range
from lightning_quantdebug.errors import CalibrationError
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.flowchart import judge
from lightning_quantdebug.function_check import reset_weight_ranges
from lightning_quantdebug.granularity import refine
from lightning_quantdebug.instrumentation import Instrumentation, SessionState
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.paired_loss import loss_interval
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.rank_agreement import led_by_rank_zero
from lightning_quantdebug.repair import follow_rank_zero
from lightning_quantdebug.repair_plan import (
    MOST_SINGLES,
    SettingPoint,
    SingleTry,
    allowed_tries,
    blocking,
    give_back,
    growing_groups,
    judge_single,
    next_to_try,
    noise_gain,
    on_front,
    raising,
    single_tries,
)
from lightning_quantdebug.report import Remedy, Report, Sensitivity, StepName, StepVerdict
from lightning_quantdebug.selection import Difference, Split
from lightning_quantdebug.setting_cost import CostModel
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.side_by_side import Measured
from lightning_quantdebug.target import Granularity, Kind, RangeSetting

_STEP = StepName.FIX_QUANTIZERS.value


@dataclass(frozen=True)
class RepairBench:
    """What the repair works on.

    Attributes:
        session: Remedies change it and nothing else.
        runs: The calibration batches.
        measure: All quantizers on: the user's evaluation and the noise of the outputs.
        settings: The settings of the walk.
        reference: FP32.
        is_late: Whether the time budget is spent.
        describe: Called with what is being tried.
    """

    session: Instrumentation
    runs: Runs
    measure: Callable[[], Measured]
    settings: Settings
    reference: Evaluation
    is_late: Callable[[], bool] = lambda: False
    describe: Callable[[str], None] = lambda text: None


class QuantizerRepair:
    """The repair of single quantizers.

    Args:
        bench: What it works on.
        rows: The quantizers, worst first.

    Attributes:
        remedies: Everything that was tried.
        points: Every setting that was measured.
        is_late: Whether time ran out.
    """

    def __init__(self, bench: RepairBench, rows: Sequence[Sensitivity]) -> None:
        """Measure the setting as it is."""
        self.remedies: list[Remedy] = []
        self.points: list[SettingPoint] = []
        self.is_late = False
        self._bench = bench
        self._rows = [row for row in rows if bench.session.quantizers[row.quantizer].is_calibrated]
        self._costs = CostModel(bench.session)
        self._split = Split.of(bench.reference)
        self._before_raise: dict[str, SessionState] = {}
        self._repaired: set[str] = set()
        self.now = self._measured("as it is")

    # How it stands.

    @property
    def evaluation(self) -> Evaluation:
        """The score with what was kept."""
        return self.now.evaluation

    @property
    def loss(self) -> float:
        """Loss of score against FP32."""
        return self._bench.settings.direction.loss(self._bench.reference.score, self.evaluation.score)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Confidence interval of the loss."""
        return loss_interval(self._bench.reference, self.evaluation, self._bench.settings.direction)

    @property
    def verdict(self) -> StepVerdict:
        """How it stands."""
        return self._verdict_of(self.now)

    def _verdict_of(self, found: Measured) -> StepVerdict:
        """How a setting stands; a score that is no number fails."""
        bench = self._bench
        if not math.isfinite(found.evaluation.score):
            return StepVerdict.FAILED
        loss = bench.settings.direction.loss(bench.reference.score, found.evaluation.score)
        interval = loss_interval(bench.reference, found.evaluation, bench.settings.direction)
        return judge(loss, interval, bench.settings.tolerance.permitted_loss(bench.reference.score))

    # The walk.

    def walk(self, report: Report) -> Report:
        """Try until the loss is good, nothing is left, or time is up; then give bits back."""
        for tries in self._stages():
            for item in tries:
                if self._is_done():
                    break
                self._try(item)
        if self.verdict is StepVerdict.PASSED:
            self._give_back()
        for remedy in self.remedies:
            report = report.with_remedy(remedy)
        return report

    def _is_done(self) -> bool:
        """Whether to stop: success is tested before time."""
        if self.verdict is StepVerdict.PASSED:
            return True
        self.is_late = self.is_late or self._bench.is_late()
        return self.is_late

    def _stages(self) -> list[list[SingleTry]]:
        """Every remedy for the suspects, one quantizer after the other; then bits for the others, in growing groups."""
        bench, target = self._bench, self._bench.session.target
        remedies = bench.settings.remedies
        stages = []
        for row in self._rows[:MOST_SINGLES]:
            quantizer = bench.session.quantizers[row.quantizer]
            finer = [g.value for g in Granularity if quantizer.kind is Kind.WEIGHT and target.allows(g)]
            tries = single_tries(row, self._wider(row.quantizer), finer)
            if quantizer.frozen:
                tries = [item for item in tries if item.remedy == "bit_width"]
            stages.append(allowed_tries(tries, remedies))
        for level in range(max((len(self._wider(row.quantizer)) for row in self._rows), default=0)):
            rows = self._rows[MOST_SINGLES if level == 0 else 0 :]
            widths_of = {row.quantizer: self._wider(row.quantizer) for row in rows}
            wider = {name: widths[level] for name, widths in widths_of.items() if len(widths) > level}
            tries = [raising({name: wider[name] for name in group}) for group in growing_groups(list(wider))]
            stages.append(allowed_tries(tries, remedies))
        return stages

    def _wider(self, name: str) -> tuple[int, ...]:
        """The bit-widths that a quantizer may be raised to from where it is, the narrowest first."""
        quantizer = self._bench.session.quantizers[name]
        return self._bench.session.target.wider(quantizer.kind, quantizer.bit_width)

    def _try(self, item: SingleTry) -> None:
        """Apply one remedy, measure, keep or undo it."""
        bench, started = self._bench, time.monotonic()
        bench.describe(f"{_STEP}: {item.title}")
        before, state = self.now, bench.session.state()
        after: Measured | None = None
        gain: Difference | None = None
        kept = False
        try:
            reason = self._apply(item)
            if not reason:
                after = self._measured(item.title)
                kept, reason, gain = self._judged(item.remedy, before, after)
        except CalibrationError as error:
            reason = f"it could not be applied: {error}"
        finally:
            if not kept:
                bench.session.restore(state)
        if kept and after is not None:
            self.now = after
            self._repaired |= set(item.quantizers)
            if item.remedy == "bit_width":
                self._before_raise |= {name: state for name in item.quantizers if name not in self._before_raise}
        self._note(item.remedy, item.title, before, after, kept, reason, gain, started)

    def _judged(self, remedy: str, before: Measured, after: Measured) -> tuple[bool, str, Difference | None]:
        """Whether what was measured is kept, why, and the gain of score."""
        if not math.isfinite(after.evaluation.score):
            return False, "the score became NaN or infinite", None
        fallen, fallen_interval = noise_gain(before.noise.each, after.noise.each)
        if not math.isfinite(before.evaluation.score):
            return True, "the score is a number again", None
        gain = self._split.gain(before.evaluation, after.evaluation, self._bench.settings.direction)
        return (*judge_single(remedy, gain.value, gain.interval, fallen, fallen_interval), gain)

    def _measured(self, title: str) -> Measured:
        """Measure the setting as it is now, and keep it for the table of all settings."""
        bench = self._bench
        found, cost = bench.measure(), self._costs.cost()
        finite = math.isfinite(found.evaluation.score)
        direction = bench.settings.direction
        loss = direction.loss(bench.reference.score, found.evaluation.score) if finite else None
        interval = loss_interval(bench.reference, found.evaluation, direction) if finite else None
        score = found.evaluation.score if finite else None
        self.points.append(
            SettingPoint(title, cost.size_bytes, cost.bit_operations, cost.raised, score, loss, interval)
        )
        return found

    def _note(
        self,
        remedy: str,
        variant: str,
        before: Measured,
        after: Measured | None,
        kept: bool,
        reason: str,
        gain: Difference | None,
        started: float,
    ) -> None:
        """Add one try to the report."""
        score = None if after is None else after.evaluation.score
        self.remedies.append(
            Remedy(
                remedy=remedy,
                before=before.evaluation.score,
                after=score if score is not None and math.isfinite(score) else None,
                kept=kept,
                reason=reason,
                seconds=time.monotonic() - started,
                step=_STEP,
                variant=variant,
                gain=None if gain is None else gain.value,
                interval=None if gain is None else gain.interval,
            )
        )

    # Applying.

    def _apply(self, item: SingleTry) -> str:
        """Apply a remedy on every rank; the reason if it changed nothing."""
        session = self._bench.session

        def work(runs: Runs) -> str:
            if item.remedy == "granularity":
                applied = refine(session, runs, Granularity(item.variant), item.quantizers)
                for name in applied.changed:
                    _forget_corrections(session, name)
                return "" if applied.changed else "; ".join(reason for _, reason in applied.skipped[:1])
            quantizers = [session.quantizers[name] for name in item.quantizers]
            for quantizer in quantizers:
                _respecify(session, quantizer, item)
            if any(quantizer.kind is Kind.WEIGHT for quantizer in quantizers):
                reset_weight_ranges(session, runs)
            lost = [quantizer.name for quantizer in quantizers if not quantizer.is_calibrated]
            return f"{lost[0]} got no range" if lost else ""

        reason = led_by_rank_zero(self._bench.runs, work)
        follow_rank_zero(session)
        return reason

    # Giving back.

    def _give_back(self) -> None:
        """Lower again what need not be raised, the least sensitive first; the loss stays within the tolerance."""
        session = self._bench.session
        order = [row.quantizer for row in reversed(self._rows) if row.quantizer in self._before_raise]

        def put_back(names: tuple[str, ...]) -> None:
            for name in names:
                _lower(session, name, self._before_raise[name])

        lowered = give_back(order, lambda names: self._can_lower(names, "", put_back))
        left, level = [name for name in order if name not in lowered], 0
        while between := {name: found[level] for name in left if len(found := self._between(name)) > level}:
            self._narrow(between)
            level += 1

    def _narrow(self, widths: Mapping[str, int]) -> None:
        """Lower to other bit-widths what may be lowered."""

        def can_narrow(names: tuple[str, ...]) -> bool:
            item = raising({name: widths[name] for name in names})
            return self._can_lower(names, item.variant, lambda names: self._apply(item))

        give_back(list(widths), can_narrow)

    def _between(self, name: str) -> list[int]:
        """The bit-widths between that which a raised quantizer had and that which it has, the narrowest first."""
        quantizer = self._bench.session.quantizers[name]
        before = self._before_raise[name].quantizers[name].spec
        wider = self._bench.session.target.wider(quantizer.kind, before.bit_width)
        return [width for width in wider if width < quantizer.bit_width]

    def _can_lower(self, names: tuple[str, ...], to: str, lower: Callable[[tuple[str, ...]], object]) -> bool:
        """Lower some quantizers; keep that if the loss is still good."""
        bench, started = self._bench, time.monotonic()
        self.is_late = self.is_late or bench.is_late()
        if self.is_late:
            return False
        title = f"give back: {names[0] if len(names) == 1 else f'{len(names)} quantizers'}{to and f': {to}'}"
        bench.describe(f"{_STEP}: {title}")
        before, state = self.now, bench.session.state()
        kept = False
        try:
            lower(names)
            after = self._measured(title)
            kept = self._verdict_of(after) is StepVerdict.PASSED
        finally:
            if not kept:
                bench.session.restore(state)
        reason = "the loss stays within the tolerance" if kept else "the loss would exceed the tolerance"
        self._note("bit_width", title, before, after, kept, reason, None, started)
        if kept:
            self.now = after
        return kept

    # What came of it.

    def details(self) -> dict[str, Any]:
        """The setting with its cost, every setting that was measured, and what blocks the way where it failed."""
        session, target = self._bench.session, self._bench.session.target
        plain = {name: target.spec(q.kind).bit_width for name, q in session.quantizers.items()}
        front = on_front(self.points)
        points = [{**asdict(p), "on_front": on} for p, on in zip(self.points, front, strict=True)]
        wide = {name: max((*target.wider(session.quantizers[name].kind, w)[:1], w)) for name, w in plain.items()}
        details: dict[str, Any] = {
            "changed": {name: text for name, q in session.quantizers.items() if (text := _change_of(session, q))},
            "cost": asdict(self._costs.cost()),
            "cost_of_target": asdict(self._costs.cost(plain, as_placed=True)),
            "cost_of_next_width": asdict(self._costs.cost(wide, as_placed=True)),
            "pareto": points,
        }
        if self.verdict is StepVerdict.FAILED:
            remedies = self._bench.settings.remedies
            can_raise = any(self._wider(row.quantizer) for row in self._rows)
            details["blocking"] = blocking([row.quantizer for row in self._rows], self._repaired)
            details["next"] = next_to_try(self.is_late, remedies is None or "bit_width" in remedies, can_raise)
        return details


def _respecify(session: Instrumentation, quantizer: Quantizer, item: SingleTry) -> None:
    """Give a quantizer another range setting or more bits."""
    if item.remedy == "custom_range":
        method, _, percentile = item.variant.partition("_")
        spec = replace(quantizer.spec, range_setting=RangeSetting(method))
        spec = replace(spec, percentile=float(percentile)) if percentile else spec
    else:
        spec = replace(quantizer.spec, bit_width=item.widths[item.quantizers.index(quantizer.name)])
    _forget_corrections(session, quantizer.name)
    chosen = quantizer.encoding if quantizer.frozen and quantizer.kind is Kind.ACTIVATION else None
    if chosen is not None:
        # No observer can give that range again.
        set_range(quantizer, spec, (chosen.range_min, chosen.range_max))
        return
    quantizer.respecify(spec, quantizer.channel_axis)


def _forget_corrections(session: Instrumentation, name: str) -> None:
    """Drop what makes up for the rounding of a weight on the grid that it had: on another one it would be wrong."""
    keys = {layer.key for layer in session.layers if layer.quantizer.name == name}
    state = session.state()
    changed = {
        key: replace(adjustment, weight_correction=None, bias_correction=None)
        for key, adjustment in state.adjustments.items()
        if key in keys
    }
    if changed:
        session.restore(SessionState({**state.adjustments, **changed}, state.quantizers))


def _lower(session: Instrumentation, name: str, before: SessionState) -> None:
    """Put one quantizer back to what it was before it was raised, with what made up for its rounding."""
    keys = {layer.key for layer in session.layers if layer.quantizer.name == name}
    state = session.state()
    kept = {key: one for key, one in state.adjustments.items() if key not in keys}
    old = {key: one for key, one in before.adjustments.items() if key in keys}
    quantizers = {**state.quantizers, name: before.quantizers[name]}
    session.restore(SessionState({**kept, **old}, quantizers))


def _change_of(session: Instrumentation, quantizer: Quantizer) -> str:
    """In what a quantizer differs from the target, in words; empty where it does not."""
    target, spec = session.target.spec(quantizer.kind), quantizer.spec
    parts = []
    if spec.bit_width != target.bit_width:
        parts.append(f"{spec.bit_width} bits")
    if spec.granularity is not target.granularity and quantizer.kind is Kind.WEIGHT:
        parts.append(spec.granularity.value)
    if spec.range_setting is not target.range_setting and spec.range_setting is not None:
        of_percentile = f" {spec.percentile:g}" if spec.range_setting is RangeSetting.PERCENTILE else ""
        parts.append(f"range {spec.range_setting.value}{of_percentile}")
    return ", ".join(parts)
