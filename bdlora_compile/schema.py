"""Write the JSON schema of the explanation: ``python -m bdlora_compile.schema FOLDER``."""

import json
import sys
from pathlib import Path

from bdlora_compile.explanation import VERSION, Explanation


def write(folder: Path) -> Path:
    """Write ``explanation.v<version>.schema.json``."""
    path = folder / f"explanation.v{VERSION}.schema.json"
    path.write_text(json.dumps(Explanation.json_schema(), indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
