"""What a machine lacks for a recipe: versions, devices, plug-ins, the hub, disk space, and one tiny iteration."""

from branchtree.doctor.check import Check
from branchtree.doctor.examine import examine

__all__ = ["Check", "examine"]
