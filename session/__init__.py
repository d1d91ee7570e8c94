"""The name by which older scripts and notebooks import `build`."""

from build import REGISTRIES, Setup, set_up, with_data_facts

__all__ = ["REGISTRIES", "Setup", "set_up", "with_data_facts"]
