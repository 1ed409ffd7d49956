"""Control groups: one driver for the unified hierarchy, one for hosts whose controllers are still v1."""

from sysctr.cgroup.base import Driver, Events, Limits, Placement, Usage
from sysctr.cgroup.detect import open_driver

__all__ = ["Driver", "Events", "Limits", "Placement", "Usage", "open_driver"]
