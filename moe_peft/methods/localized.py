"""Fields of the adapter types that can balance their experts by sample group."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config.meaning import NOT_MEANING
from ..config.router_fields import GROUP_COLUMN, RouterConfig
from ..losses import LocalizedBalancing
from ..losses.localized_balancing import MODES
from ..messages import LIMIT, warn


@dataclass
class LocalizedBalancingConfig(RouterConfig):
    """A routed configuration with the fields of localized balancing."""

    expert_groups: list[int] | None = field(
        default=None,
        metadata={
            "help": "Group of each expert, one integer per expert, as [1, 1, 1, 0, 0, 0]; every batch must then "
            "bring the group of each sample. None balances all experts evenly, without groups.",
            **NOT_MEANING,
        },
    )
    localized_balancing_delta: float = field(
        default=0.1,
        metadata={"help": "Strength of the shift towards groups, from 0 to 1 (paper: 0.1).", **NOT_MEANING},
    )
    localized_balancing_mode: str = field(
        default="paper",
        metadata={
            "help": "'paper': a sample's own experts get less of its gate mass, (1-delta)/(1+delta) of the others'. "
            "'specialize': they get more, (1+delta)/(1-delta) times.",
            **NOT_MEANING,
        },
    )
    group_column: str = field(
        default=GROUP_COLUMN,
        metadata={"help": "Batch column with the group of each sample, integers of shape (batch,).", **NOT_MEANING},
    )

    def validate(self) -> None:
        """Check every field; see `MoeConfig.validate`."""
        super().validate()
        self._check(0 <= self.localized_balancing_delta <= 1, "localized_balancing_delta", "a number from 0 to 1")
        self._check_choice("localized_balancing_mode", MODES)
        hint = f"the name of a batch column, of at most {LIMIT} characters"
        self._check(0 < len(self.group_column) <= LIMIT, "group_column", hint)
        if self.expert_groups is None:
            return
        self.expert_groups = list(self.expert_groups)
        hint = "None with expert_groups, which give every layer the same experts"
        self._check("num_experts" not in (self.per_layer or {}), "per_layer", hint)
        self._check(
            len(self.expert_groups) == self.num_experts,
            "expert_groups",
            f"one group per expert, that is {self.num_experts} integers for num_experts={self.num_experts}",
        )
        groups = set(self.expert_groups)
        self._check(len(groups) >= 2, "expert_groups", "of at least two groups, or None to balance without groups")
        self._check(
            len(groups) == 2 or self.localized_balancing_mode == "specialize",
            "expert_groups",
            "of two groups in the mode 'paper', with which a sample's own experts are the ones it avoids; for more "
            "groups set localized_balancing_mode='specialize'",
        )

    def advise(self) -> None:
        """See `MoeConfig.advise`."""
        super().advise()
        idle = self.localized_balancing_delta in (0, 0.1) and self.localized_balancing_mode == "paper"
        if self.expert_groups is None and not idle:
            warn(
                f"{type(self).__name__}: localized_balancing_delta and localized_balancing_mode have no effect "
                "without expert_groups; give the group of each expert."
            )

    @property
    def group_columns(self) -> dict[str, frozenset[int]]:
        """See `MoeConfig.group_columns`; the column of `expert_groups`, which a router may read as well."""
        known = super().group_columns.values()
        return {self.group_column: frozenset(self.expert_groups or ()).union(*known)}

    @property
    def group_readers(self) -> dict[str, list[str]]:
        """See `MoeConfig.group_readers`; the loss with `expert_groups` is one."""
        readers = [own for parts in super().group_readers.values() for own in parts]
        if self.expert_groups is not None:
            readers.insert(0, "expert_groups")
        return {self.group_column: readers} if readers else {}

    def localized_balancing(self) -> LocalizedBalancing:
        """The loss with this configuration's groups."""
        return LocalizedBalancing(
            expert_groups=self.expert_groups,
            delta=self.localized_balancing_delta,
            mode=self.localized_balancing_mode,
            group_column=self.group_column,
        )
