"""Why a step was skipped."""

from __future__ import annotations

import enum


class SkipReason(enum.IntFlag):
    """Bits of ``GuardState.skip_reason``, several of which may hold at once.

    Example:
      >>> import optax_guard as og
      >>> og.SkipReason(5).words
      'gradients were not finite; the optimizer proposed a non-finite update or state from
       finite inputs'
    """

    ACCEPTED = 0
    GRADIENT = 1
    LOSS_VALUE = 2
    PROPOSAL = 4
    CONDITION = 8
    ALREADY_NONFINITE = 16

    @property
    def words(self) -> str:
        """What the bits mean, joined."""
        return "; ".join(_WORDS[reason] for reason in self) or "accepted"


_WORDS = {
    SkipReason.GRADIENT: "gradients were not finite",
    SkipReason.LOSS_VALUE: "the loss value was not finite",
    SkipReason.PROPOSAL: ("the optimizer proposed a non-finite update or state from finite inputs"),
    SkipReason.CONDITION: "a skip_if condition rejected the step",
    SkipReason.ALREADY_NONFINITE: "parameters or optimizer state were already non-finite",
}
