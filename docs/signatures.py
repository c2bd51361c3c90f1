"""What griffe, which reads without running, cannot know: the arguments of functions that `called_with` makes."""

import inspect

import griffe

import fastforget

KINDS = {kind: griffe.ParameterKind(kind.description) for kind in inspect._ParameterKind}


class CalledWith(griffe.Extension):
    """Give `unlearn` and `demo` the arguments that they take, not the one object that they are written for."""

    def on_package(self, *, pkg, **_):
        """Put the parameters of a package's jobs right, once it is read."""
        for name in ("unlearn", "demo"):
            function = pkg[f"jobs.{name}.{name}"]
            function.parameters = griffe.Parameters(
                *(
                    griffe.Parameter(
                        each.name,
                        kind=KINDS[each.kind],
                        annotation=inspect.formatannotation(each.annotation, "typing").replace("typing.", ""),
                        default=None if each.default is inspect.Parameter.empty else repr(each.default),
                    )
                    for each in inspect.signature(getattr(fastforget, name)).parameters.values()
                )
            )
