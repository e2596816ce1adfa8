"""Writes a command again, for the processes that it starts."""

from __future__ import annotations

import click


def repeat_command(ctx: click.Context) -> list[str]:
    """Write the command's arguments again, for a process that does the same."""
    words, last = [str(ctx.command.name)], []
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if ctx.get_parameter_source(name) != click.core.ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(parameter, click.Argument):
            last += [str(one) for one in value]
        elif getattr(parameter, "is_flag", False):
            words.append(parameter.opts[0])
        else:
            # In one word, since a value may begin with a dash.
            words += [f"{parameter.opts[0]}={one}" for one in (value if parameter.multiple else [value])]
    return [*words, "--", *last]
