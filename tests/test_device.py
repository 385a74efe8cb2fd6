"""On a device that is not the CPU: nothing is mixed with what lies elsewhere, and nobody waits for it at each step.

The device is pretended, see ``device_worker.py``: what is shown is where tensors are, not how fast a GPU is.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from device_worker import DRAWN, OTHERS

WORKER = Path(__file__).with_name("device_worker.py")


@pytest.fixture(scope="module")
def found():
    """What became of every scenario, in a process of its own: torch registers a device for good."""
    done = subprocess.run(
        [sys.executable, WORKER], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*DRAWN, *OTHERS])
def test_a_device_computes_what_the_cpu_does(found, name):
    assert "error" not in found[name], found[name]["error"]
    assert found[name]["off"] < 1e-4


@pytest.mark.parametrize("name", DRAWN)
def test_no_step_waits_for_the_device(found, name):
    """Twice as many steps look no more often; to choose tokens of a masked model is to wait for how many there are."""
    few, many = found[name]["looks"]
    few.pop("selection", None), many.pop("selection", None)
    assert few == many and sum(few.values()) <= 5, (few, many)


def test_the_pretended_device_refuses_what_a_gpu_refuses(found):
    assert found["tensors of two devices"]["said"] == [
        "expected all tensors to be on the same device: add",
        "expected all tensors to be on the same device: cat",
        "expected all tensors to be on the same device: embedding",
        "",
    ]
    assert found["a number is looked at"]["looks"] == {"number": 1}


def test_scales_on_another_device_are_refused(found):
    assert found["scales on another device"]["said"].startswith(
        "s is on cpu and the outputs on far"
    )
