"""Reading needs no torch; writing asks for it in an error message."""

import subprocess
import sys


def test_reading_works_and_writing_asks_where_torch_is_missing(tmp_path, torch_file):
    import numpy as np

    (tmp_path / "f.pt").write_bytes(torch_file({"a": np.ones(3, np.float32)}).zip_bytes())
    code = f"""
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy as np
from sfd_jax.convert.torch_files import read_torch_file, write_torch_file
from sfd_jax.errors import SfdError
print(np.asarray(read_torch_file({str(tmp_path / "f.pt")!r})["a"]).sum())
try:
    write_torch_file({str(tmp_path / "g.pt")!r}, {{}})
except SfdError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, sentence = done.stdout.splitlines()
    assert total == "3.0"
    assert "pip install 'sfd_jax[torch]'" in sentence and ".safetensors" in sentence
