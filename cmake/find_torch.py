"""Print `<torch's folder>;<its version>` without importing torch; exit 1 when it is absent or older than 2.11."""

import importlib.metadata
import importlib.util
import sys

found = importlib.util.find_spec("torch")
if found is None or not found.submodule_search_locations:
    sys.exit(1)
version = importlib.metadata.version("torch")
if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11):
    sys.exit(1)
print(f"{found.submodule_search_locations[0]};{version}")
