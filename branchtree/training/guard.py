"""Updates that would do harm are left out, alike on all processes, and counted; too many in a row end the run."""

from __future__ import annotations

import math

from branchtree.errors import BranchTreeError
from branchtree.recipe.schema import OptimSection


class UpdateGuard:
    """Judges each update by its gradient's norm, which is the same on all processes.

    ``in_a_row`` counts the updates left out since the last one taken; checkpoints keep it.
    """

    def __init__(self, section: OptimSection) -> None:
        self._limit, self._most = section.refuse_above, section.max_refused
        self.in_a_row = 0
        self.admitted = 0  # updates since this process began: while it stays, so do the weights

    def admits(self, norm: float, iteration: int) -> bool:
        """Whether to take an update whose gradient has this norm, before clipping.

        Raises BranchTreeError, the weights being as they were, when more than ``optim.max_refused`` in a row are not.
        """
        reason = self._reason(norm)
        if reason is None:
            self.in_a_row = 0
            self.admitted += 1
            return True
        self.in_a_row += 1
        if self.in_a_row > self._most:
            raise BranchTreeError(
                f"iteration {iteration}: {reason}; with it {self.in_a_row} updates in a row were left out, and "
                f"optim.max_refused allows {self._most}. Lower optim.lr or sampler.eta"
                + (", or look at the rewards of the last iterations" if math.isfinite(norm) else "")
            )
        return False

    def _reason(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self._limit is not None and norm > self._limit:
            return f"the gradient's norm {norm:.3g} is above optim.refuse_above {self._limit:.3g}"
        return None
