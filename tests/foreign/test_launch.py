"""Real processes over gloo: Hugging Face tensor parallelism, DTensors, the all-to-all, refusals of all ranks."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import command

_CASES = 7
_ARTEFACT = "bdlora_00_simplify"


@pytest.mark.timeout(400)
def test_two_ranks(tmp_path: Path) -> None:
    """All cases of `tests.foreign.worker` pass on two ranks, through Inductor."""
    launch = command(2, "tests.foreign.worker", tmp_path, "--inner", "inductor")
    path = os.pathsep.join(["examples", os.environ.get("PYTHONPATH", "")])
    trace = tmp_path / "trace"
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_TRACE": str(trace)}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=380, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("case: ") == _CASES, done.stdout
    check_trace(trace)


def check_trace(folder: Path) -> None:
    """What tlparse reads: a log of each rank, with the text of every stage behind the artefact that names it."""
    logs = sorted(folder.glob("dedicated_log_torch_trace_rank_*.log"))
    assert len(logs) == 2
    for log in logs:
        artefacts = dict(artefacts_of(log))
        names = [name for name in artefacts if name.startswith("bdlora_")]
        assert names[:2] == [_ARTEFACT, "bdlora_01_split_products"]
        assert names[-1] == "bdlora_04_fold"
        assert "all_reduce" in artefacts[_ARTEFACT]
    if shutil.which("tlparse"):
        out = folder / "page"
        subprocess.run(["tlparse", logs[0], "-o", out, "--no-browser"], check=True, capture_output=True, timeout=60)
        assert [*out.rglob(f"{_ARTEFACT}*")]
        assert _ARTEFACT in (out / "index.html").read_text()


def artefacts_of(log: Path) -> Iterator[tuple[str, str]]:
    """(name, payload): a payload stands behind its line, each of its own lines after a tab."""
    name, payload = "", list[str]()
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            payload.append(line[1:])
            continue
        if name:
            yield name, "\n".join(payload)
        found = re.search(r"\{.*", line)
        name, payload = json.loads(found[0]).get("artifact", {}).get("name", "") if found else "", []
    if name:
        yield name, "\n".join(payload)
