"""python -m methods: the files of this folder, with the first line of each."""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    print(f"{path.stem:17} {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}")
