"""What of a model trains: whole parts, and adapters on linear layers. By sizes alone."""

from collections import Counter
from dataclasses import dataclass

from nemovl_train.config.adapters import adapted_linears
from nemovl_train.config.schema import RunConfig
from nemovl_train.model.flops import count_parameters


@dataclass(frozen=True, kw_only=True)
class PartTraining:
    """One part of the model.

    Attributes:
        own: Parameters of the part itself.
        whole: Whether they train.
        adapters: Parameters of its adapters, all of which train.
        layers: Adapted linear layers, how many of each name.
    """

    own: int
    whole: bool
    adapters: int
    layers: dict[str, int]

    @property
    def trained(self) -> int:
        """Parameters with gradients and optimizer state."""
        return self.adapters + (self.own if self.whole else 0)

    @property
    def learns(self) -> bool:
        """Whether anything in it trains."""
        return self.whole or self.adapters > 0

    @property
    def held(self) -> int:
        """Parameters in memory."""
        return self.own + self.adapters


def trainable(config: RunConfig) -> dict[str, PartTraining]:
    """What each part trains, by the parts' names."""
    linears = adapted_linears(config.model, config.adapter)
    found = {}
    for part, own in count_parameters(config.model).items():
        adapted = [linear for linear in linears if linear.part == part]
        found[part] = PartTraining(
            own=own,
            whole=part in config.trainer.train,
            adapters=sum(linear.adapter_parameters(config.adapter.rank) for linear in adapted),
            layers=dict(Counter(linear.name.rpartition(".")[2] for linear in adapted)),
        )
    return found


def adapted_parts(config: RunConfig) -> list[str]:
    """Parts with adapters."""
    return [part for part, row in trainable(config).items() if row.adapters]


def trainable_text(config: RunConfig) -> str:
    """A table of parts: parameters frozen, trained as a whole and in adapters, learning rate, adapted layers."""
    rows = [("part", "frozen", "trained", "adapters", "peak rate", "adapted layers")]
    for part, row in trainable(config).items():
        layers = ", ".join(f"{count} {name}" for name, count in row.layers.items()) or "-"
        frozen, whole = (0, row.own) if row.whole else (row.own, 0)
        rate = f"{config.optim.lr * getattr(config.optim.lr_scale, part):.2g}" if row.learns else "-"
        rows.append((part, f"{frozen:,}", f"{whole:,}", f"{row.adapters:,}", rate, layers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        f"  {row[0]:<{widths[0]}}  "
        + "  ".join(text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True))
        + f"  {row[-1]}"
        for row in rows
    )
