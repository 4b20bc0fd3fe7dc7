"""Questions about the dataflow of a recorded network: who reads a value, what keeps a grid, what only masks."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_quantdebug.operations import Category, Slot
from lightning_quantdebug.placement_rules import Action, Rules
from lightning_quantdebug.topology import Operation, Value

IGNORED = (Category.CREATION, Category.NOT_ARITHMETIC, Category.RANDOM)
# Operations a chain may look through: in evaluation they give back what they got.
_TRANSPARENT = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "contiguous", "identity")
_MOVES = (Category.PASS_THROUGH, Category.AVERAGE)


class Flow:
    """The dataflow as an engine sees it.

    Args:
        rules: The engine's placement table: it says which operations keep the grid.
    """

    def __init__(self, rules: Rules) -> None:
        """Keep the rules."""
        self.rules = rules

    def only_user(self, operation: Operation) -> Operation | None:
        """The one operation that reads the only result, looking through what changes nothing; else ``None``."""
        while True:
            used = [value for value in operation.outputs if value.consumers or value.escapes]
            if len(used) != 1 or used[0].escapes or len(used[0].consumers) != 1:
                return None
            follower = used[0].consumers[0][0]
            if follower.op not in _TRANSPARENT:
                return follower
            operation = follower

    def keeps_grid(self, operation: Operation) -> bool:
        """Whether the output is on the grid that the input is on."""
        rule = self.rules.rule(operation.op, operation.category)
        if rule.action is Action.PASS_THROUGH or self.is_masking(operation):
            return True
        return operation.category is Category.MULTIPLY and positive_factor(operation)

    def reason_of_passing(self, operation: Operation) -> str:
        """Why an operation that keeps the grid has no quantizer."""
        if self.is_masking(operation):
            return "adds a mask ahead of a softmax: its range would be the mask's"
        if operation.category is Category.MULTIPLY:
            return "multiplies by a positive constant: the scale changes, the grid does not"
        return self.rules.rule(operation.op, operation.category).reason

    def is_masking(self, operation: Operation) -> bool:
        """Whether an addition only masks what a softmax reads."""
        if operation.category is not Category.ADD:
            return False
        uses = [use for value in operation.outputs for use in self.uses(value)]
        if not uses or any(user.op != "softmax" for user, _ in uses):
            return False
        real = [value for _, value in operation.data_inputs if not (value.discrete or value.producer is None)]
        return len(real) == 1

    def uses(self, value: Value) -> Iterator[tuple[Operation, Slot]]:
        """Every operation that reads a value or what passes it on."""
        for user, slot in value.consumers:
            if self.rules.rule(user.op, user.category).action is Action.PASS_THROUGH and user.category in _MOVES:
                for output in user.outputs:
                    yield from self.uses(output)
            else:
                yield user, slot

    def real_uses(self, value: Value) -> Iterator[tuple[Operation, Slot]]:
        """The uses that compute with a value; masks do not."""
        for user, slot in self.uses(value):
            if user.category in (*IGNORED, Category.LOSS) or (
                self.is_masking(user) and self.is_mask_operand(user, slot)
            ):
                continue
            if user.category is Category.ATTENTION and slot[0] in (3, "attn_mask"):
                continue
            yield user, slot

    def is_mask_operand(self, operation: Operation, slot: Slot) -> bool:
        """Whether the argument at ``slot`` of a masking addition is the mask."""
        value = dict(operation.inputs)[slot]
        return value.discrete or value.producer is None

    def is_mask(self, value: Value) -> bool:
        """Whether an outside tensor serves as a mask only."""
        uses = list(self.uses(value))
        return bool(uses) and not any(True for _ in self.real_uses(value))

    def is_data(self, value: Value) -> bool:
        """Whether numbers computed from integers feed a layer with weights, so that they are the network's input."""
        for user, _ in self.uses(value):
            if user.category in (Category.CONVOLUTION, Category.LINEAR, Category.RECURRENT):
                return True
            if any(output.discrete and self.is_data(output) for output in user.outputs):
                return True
        return False

    def decides_only(self, values: list[Value]) -> bool:
        """Whether values are read, but by comparisons and conversions to Python numbers alone."""
        used = [value for value in values if value.consumers]
        return bool(used) and not any(self.leaves(v) or any(True for _ in self.real_uses(v)) for v in values)

    def leaves(self, value: Value) -> bool:
        """Whether a value, or what passes it on, is returned or handed to code that torch does not see."""
        movers = (user for user, _ in value.consumers if user.category in _MOVES and self.keeps_grid(user))
        return value.escapes or any(self.leaves(output) for user in movers for output in user.outputs)


def positive_factor(operation: Operation) -> bool:
    """Whether a multiplication or division is by one positive number that depends on no data."""
    if operation.op == "outer" or len(operation.data_inputs) != 1:
        return False
    others = [value.number for _, value in operation.inputs if value.constant]
    plain = [float(number) for number in operation.arguments.values() if isinstance(number, (int, float))]
    numbers = others or plain[:1]
    # ``2 / x`` reaches us as a division whose first argument is x.
    reflected = getattr(operation.key.func, "__name__", "") in ("__rdiv__", "__rtruediv__")
    left = operation.data_inputs[0][0][0] == 0 and not reflected
    division = operation.op in ("div", "divide", "true_divide")
    return (left or not division) and len(numbers) == 1 and numbers[0] is not None and numbers[0] > 0


def starts_from_integers(operation: Operation) -> bool:
    """Whether an operation turns integers into the floating-point numbers that a layer reads."""
    moves = operation.category is Category.PASS_THROUGH and bool(operation.data_inputs)
    return moves and all(not value.floating for _, value in operation.data_inputs)
