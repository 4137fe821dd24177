"""The plan: which query rows meet which keys in one call. Numbers only, made from a layout."""

from dilated_block_sparse.plan.stacks import Axis, HeadPlan, Plan, Stack, make_plan, plan_of

__all__ = ["Axis", "HeadPlan", "Plan", "Stack", "make_plan", "plan_of"]
