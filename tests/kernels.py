"""Plain papermill as a command, for tests: a kernel that lost its port to another process at the start is no failure of the page."""
import subprocess
import sys
from pathlib import Path


def papermill(*arguments, tries: int = 3, **kwargs) -> subprocess.CompletedProcess:
    for _ in range(tries):
        done = subprocess.run([str(Path(sys.executable).with_name("papermill")), *map(str, arguments)], capture_output=True, text=True, **kwargs)
        if "died before replying" not in done.stderr:
            break
    return done
