"""Training. ``dropout`` needs torch alone; ``trainer``, ``recipe`` and ``data`` need the whole installation."""

from unicfg.training.dropout import ConditionDropout, drop_condition

__all__ = ["ConditionDropout", "drop_condition"]
