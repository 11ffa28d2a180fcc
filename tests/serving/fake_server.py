"""Stands in for the program ``tritonserver``: takes its options, answers health and gets stopped.

Environment: FAKE_SERVER = ``refuses`` (says why in Triton's words, ends with 1), ``silent`` (never
ready), ``stubborn`` (ignores SIGTERM), else well-behaved. FAKE_RECORD: file for what it was given.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REFUSAL = (
    'I1122 10:00:00.000000 1 model_lifecycle.cc:472] "loading: tensorrt_llm:1"\n'
    "E1122 10:00:00.000000 1 model_lifecycle.cc:642] \"failed to load 'tensorrt_llm' version 1: "
    "Internal: TritonModelException: /e/model.onnx: expected 5 bytes, found 4\\n\\nAt:\\n  "
    '/site/engine.py(48): initialize\\n"\n'
    "error: creating server: Internal - failed to load all models\n"
)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def main() -> int:
    options = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
    mode = os.environ.get("FAKE_SERVER", "")
    record = os.environ.get("FAKE_RECORD")
    # A process of the same group, as stubs are.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if record:
        names = ("ADDRESS", "HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "TRITONSERVER")
        environment = {n: os.environ[n] for n in names if n in os.environ}
        backends = options.get("backend-directory")
        Path(record).write_text(
            json.dumps(
                {
                    "argv": sys.argv[1:],
                    "child": child.pid,
                    "environment": environment,
                    "backends": sorted(os.listdir(backends)) if backends else None,
                }
            )
        )
    if mode == "refuses":
        child.kill()
        print(REFUSAL, flush=True)
        return 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: sys.exit(0))
    if mode == "silent":
        time.sleep(600)
    port = int(options.get("http-port") or os.environ["HTTP_PORT"])
    http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
