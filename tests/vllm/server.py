"""A vLLM server as a process group of its own, started, killed and started again on the same port."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.serving import find_free_port

MODEL = "tiny"
_SITE = Path(__file__).with_name("site")
_READY_S = 900
_ENVIRONMENT = {
    "PYTHONPATH": str(_SITE),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# Free spaces in JSON let a model that dislikes the next letter say spaces until it is cut off.
_COMPACT = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
_OPTIONS = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]


class VLLM:
    """Starts at once; `wait_ready` takes half a minute on a quiet machine."""

    def __init__(self, python: str, checkpoint: Path, log: Path):
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        what = ["--model", str(checkpoint), "--served-model-name", MODEL]
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [python, "-m", "vllm.entrypoints.openai.api_server", *what, *where, *_OPTIONS, *_COMPACT]
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env={**os.environ, **_ENVIRONMENT}, start_new_session=True
            )

    def wait_ready(self) -> None:
        end = time.monotonic() + _READY_S
        while time.monotonic() < end:
            assert self._process.poll() is None, f"vLLM ended:\n{self._log.read_text()[-3000:]}"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                    if response.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"vLLM was not ready in {_READY_S} s:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """kill -9 of everything it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
