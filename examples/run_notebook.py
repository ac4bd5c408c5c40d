"""Runs the code of a notebook as one script, so that no kernel is needed: python run_notebook.py NOTEBOOK"""

import ast
import json
import sys
from pathlib import Path

namespace: dict[str, object] = {}
for cell in json.loads(Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] != "code":
        continue

    # As in a notebook, the value of a last expression is shown.
    parsed = ast.parse("".join(cell["source"]))
    last = parsed.body.pop() if isinstance(parsed.body[-1], ast.Expr) else None
    exec(compile(parsed, sys.argv[1], "exec"), namespace)  # noqa: S102  # the notebook is our own
    if isinstance(last, ast.Expr):
        print(eval(compile(ast.Expression(last.value), sys.argv[1], "eval"), namespace))  # noqa: S307
