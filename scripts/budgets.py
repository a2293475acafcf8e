"""Hold the size budgets: functions of at most 60 lines, files of at most 500."""

import ast
import sys
from pathlib import Path

FUNCTION_LINES = 60
FILE_LINES = 500
ROOT = Path(__file__).resolve().parent.parent


def over_budget(path: Path) -> list[str]:
    """Return a sentence for each budget the file breaks."""
    text = path.read_text()
    name = path.relative_to(ROOT)
    found = []
    if (lines := text.count("\n")) > FILE_LINES:
        found.append(f"{name}: {lines} lines, the budget is {FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                where = f"{name}:{node.lineno}: {node.name}"
                found.append(f"{where} has {length} lines, the budget is {FUNCTION_LINES}")
    return found


def main() -> int:
    """Print what is over budget and return 1 if anything is."""
    files = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "_pb2" not in p.name]
    found = [line for path in sorted(files) for line in over_budget(path)]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
