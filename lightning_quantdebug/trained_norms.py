"""The batch normalizations of a network while it trains with quantizers: frozen, following, or taken anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.rank_agreement import gather, rank_count
from lightning_quantdebug.settings import Direction

# Batches from which the statistics are taken anew.
_BATCHES = 32


class TrainedNorms:
    """Those that trained before and have running statistics.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        """Find them."""
        found = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self._norms = [norm for norm in found if norm.training and norm.running_mean is not None]

    def freeze(self) -> None:
        """Keep the statistics as they are."""
        for norm in self._norms:
            norm.eval()

    def release(self) -> None:
        """Let them follow again."""
        for norm in self._norms:
            norm.train()

    def renew(self, evaluator: Evaluator, before: Evaluation, direction: Direction) -> tuple[Evaluation, list[str]]:
        """Take the statistics anew from training batches, if the score is better for it.

        Args:
            evaluator: Runs the network with its quantizers.
            before: The score with the statistics of now.
            direction: Whether a small or a large score is good.

        Returns:
            The evaluation with the statistics that stay, and what the reader must know.

        Raises:
            NonFiniteScoreError: If the score with new statistics is no number.
        """
        if not self._norms:
            return before, []
        old, new = self._statistics(), self._renewed(evaluator)
        # Of an equalized layer the normalization stays folded, and its statistics are still those of the reset.
        ran = [bool(found["running_mean"].any() or (found["running_var"] != 1).any()) for found in new]
        notes = []
        if not all(ran):
            notes.append(
                f"{ran.count(False)} of {len(ran)} batch normalizations belong to equalized layers, which are folded "
                "all the time: `qat_freeze_batchnorm` does not change them."
            )
        if not any(ran):
            return before, notes
        self._write([fresh if seen else known for fresh, known, seen in zip(new, old, ran, strict=True)])
        after = evaluator.run()
        if direction.loss(before.score, after.score) < 0:
            return after, [*notes, "Statistics of batch normalizations were taken anew from training batches."]
        self._write(old)
        return before, notes

    def _renewed(self, evaluator: Evaluator) -> list[dict[str, Tensor]]:
        """The statistics of training batches, the same on every rank."""
        momenta = [norm.momentum for norm in self._norms]
        found: list[dict[str, Tensor]] = []

        def around(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            if not found:
                self.release()
                for norm in self._norms:
                    norm.momentum = None  # torch: a plain mean over all batches
                    norm.reset_running_stats()
            result = call()
            found[:] = self._statistics()
            return result

        try:
            evaluator.run_unchecked(around, loader="train", limit=_BATCHES)
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.momentum = momentum
            self.freeze()
        return found if rank_count() == 1 else _mean_over_ranks(found)

    def _statistics(self) -> list[dict[str, Tensor]]:
        """Copies of the statistics of each."""
        return [{name: value.clone() for name, value in norm.named_buffers()} for norm in self._norms]

    @torch.no_grad()
    def _write(self, statistics: list[dict[str, Tensor]]) -> None:
        """Give each its statistics."""
        for norm, tensors in zip(self._norms, statistics, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(tensors[name])


def _mean_over_ranks(values: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The mean of each tensor over the ranks, integers as they are."""
    ranks = gather([{name: value.cpu() for name, value in found.items()} for found in values])
    return [
        {
            name: torch.stack([rank[index][name] for rank in ranks]).mean(0) if value.is_floating_point() else value
            for name, value in found.items()
        }
        for index, found in enumerate(values)
    ]
