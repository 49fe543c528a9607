"""AdamW flown by wire: a bounded, logged controller around any optax optimizer."""

from lbw_optax.guard import GuardState, guard
from lbw_optax.interpretation import Cause, Regime
from lbw_optax.law import Law
from lbw_optax.policy import Action
from lbw_optax.report import Event, Report, events, report

__all__ = [
    "Action",
    "Cause",
    "Event",
    "GuardState",
    "Law",
    "Regime",
    "Report",
    "events",
    "guard",
    "report",
]

__version__ = "0.1.0"
