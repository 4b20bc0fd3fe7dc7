"""The per-quantizer analysis: each quantizer alone at its target bit-width, the rest in FP32.

An estimate from gradients orders the work (:mod:`~lightning_quantdebug.estimate`), a dry run on two batches tells what
it will cost, and then quantizers are measured exactly, batch by batch side by side. Racing measures all of them on a
few batches and goes on with those that may be among the worst (:mod:`~lightning_quantdebug.race`); exhaustive measures
all on everything. The ranking goes by how far a quantizer moves the network's output, which few samples tell; the score
stands beside it with its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from lightning_quantdebug.analysis_store import AnalysisStore
from lightning_quantdebug.errors import EvaluationError, LanesError, TooManyLanesError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Call
from lightning_quantdebug.measurement import Measurement, is_guilty, measurement, worst_first
from lightning_quantdebug.network_outputs import network_outputs
from lightning_quantdebug.race import contenders, rounds
from lightning_quantdebug.rank_agreement import from_rank_zero, rank_count
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.side_by_side import (
    Measured,
    OutputCache,
    Setting,
    check_reference,
    one_by_one,
    side_by_side,
)
from lightning_quantdebug.target import Mode

GROUP_SECONDS = 60.0
"""Quantizers are measured in groups of about this many seconds, each written to disk: a kill costs a minute of work,
and FP32 is run once a group, which is little beside it."""

MOST_LANES = 64
"""Of one group. FP32's share of the work is 1 / 64 of a full run then, or about 1 / 20 of the replayed ones."""

LEAST_LANES = 4
"""Of one group, also where a single quantizer takes minutes: with fewer, running FP32 anew for each would dominate."""

DRY_BATCHES = 2
"""Of the dry run: the first pays for caches, the second tells what the others will take."""


# The lane of the dry run that is no quantizer's.
_NEGATED = ""


@dataclass
class Bench:
    """What the analysis works on.

    Attributes:
        session: Calibrated; nothing of it changes.
        evaluator: Runs the user's validation.
        settings: The settings of the walk.
        reference: FP32 on all of the evaluator's batches.
        store: Keeps what was measured.
        is_late: Whether the time budget is spent.
        describe: Told what happens, in words.
        tell: Told what the user shall be able to read afterwards too.
        progress: Told how many runs of a batch are done, and of how many.
        visit: Context for a run of FP32 on the first batch, to look at its tensors.
    """

    session: Instrumentation
    evaluator: Evaluator
    settings: Settings
    reference: Evaluation
    store: AnalysisStore
    is_late: Callable[[], bool] = lambda: False
    describe: Callable[[str], None] = lambda text: None
    tell: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int], None] = lambda done, total: None
    visit: Setting | None = None


