"""Calling a registered function with the fields of a config that its parameters name."""

import inspect
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs.errors import UserError

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # *args, **kwargs


def call(function: Callable[..., Any], config: ConfigDict, *sections: str, **given: Any) -> Any:
    """Call a function whose parameters are named after fields of a config.

    A parameter `beta_min` gets `config.model.beta_min` if `model` is among the sections, and the
    first section that has the field counts. A parameter `config`, or the only one of a function
    of one parameter if no field has its name, gets the whole config. A parameter with a default
    keeps it if no section has its field.

    Args:
      function: a function or a class.
      config: the config.
      sections: names of the config's sections, in the order in which they are searched.
      given: arguments that do not come from the config; those that the function does not take are
        left out.

    Raises:
      UserError: a parameter has no default and is no field of the sections.
    """
    parameters = inspect.signature(function).parameters
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        holder = next((config[s] for s in sections if name in config[s]), None)
        if name in given:
            found[name] = given[name]
        elif name == "config":
            found[name] = config
        elif holder is not None:
            found[name] = holder[name]
        elif len(parameters) == 1 and parameter.default is inspect.Parameter.empty:
            return function(config)
        elif parameter.default is inspect.Parameter.empty and parameter.kind not in _OPEN:
            places = " or ".join(f"config.{section}" for section in sections)
            raise UserError(
                f"{getattr(function, '__name__', function)} takes {name}, which {places} does not "
                "have: set it in get_config within `with config.unlocked():`, or give it a default"
            )
    return function(**found)
