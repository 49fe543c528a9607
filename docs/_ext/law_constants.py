"""The directive `law-constants`: a table of the control law's constants, made from its source."""

import dataclasses
import re

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.pycode import ModuleAnalyzer

from lbw_optax.law import Law


class LawConstants(Directive):
    """Lists every field of `Law`, grouped by the comments in its source."""

    def run(self) -> list[nodes.Node]:
        """Returns one table per group."""
        module = ModuleAnalyzer.for_module("lbw_optax.law")
        self.state.document.settings.env.note_dependency(module.srcname)
        texts = {name: " ".join(d) for (_, name), d in module.find_attr_docs().items()}
        defaults = {field.name: field.default for field in dataclasses.fields(Law)}
        lines = []
        for line in module.code.splitlines():
            if group := re.fullmatch(r"    # (.*)", line):
                lines += ["", f"**{group[1]}**", "", ".. list-table::", "   :widths: 25 10 65"]
                lines += ["   :header-rows: 1", "", "   * - Constant", "     - Default"]
                lines += ["     - Meaning and origin"]
            field = re.match(r"    (\w+): \w+ = ", line)
            if field and field[1] in defaults:
                lines += [f"   * - ``{field[1]}``", f"     - {defaults[field[1]]:g}"]
                lines += [f"     - {texts[field[1]]}"]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source=module.srcname), 0, container)
        return container.children


def setup(app) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("law-constants", LawConstants)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