@dataclass(frozen=True)
class Cost:
    """What a dry run foretells.

    Attributes:
        quantizers: How many there are.
        batches: How many batches there are.
        recorded_seconds: Of a batch in FP32, recorded.
        lane_seconds: Of a batch with one quantizer on, the mean of a few quantizers.
    """

    quantizers: int
    batches: int
    recorded_seconds: float
    lane_seconds: float

    def seconds(self, runs: int, groups: int = 1) -> float:
        """Predicted seconds of so many runs of a batch, with FP32 once for each batch of each group."""
        return runs * self.lane_seconds + groups * self.batches * self.recorded_seconds

    @property
    def text(self) -> str:
        """For the user, before the long run."""
        whole = self.seconds(self.quantizers * self.batches, -(-self.quantizers // MOST_LANES))
        evaluation = max(self.recorded_seconds * self.batches, 1e-9)
        return (
            f"{self.quantizers} quantizers on {self.batches} batches: all of them exactly would take about "
            f"{whole:.0f} s, or {whole / evaluation:.1f} FP32 evaluations; one takes {self.lane_seconds:.3g} s a batch"
        )


@dataclass
class Table:
    """What was measured.

    Attributes:
        alone: Each quantizer alone, worst first.
        off: All quantizers on but this one, where that was asked for.
        cost: What the dry run foretold; ``None`` where none was made.
        way: How the numbers came to be, in words, where that is not side by side.
        left_out: Quantizers that time left no exact measurement for.
    """

    alone: dict[str, Measurement] = field(default_factory=dict)
    off: dict[str, Measurement] = field(default_factory=dict)
    cost: Cost | None = None
    way: str = ""
    left_out: tuple[str, ...] = ()

    def guilty(self, permitted: float) -> list[str]:
        """The quantizers that certainly cost score, worst first."""
        return [name for name, found in self.alone.items() if is_guilty(found, permitted)]


class Sensitivities:
    """Measures every quantizer.

    Args:
        bench: What it works on.
        order: Names of the quantizers in the order of work, those that an estimate has called worst first.
    """

    def __init__(self, bench: Bench, order: Sequence[str]) -> None:
        """Nothing is measured yet."""
        self.table = Table()
        self._bench = bench
        self._order = list(order)
        self._plain: OutputCache | None = None
        self._lanes = MOST_LANES
        self._runs = (0, 0)

    def dry_run(self) -> Cost:
        """Measure a few quantizers on two batches, to foretell the cost and to see that the score says anything.

        Raises:
            EvaluationError: If the score is the same whatever the network returns.
        """
        bench, batches = self._bench, self._batches
        some = self._order[:: max(1, len(self._order) // 3)][:3]
        settings = {name: self._only(name) for name in some}
        limit = min(DRY_BATCHES, batches)
        try:
            settings[_NEGATED] = self._negated
            found = side_by_side(bench.session, bench.evaluator, self._fp32, settings, limit=limit, in_full=(_NEGATED,))
        except LanesError as error:
            self._take_plain_way(error)
            self.table.cost = Cost(len(self._order), batches, *[bench.reference.seconds / max(1, batches)] * 2)
            return self.table.cost
        self._check_score(found.reference, found.found[_NEGATED].evaluation)
        self.table.cost = from_rank_zero(Cost(len(self._order), batches, *found.seconds))
        bench.tell(self.table.cost.text)
        return self.table.cost

    def race(self) -> Table:
        """Measure all on a few batches and those that may be among the worst on everything."""
        batches = self._batches
        size = (self._bench.reference.samples or batches) / batches
        limits = rounds(batches, size)
        alive, found = self._order, dict[str, Measurement]()
        for number, limit in enumerate(limits[:-1]):
            found |= self._measured(f"alone, round {number + 1}", alive, self._only, self._fp32, limit)
            known = {name: found[name] for name in alive if name in found}
            worst = set(contenders(known)) | {name for name, one in known.items() if _may_cost(one)}
            alive = [name for name in alive if name in worst]
        self._bench.describe(f"{len(alive)} of {len(self._order)} may be among the worst")
        found |= self._measured("alone", alive, self._only, self._fp32, None)
        return self._finished(found, alive)

    def exhaust(self) -> Table:
        """Measure every quantizer on everything."""
        return self._finished(self._measured("alone", self._order, self._only, self._fp32, None), self._order)

    def reverse(self) -> Table:
        """Measure all quantizers on but one, for each of them, on everything."""
        self.table.off = self._measured("off", self._order, self._all_but, self._all, None)
        return self.table

    def _finished(self, found: Mapping[str, Measurement], wanted: Sequence[str]) -> Table:
        """The table in order."""
        left = [name for name in wanted if name not in found or not found[name].whole]
        self.table.alone = {name: found[name] for name in worst_first(found)}
        self.table.left_out = tuple(left)
        return self.table

    # Measuring.

    @property
    def _batches(self) -> int:
        """How many batches this rank validates."""
        return max(1, self._bench.reference.count)

    def _measured(
        self,
        table: str,
        names: Sequence[str],
        setting: Callable[[str], Setting],
        recorded: Setting,
        limit: int | None,
    ) -> dict[str, Measurement]:
        """Measure some quantizers in groups; what is stored already is not measured again."""
        bench = self._bench
        found = {name: one for name, one in bench.store.found(table).items() if name in names}
        waiting = [name for name in names if name not in found]
        batches = self._batches if limit is None else limit
        groups = -(-len(waiting) // self._group_size(batches)) if waiting else 0
        self._runs = (0, (len(waiting) + 2 * groups) * batches)
        bench.describe(f"per_quantizer: {table}")
        while waiting and not (found and bench.is_late()):
            group = waiting[: self._group_size(batches)]
            try:
                new = self._group(group, setting, recorded, limit)
            except TooManyLanesError as error:
                if len(group) <= LEAST_LANES:
                    self._take_plain_way(error)
                self._lanes = max(LEAST_LANES, len(group) // 2)
                continue
            except LanesError as error:
                self._take_plain_way(error)
                continue
            found |= new
            if all(one.whole or limit is not None for one in new.values()):
                bench.store.add(table, new)
            waiting = waiting[len(group) :]
        return found

    def _group_size(self, batches: int) -> int:
        """How many quantizers are measured together."""
        if self._plain is not None or self.table.cost is None:
            return 1 if self._plain is not None else self._lanes
        seconds = max(self.table.cost.lane_seconds * batches, 1e-9)
        return min(self._lanes, max(LEAST_LANES, int(GROUP_SECONDS / seconds)))

    def _group(
        self, names: Sequence[str], setting: Callable[[str], Setting], recorded: Setting, limit: int | None
    ) -> dict[str, Measurement]:
        """Measure one group, side by side where that is possible."""
        bench, settings = self._bench, {name: setting(name) for name in names}
        if self._plain is not None:
            return self._group_plainly(settings, limit)
        visit, bench.visit = bench.visit, None
        late = bench.is_late if rank_count() == 1 else lambda: False
        found = side_by_side(
            bench.session, bench.evaluator, recorded, settings, limit=limit, visit=visit, is_late=late, ran=self._ran
        )
        whole = limit is None and found.whole
        if recorded != self._fp32:
            # Compared with FP32 on all batches, which a part of them can not be.
            return {name: self._measurement(bench.reference, one, whole) for name, one in found.found.items() if whole}
        if whole:
            check_reference(found, bench.reference)
        return {name: self._measurement(found.reference, one, whole) for name, one in found.found.items()}

    def _group_plainly(self, settings: Mapping[str, Setting], limit: int | None) -> dict[str, Measurement]:
        """Measure each setting in a pass of its own."""
        assert self._plain is not None
        evaluator, found = self._bench.evaluator, {}
        reference = self._bench.reference
        if limit is not None:
            reference = evaluator.run_unchecked(limit=limit)
        for name, setting in settings.items():
            one = one_by_one(evaluator, self._plain, setting, limit=limit)
            self._ran(self._batches if limit is None else limit)
            found[name] = self._measurement(reference, one, limit is None)
        return found

    def _measurement(self, reference: Evaluation, found: Measured, whole: bool) -> Measurement:
        """The plain numbers of one setting."""
        direction = self._bench.settings.direction
        return measurement(reference, found.evaluation, found.noise, direction, len(self._order), whole)

    def _take_plain_way(self, error: LanesError) -> None:
        """Measure one quantizer after the other from now on."""
        self.table.way = f"each quantizer in a validation of its own, as {error}"
        self._bench.tell(self.table.way)
        self._plain = OutputCache(self._bench.session, self._fp32)

    def _ran(self, batches: int = 1) -> None:
        """Count runs of a batch."""
        self._runs = (self._runs[0] + batches, self._runs[1])
        self._bench.progress(*self._runs)

    def _check_score(self, reference: Evaluation, negated: Evaluation) -> None:
        """Raise if the score stays where it is when the network's output changes its sign."""
        whole = self._bench.reference
        values = {batch.value for batch in whole.batches or ()} or {whole.score}
        if negated.score == reference.score and len(values) == 1:
            raise EvaluationError(
                f"The score `{self._bench.settings.monitor}` is {reference.score:.6g} on every batch, also with the "
                "sign of the network's output changed, so that no quantizer could be told from another by it. Monitor "
                "a metric that depends on the output."
            )

    # Settings of the quantizers.

    def _fp32(self) -> AbstractContextManager[None]:
        """All bypassed."""
        return self._bench.session.modes(Mode.BYPASS)

    def _all(self) -> AbstractContextManager[None]:
        """All on."""
        return self._bench.session.modes(Mode.QUANTIZE)

    def _only(self, name: str) -> Setting:
        """One on, the others bypassed."""
        return partial(_switched, self._bench.session, name, Mode.QUANTIZE, Mode.BYPASS)

    def _all_but(self, name: str) -> Setting:
        """One bypassed, the others on."""
        return partial(_switched, self._bench.session, name, Mode.BYPASS, Mode.QUANTIZE)

    @contextmanager
    def _negated(self) -> Iterator[None]:
        """FP32 with the sign of every output changed."""
        session = self._bench.session
        taps = {output.key: _negative for output in network_outputs(session)}
        with self._fp32(), session.tapped(taps):
            yield


def _negative(call: Call) -> Tensor | None:
    """The result of an operation with its sign changed."""
    return -call.result if isinstance(call.result, Tensor) and call.result.is_floating_point() else None


@contextmanager
def _switched(session: Instrumentation, name: str, mode: Mode, others: Mode) -> Iterator[None]:
    """One quantizer in one mode, all others in another."""
    with session.modes(others):
        session.quantizers[name].mode = mode
        yield


def _may_cost(found: Measurement) -> bool:
    """Whether the score itself speaks against a quantizer, whatever its output says."""
    return found.score is None or (found.interval is not None and found.interval[0] > 0)
