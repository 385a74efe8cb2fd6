"""On a device that is not the CPU: nothing is mixed with what lies elsewhere, and nobody waits for it at each step.

The device is pretended, see ``device_worker.py``: what is shown is where tensors are, not how fast a GPU is.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from device_worker import DRAWN, OTHERS
from torch.utils import backend_registration

WORKER = Path(__file__).with_name("device_worker.py")
# torch's decomposition of a matrix waits by itself, and the filter's taps are copied
WAITING = ("tcfg", "frequency_decoupled", "a scheduler")
MOST, TOKENS = 12, 16

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices that are written in Python",
)


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


@pytest.mark.parametrize("name", [name for name in DRAWN if not name.endswith(WAITING)])
def test_no_step_waits_for_the_device(found, name):
    """Twice as many steps wait no more often."""
    four, eight = found[name]["looks"]
    # the tokens of ar are as many in both, and more than are waited for
    assert four == eight and sum(four.values()) <= MOST < TOKENS, (four, eight)


def test_the_pretended_device_refuses_what_a_gpu_refuses(found):
    assert found["tensors of two devices"]["said"] == [
        "expected all tensors to be on the same device: add",
        "expected all tensors to be on the same device: cat",
        "expected all tensors to be on the same device: embedding",
        "",
    ]


def test_the_pretended_device_counts_who_waits(found):
    assert found["a number is looked at"]["looks"] == {"number": 1, "moved to the device": 1}


def test_scales_on_another_device_are_refused(found):
    assert found["scales on another device"]["said"].startswith(
        "s is on cpu and the outputs on far"
    )
