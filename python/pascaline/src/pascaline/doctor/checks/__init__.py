"""All checks, in the order in which a person would look: card, driver, engine, model, machine, instance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.doctor.checks import driver, engine, environment, gpu, instance, memory, model, system

if TYPE_CHECKING:
    from pascaline.doctor.verdicts import Check

ALL_CHECKS: tuple[Check, ...] = tuple(
    check for module in (driver, gpu, engine, environment, model, system, memory, instance) for check in module.CHECKS
)

__all__ = ["ALL_CHECKS"]
