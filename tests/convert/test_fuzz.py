"""Mutated files of every kind: none crashes the readers or exceeds its budget; see fuzzing.py."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_mutated_file_crashes_the_readers():
    script = Path(__file__).with_name("fuzzing.py")
    done = subprocess.run([sys.executable, script, "6000"], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-3000:])  # a segmentation fault: -11
    assert done.stdout.count(" files, ") == 5
